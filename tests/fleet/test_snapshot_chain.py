"""Incremental snapshots: each holds what changed, each can be restored, and a broken chain begins anew and says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Scheduler, disk_of, image_info, snapshots, virsh
from tests.fleet.writer import WRITER, check_file_system, console, counters, goes_on
from tests.lab import Fleet, LabHost, wait_until
from tests.lab.process import REPOSITORY


def test_a_chain_shows_each_of_its_instants(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path
) -> None:
    guest = spawn(image=str(real), **WRITER)
    name = guest["instance"]
    for number in range(3):
        record = snapshot(name, incremental=True, quiesce="require", operation_id=f"night-{number}")
        assert record["state"] == "succeeded", record["error"]
        goes_on(host, guest)
    chain = snapshots(host)
    assert [one.parent for one in chain] == [None, "night-0", "night-1"]
    seen = [counters(host, one, tmp_path) for one in chain]
    assert seen == sorted(seen)
    assert len(set(seen)) == 3
    assert all(first - second in {0, 1} for first, second in seen)
    assert [check_file_system(host, one, tmp_path) for one in chain] == ["", "", ""]

    root, _ = disk_of(host, chain[2], "vda")
    assert image_info(root)["backing-filename"] == "../night-1/vda.qcow2"  # never the guest's own disk
    assert chain[2].disks[0].actual_size < chain[0].disks[0].actual_size / 10

    refused = scheduler.call("snapshot_delete", snapshot="night-1")
    assert (refused["state"], refused["error"]["code"]) == ("rejected", "snapshot_in_use")
    assert scheduler.call("snapshot_delete", snapshot="night-2")["state"] == "succeeded"
    assert virsh(host, "checkpoint-list", name, "--name").split() == ["virtfleet.night-0", "virtfleet.night-1"]
    # The checkpoint before it has taken over: the chain goes on from there.
    record = snapshot(name, incremental=True, quiesce="require", operation_id="night-3")
    assert record["state"] == "succeeded", record["error"]
    latest = snapshots(host)[-1]
    assert latest.parent == "night-1"
    first, second = counters(host, latest, tmp_path)
    assert first - second in {0, 1}
    assert (first, second) > seen[-1]
    assert check_file_system(host, latest, tmp_path) == ""

    restored = scheduler.call("snapshot_restore", snapshot="night-1", name="restored")
    try:
        assert restored["state"] == "succeeded", restored["error"]
        wait_until(lambda: "writing" in console(host, restored), 90, "the restored guest writes")
    finally:
        scheduler.call("destroy", instance="restored")


ASK = """
import sys
import schedule
entry = schedule.app.conf.beat_schedule[sys.argv[1]]
schedule.app.send_task(entry["task"], kwargs=entry["kwargs"], **entry["options"])
"""


def test_the_example_of_a_scheduler_makes_a_chain_each_week(
    fleet: Fleet, host: LabHost, spawn: Spawn, snapshot: Spawn
) -> None:
    name = spawn()["instance"]
    told = {"VIRTFLEET_NIGHTLY": f"another {name}", "VIRTFLEET_REDIS_URL": fleet.redis.url}

    def ask(entry: str) -> str:
        before = len(snapshots(host))
        command = [sys.executable, "-c", ASK, f"{entry}-{name}"]
        subprocess.run(command, cwd=REPOSITORY / "deploy" / "nightly", env={**os.environ, **told}, check=True)
        wait_until(lambda: len(snapshots(host)) > before, 60, f"the {entry} snapshot is there")
        taken = snapshots(host)[-1].id
        with fleet.redis.client() as client:
            wait_until(lambda: client.hget(f"virtfleet:op:{taken}", "ended_at"), 60, "its operation has ended")
        return taken

    first, second, third, fourth = (ask(entry) for entry in ("weekly", "nightly", "nightly", "weekly"))
    assert {one.id: one.parent for one in snapshots(host)} == {first: None, second: first, third: second, fourth: None}


def test_without_its_checkpoint_the_next_one_is_full_and_says_so(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn()
    name = guest["instance"]
    assert snapshot(name, incremental=True, operation_id="first")["state"] == "succeeded"
    virsh(host, "checkpoint-delete", name, "virtfleet.first")
    assert snapshot(name, incremental=True, operation_id="second")["state"] == "succeeded"
    assert snapshot(name, incremental=True, operation_id="third")["state"] == "succeeded"
    assert snapshot(name, incremental=True, full=True, operation_id="fourth")["state"] == "succeeded"
    taken = snapshots(host)
    assert [one.parent for one in taken] == [None, None, "second", None]
    assert "full instead of incremental" in taken[1].notes[-1]
    assert "full instead" not in str(taken[3].notes)


def test_what_changed_is_not_known_any_more_once_qemu_was_killed(
    host: LabHost, scheduler: Scheduler, spawn: Spawn, snapshot: Spawn
) -> None:
    guest = spawn()
    name = guest["instance"]
    assert snapshot(name, incremental=True, operation_id="before-the-kill")["state"] == "succeeded"
    os.kill(host.qemu_pid(name), signal.SIGKILL)
    wait_until(lambda: virsh(host, "domstate", name).strip() != "running", 20, "libvirt has noticed")
    assert scheduler.call("power_on", instance=name)["state"] == "succeeded"
    record = snapshot(name, incremental=True, operation_id="after-the-kill")
    assert record["state"] == "succeeded", record["error"]
    taken = snapshots(host)[-1]
    assert (taken.id, taken.parent) == ("after-the-kill", None)
    assert "full instead of incremental" in taken.notes[-1]
    assert record["steps"][0]["result"] > taken.disks[0].actual_size, "room for a full one was reserved"


def test_an_id_that_was_forgotten_does_not_take_it_again(
    fleet: Fleet, host: LabHost, scheduler: Scheduler, spawn: Spawn, snapshot: Spawn
) -> None:
    """Its checkpoint would begin anew, and what changed since would be in no increment."""
    name = spawn()["instance"]
    assert snapshot(name, incremental=True, operation_id="once")["state"] == "succeeded"
    fleet.redis.client().delete("virtfleet:op:once", "virtfleet:op:once:undo")
    began = virsh(host, "checkpoint-dumpxml", name, "virtfleet.once", "--no-domain")
    again = snapshot(name, incremental=True, operation_id="once")
    assert (again["state"], again["error"]["code"]) == ("rejected", "snapshot_exists")
    assert virsh(host, "checkpoint-dumpxml", name, "virtfleet.once", "--no-domain") == began


def test_what_is_restored_can_be_resized_and_what_is_damaged_is_not_restored(
    host: LabHost, scheduler: Scheduler, spawn: Spawn, snapshot: Spawn
) -> None:
    guest = spawn(ephemeral_gib=[1, 2], swap_mib=16)
    taken = snapshot(guest["instance"], format="raw", disks=["vda", "vdc"])
    assert taken["state"] == "succeeded", taken["error"]
    assert [disk.target for disk in snapshots(host)[0].disks] == ["vda", "vdc"]
    try:
        restored = scheduler.call("snapshot_restore", snapshot=taken["id"], name="restored")
        assert restored["state"] == "succeeded", restored["error"]
        folder = host.data / "instances" / restored["uuid"]
        assert {path.name for path in folder.glob("[res]*.[rq]*")} == {"root.raw", "ephemeral0.qcow2", "swap.raw"}
        resized = scheduler.call("resize", instance="restored", disk_gib=1, ephemeral_gib=[3], timeout=0)
        assert resized["state"] == "succeeded", resized["error"]
        assert image_info(folder / "ephemeral0.qcow2")["virtual-size"] == 3 * 1024**3
        root, _ = disk_of(host, snapshots(host)[0], "vda")
        root.chmod(0o600)
        with root.open("r+b") as file:
            file.write(b"\xff")
        for kind, wanted in (
            ("snapshot_restore", {"snapshot": taken["id"]}),
            ("spawn", {"image": f"snapshot:{taken['id']}", "host": "hosta"}),
        ):
            refused = scheduler.call(kind, name="damaged", **wanted)
            assert (refused["state"], refused["error"]["code"]) == ("failed", "snapshot_damaged")
    finally:
        scheduler.call("destroy", instance="restored")


def test_swap_is_not_taken_unless_asked_for(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    name = spawn(swap_mib=16)["instance"]
    assert snapshot(name, incremental=True)["state"] == "succeeded"
    assert [disk.role for disk in snapshots(host)[0].disks] == ["root"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: libvirt's status files are elsewhere for others")
def test_where_libvirt_lets_no_backup_begin_the_next_one_is_full_and_the_doctor_says_why(
    fleet: Fleet, host: LabHost, spawn: Spawn, snapshot: Spawn
) -> None:
    name = spawn()["instance"]
    assert snapshot(name, incremental=True, operation_id="before")["state"] == "succeeded"
    host.lose_sight_of_backup(name)
    assert snapshot(name, incremental=True, operation_id="meanwhile")["state"] == "succeeded"
    refused = snapshot(name, method="backup")
    assert refused["state"] == "failed"
    findings = json.loads(fleet.cli("doctor", "--json").stdout)["findings"]
    remedy = next(one["remedy"] for one in findings if one["code"] == "lost_backup")
    assert remedy in refused["error"]["hint"]
    host.follow(remedy)
    assert snapshot(name, incremental=True, operation_id="after")["state"] == "succeeded"
    _, meanwhile, after = snapshots(host)
    assert (meanwhile.method, meanwhile.parent, meanwhile.checkpoint) == ("mirror", None, None)
    assert "full instead of incremental" in meanwhile.notes[-1]
    assert after.parent == "before"


def test_checkpoints_of_what_failed_are_gone(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn()
    failed = snapshot(guest["instance"], incremental=True, quiesce="require")
    assert failed["state"] == "failed"
    assert virsh(host, "checkpoint-list", guest["instance"], "--name").split() == []


def test_a_snapshot_serves_as_an_image(host: LabHost, spawn: Spawn, snapshot: Spawn, real: Path) -> None:
    guest = spawn(image=str(real), memory_mib=256)
    assert snapshot(guest["instance"], incremental=True, operation_id="base")["state"] == "succeeded"
    assert snapshot(guest["instance"], incremental=True, operation_id="golden")["state"] == "succeeded"
    ready = {"wait_for": "console", "console_line": "virtfleet-guest ready", "memory_mib": 256}
    made = spawn(image="snapshot:golden", **ready)
    assert made["state"] == "succeeded", made["error"]
    root = host.data / "instances" / made["uuid"] / "root.qcow2"
    assert Path(image_info(root)["backing-filename"]).parent == host.data / "images"
    missing = spawn(image="snapshot:nosuch")
    assert (missing["state"], missing["error"]["code"]) == ("rejected", "snapshot_not_found")
