"""Live snapshots: all disks at one instant, consistent as far as the manifest says, and the guest goes on."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Scheduler, disk_of, image_info, qemu_img, snapshots, virsh
from tests.fleet.writer import WRITER, check_file_system, console, counters, goes_on
from tests.lab import LabHost, wait_until
from worker.context import Alone
from worker.images.checksum import checksum_of


@pytest.mark.parametrize("method", ["backup", pytest.param("mirror", marks=pytest.mark.thorough)])
def test_all_disks_show_one_instant_with_clean_file_systems(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path, method: str
) -> None:
    guest = spawn(image=str(real), **WRITER)
    assert guest["state"] == "succeeded", guest["error"]
    record = snapshot(guest["instance"], method=method, quiesce="require")
    assert record["state"] == "succeeded", record["error"]
    [taken] = snapshots(host)
    assert (taken.consistency, taken.frozen_filesystems, taken.method) == ("filesystem", 1, method)

    first, second = counters(host, taken, tmp_path)
    assert first - second in {0, 1}
    assert first > 0
    assert check_file_system(host, taken, tmp_path) == ""
    goes_on(host, guest)
    hooks = [line for line in console(host, guest).splitlines() if "fsfreeze:" in line]
    assert [line.split()[2] for line in hooks] == ["freeze", "thaw"]

    for disk in taken.disks:
        path, form = disk_of(host, taken, disk.target)
        assert checksum_of(path, Alone()) == disk.checksum
        assert path.stat().st_mode & 0o777 == 0o400
        info = image_info(path)
        assert (info["format"], info["virtual-size"]) == (form, disk.virtual_size)
        assert "backing-filename" not in info
    assert f"<name>{guest['instance']}</name>" in taken.definition

    again = scheduler.call("snapshot_restore", snapshot=taken.id, name="again")
    try:
        assert again["state"] == "succeeded", again["error"]
        assert again["uuid"] != guest["uuid"]
        wait_until(lambda: "writing" in console(host, again), 90, "the restored guest has mounted its file system")
    finally:
        scheduler.call("destroy", instance="again")


@pytest.mark.thorough
@pytest.mark.parametrize("root_disk", ["overlay", "copy", "raw"])
@pytest.mark.parametrize("method", ["backup", "mirror", "cold"])
def test_every_form_holds_what_the_disk_holds(
    host: LabHost, spawn: Spawn, snapshot: Spawn, root_disk: str, method: str
) -> None:
    guest = spawn(root_disk=root_disk)
    for form, compress in (("qcow2", None), ("raw", None), ("qcow2", "zstd"), ("qcow2", "zlib")):
        record = snapshot(guest["instance"], method=method, format=form, compress=compress)
        assert record["state"] == "succeeded", record["error"]
    disk_format = "raw" if root_disk == "raw" else "qcow2"
    disk = host.data / "instances" / guest["uuid"] / f"root.{disk_format}"
    taken = snapshots(host)
    assert [one.disks[0].format for one in taken] == ["qcow2", "raw", "qcow2", "qcow2"]
    for one in taken:
        path, form = disk_of(host, one, "vda")
        qemu_img("compare", "-U", "-f", form, "-F", disk_format, str(path), str(disk))
        assert one.consistency == "crash"
    for one, compression in zip(taken[2:], ("zstd", "zlib"), strict=True):
        path, _ = disk_of(host, one, "vda")
        assert image_info(path)["format-specific"]["data"]["compression-type"] == compression
    assert virsh(host, "domstate", guest["instance"]).strip() == "running"


def test_a_raw_snapshot_takes_no_more_space_than_its_data(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn(ephemeral_gib=[1])
    assert snapshot(guest["instance"], format="raw", disks=["vdb"])["state"] == "succeeded"
    path, _ = disk_of(host, snapshots(host)[0], "vdb")
    assert path.stat().st_size == 1024**3
    assert path.stat().st_blocks * 512 < 1024**2


def test_only_the_chosen_disks_are_taken(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn(ephemeral_gib=[1, 1])
    assert snapshot(guest["instance"], disks=["vdb"])["state"] == "succeeded"
    assert snapshot(guest["instance"])["state"] == "succeeded"
    assert [[disk.target for disk in one.disks] for one in snapshots(host)] == [["vdb"], ["vda", "vdb", "vdc"]]
    refused = snapshot(guest["instance"], disks=["vdz"])
    assert (refused["state"], refused["error"]["code"]) == ("rejected", "invalid_spec")
    assert refused["error"]["details"]["allowed"] == ["vda", "vdb", "vdc"]


@pytest.mark.parametrize("method", ["backup", "mirror"])
def test_a_guest_that_cannot_be_frozen_is_not_called_consistent(
    host: LabHost, spawn: Spawn, snapshot: Spawn, method: str
) -> None:
    guest = spawn()
    refused = snapshot(guest["instance"], method=method, quiesce="require")
    assert (refused["state"], refused["error"]["code"]) == ("failed", "quiesce_failed")
    assert snapshots(host) == []
    assert snapshot(guest["instance"], method=method)["state"] == "succeeded"
    [taken] = snapshots(host)
    assert taken.consistency == "crash"
    assert "agent does not answer" in taken.notes[0]
    assert virsh(host, "domstate", guest["instance"]).strip() == "running"
    assert virsh(host, "domjobinfo", guest["instance"]).split()[-1] == "None"


def test_a_freeze_that_the_guest_itself_refuses_fails_only_what_demands_it(
    host: LabHost, spawn: Spawn, snapshot: Spawn, real: Path
) -> None:
    refusing = "#!/bin/sh\nprintf '#!/bin/sh\\n[ $1 != freeze ]\\n' >/etc/qemu/fsfreeze-hook\necho refusing\n"
    ready = {"wait_for": "console", "console_line": "refusing", "ready_timeout": 120}
    guest = spawn(image=str(real), memory_mib=256, user_data=refusing, **ready)
    assert guest["state"] == "succeeded", guest["error"]
    wait_until(lambda: agent_answers(host, guest["instance"]), 60, "the agent answers")
    refused = snapshot(guest["instance"], quiesce="require")
    assert (refused["state"], refused["error"]["code"]) == ("failed", "quiesce_failed")
    record = snapshot(guest["instance"])
    assert record["state"] == "succeeded", record["error"]
    [taken] = snapshots(host)
    assert taken.consistency == "crash"
    assert "hook" in taken.notes[0]


def agent_answers(host: LabHost, name: str) -> bool:
    with suppress(subprocess.CalledProcessError):
        return bool(virsh(host, "qemu-agent-command", name, '{"execute":"guest-ping"}'))
    return False


def test_one_that_is_off_after_a_power_failure_is_not_called_consistent(
    host: LabHost, scheduler: Scheduler, spawn: Spawn, snapshot: Spawn
) -> None:
    name = spawn()["instance"]
    scheduler.call("power_off", instance=name, timeout=0)
    refused = snapshot(name, quiesce="require")
    assert (refused["state"], refused["error"]["code"]) == ("failed", "quiesce_failed")
    assert snapshots(host) == []
    assert snapshot(name)["state"] == "succeeded"
    assert snapshots(host)[0].consistency == "crash"


def test_a_paused_guest_stays_paused(host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler) -> None:
    guest = spawn(ephemeral_gib=[1])
    scheduler.call("pause", instance=guest["instance"])
    for method in ("backup", "mirror", "cold"):
        assert snapshot(guest["instance"], method=method)["state"] == "succeeded"
        assert virsh(host, "domstate", guest["instance"]).strip() == "paused"


@pytest.mark.thorough
def test_a_mirror_becomes_equal_to_a_disk_that_changes_faster_than_it_is_copied(
    host: LabHost, spawn: Spawn, snapshot: Spawn, real: Path
) -> None:
    rewrite = "dd if=/dev/urandom of=/dev/vdb bs=1M count=64 conv=fsync 2>/dev/null"
    script = f"#!/bin/sh\n{rewrite}\necho rewriting\nwhile :; do {rewrite}; done\n"
    ready = {"wait_for": "console", "console_line": "rewriting", "ready_timeout": 120}
    guest = spawn(image=str(real), memory_mib=256, ephemeral_gib=[1], user_data=script, **ready)
    record = snapshot(guest["instance"], method="mirror", disks=["vdb"], limit_mib=4)
    assert record["state"] == "succeeded", record["error"]
    assert image_info(disk_of(host, snapshots(host)[0], "vdb")[0])["actual-size"] > 60 * 1024**2


@pytest.mark.thorough
def test_a_limit_is_kept(spawn: Spawn, snapshot: Spawn, real: Path) -> None:
    guest = spawn(image=str(real))
    began = time.monotonic()
    assert snapshot(guest["instance"], limit_mib=8, disks=["vda"])["state"] == "succeeded"
    assert time.monotonic() - began > 1.5  # 19 MiB of data


def test_the_command_takes_lists_and_deletes(host: LabHost, command: Commands, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn()
    done = command("snapshot", guest["instance"], "--id", "before-upgrade", "--compress")
    assert done.returncode == 0, done.stderr
    [taken] = snapshots(host)
    assert taken.id == "before-upgrade"
    path, _ = disk_of(host, taken, "vda")
    assert image_info(path)["format-specific"]["data"]["compression-type"] == "zstd"
    listed = command("snapshots", "--instance", guest["instance"])
    assert "before-upgrade" in listed.stdout
    assert "crash" in listed.stdout
    assert command("hosts", "sync").returncode == 0
    assert "before-upgrade" in command("snapshots").stdout
    assert command("snapshot", "delete", "before-upgrade").returncode == 0
    assert snapshots(host) == []
    wrong = command("snapshot", guest["instance"], "--compress", "lzma")
    assert wrong.returncode == 2
    assert "compress: allowed: 'zstd' or 'zlib'" in wrong.stderr
    assert command("snapshot", "--compress", guest["instance"]).returncode == 0
    missing = command("snapshot", "delete", "before-upgrade")
    assert missing.returncode == 2
    assert "snapshot_not_found" in missing.stderr


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"compress": "zstd", "format": "raw"}, "compress"),
        ({"incremental": True, "format": "raw"}, "incremental"),
        ({"incremental": True, "method": "mirror"}, "incremental"),
        ({"full": True}, "full"),
        ({"method": "cold", "quiesce": "require"}, "quiesce"),
        ({"limit_mib": 0}, "limit_mib"),
        ({"method": "undefine"}, "method"),
    ],
)
def test_what_does_not_fit_together_is_refused(scheduler: Scheduler, wrong: dict[str, object], field: str) -> None:
    record = scheduler.call("snapshot", instance="nobody", **wrong)
    assert (record["state"], record["error"]["code"]) == ("rejected", "invalid_spec")
    assert field in record["error"]["message"]
