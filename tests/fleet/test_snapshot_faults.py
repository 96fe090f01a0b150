"""Snapshots when something goes wrong: the guest goes on, and what cannot be finished leaves nothing."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Scheduler, snapshots, virsh
from tests.fleet.writer import WRITER, console, counters, goes_on
from tests.lab import Fleet, LabHost, wait_until

SLOW = {"limit_mib": 4, "disks": ["vda"], "quiesce": "never"}
"""Takes half a minute: 128 MiB, of which the empty parts count, too."""


def begun(host: LabHost, name: str) -> None:
    wait_until(lambda: "Operation:" in virsh(host, "domjobinfo", name), 30, "the backup runs")


@pytest.mark.thorough
def test_libvirtd_is_killed_and_the_job_is_adopted(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path
) -> None:
    guest = spawn(image=str(real), **WRITER)
    answer = scheduler.send("snapshot", instance=guest["instance"], limit_mib=300, quiesce="require")
    begun(host, guest["instance"])
    instant = next((host.data / "snapshots").glob(".*.unfinished")) / ".instant.json"
    wait_until(instant.exists, 30, "it is known what the job shows")
    noted = instant.read_text()
    host.libvirtd_kill9()
    host.libvirtd_start()
    record = answer.get(timeout=120)
    assert record["state"] == "succeeded", record["error"]
    [taken] = snapshots(host)
    assert taken.taken_at.isoformat().replace("+00:00", "Z") in noted  # the instant before libvirtd was killed
    first, second = counters(host, taken, tmp_path)
    assert first - second in {0, 1}
    goes_on(host, guest)


@pytest.mark.parametrize("method", ["backup", "mirror"])
def test_a_guest_powered_off_in_the_middle_fails_the_snapshot_and_nothing_else(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, method: str
) -> None:
    guest = spawn(image=str(real), memory_mib=256, root_disk="copy", disk_gib=1)
    answer = scheduler.send("snapshot", instance=guest["instance"], method=method, **SLOW)
    if method == "backup":
        begun(host, guest["instance"])
    else:
        wait_until(lambda: "<mirror" in virsh(host, "dumpxml", guest["instance"]), 30, "the mirror runs")
    virsh(host, "destroy", guest["instance"])
    record = answer.get(timeout=60)
    assert (record["state"], record["error"]["code"]) == ("failed", "invalid_state")
    assert "off" in record["error"]["message"]
    assert snapshots(host) == []
    assert scheduler.call("power_on", instance=guest["instance"])["state"] == "succeeded"


@pytest.mark.parametrize(
    ("method", "disks"), [("backup", ["vda"]), ("backup", []), ("mirror", ["vda"])], ids=["one disk", "all", "mirror"]
)
def test_a_cancelled_one_ends_its_job_and_leaves_nothing(
    host: LabHost, spawn: Spawn, scheduler: Scheduler, real: Path, method: str, disks: list[str]
) -> None:
    guest = spawn(image=str(real), **WRITER)
    operation, how = f"cancelled-{method}-{len(disks)}", {**SLOW, "method": method, "disks": disks}
    answer = scheduler.send("snapshot", instance=guest["instance"], operation_id=operation, **how)
    folder = host.data / "snapshots" / f".{operation}.unfinished"
    wait_until(lambda: any(folder.glob("*vda*")) or any(folder.glob(".vda*")), 30, "it has begun")
    scheduler.app.send_task("virtfleet.cancel", kwargs={"operation_id": operation}, queue="virtfleet")
    assert answer.get(timeout=60)["state"] == "cancelled"
    assert "<mirror" not in virsh(host, "dumpxml", guest["instance"])
    assert virsh(host, "domjobinfo", guest["instance"]).split()[-1] == "None"
    assert not folder.exists()
    goes_on(host, guest)


def test_a_backup_of_somebody_else_is_waited_for_and_the_guest_not_frozen_meanwhile(
    fleet: Fleet, host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path
) -> None:
    guest = spawn(image=str(real), **WRITER)
    name, theirs = guest["instance"], host.data / "theirs.qcow2"
    disks = "".join(f"<disk name='{disk}' backup='no'/>" for disk in ("vda", "vdc", "vdd"))
    backup = tmp_path / "backup.xml"
    backup.write_text(
        "<domainbackup mode='push'><disks><disk name='vdb' backup='yes' type='file'>"
        f"<target file='{theirs}'/><driver type='qcow2'/></disk>{disks}</disks></domainbackup>"
    )
    virsh(host, f"backup-begin {name} {backup}; blockjob {name} vdb --bandwidth 1")  # at once: the disk is nearly empty
    answer = scheduler.send("snapshot", instance=name, operation_id="ours", quiesce="require")
    with fleet.redis.client() as redis:
        wait_until(lambda: redis.hget("virtfleet:op:ours", "step:live_snapshot:state") == "retry", 60, "it is put off")
    goes_on(host, guest)
    assert "fsfreeze" not in console(host, guest)
    virsh(host, "domjobabort", name)
    record = answer.get(timeout=120)
    assert record["state"] == "succeeded", record["error"]
    theirs.unlink(missing_ok=True)  # libvirt may have removed it


@pytest.mark.thorough
def test_a_killed_worker_does_not_end_the_job_and_another_adopts_it(
    fleet: Fleet, host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path
) -> None:
    guest = spawn(image=str(real), memory_mib=256)
    answer = scheduler.send("snapshot", instance=guest["instance"], limit_mib=3, disks=["vda"], quiesce="never")
    begun(host, guest["instance"])
    noted = next((host.data / "snapshots").glob(".*.unfinished")) / ".instant.json"
    wait_until(noted.exists, 30, "it is known what the job shows")
    taken_at = datetime.fromisoformat(json.loads(noted.read_text())["taken_at"])
    worker = fleet.worker("hosta", "disk")
    worker.kill9()
    begun(host, guest["instance"])
    worker.start()
    record = answer.get(timeout=120)
    assert record["state"] == "succeeded", record["error"]
    attempts = {step["key"]: step["attempt"] for step in record["steps"]}
    assert attempts["live_snapshot"] == 2
    [taken] = snapshots(host)
    assert taken.taken_at == taken_at


@pytest.mark.thorough
def test_a_second_one_is_refused_or_waits_as_asked(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path
) -> None:
    guest = spawn(image=str(real), memory_mib=256)
    name = guest["instance"]
    first = scheduler.send("snapshot", instance=name, **SLOW)
    begun(host, name)
    refused = scheduler.call("snapshot", instance=name)
    assert (refused["state"], refused["error"]["code"]) == ("rejected", "instance_busy")
    waited = scheduler.call("snapshot", instance=name, wait_if_busy=True)
    assert waited["state"] == "succeeded"
    assert first.get(timeout=60)["state"] == "succeeded"
    earlier, later = snapshots(host)
    assert earlier.taken_at < later.taken_at
    assert later.id == waited["id"]


@pytest.mark.thorough
def test_a_guest_that_a_stopped_worker_holds_is_let_go(host: LabHost, spawn: Spawn, real: Path) -> None:
    guest = spawn(image=str(real), **WRITER)
    folder = host.data / "snapshots" / ".stopped.unfinished"
    folder.mkdir()
    intent = {"name": guest["instance"], "uuid": guest["uuid"], "frozen": True, "paused": True}
    (folder / ".intent.json").write_text(json.dumps(intent))
    try:
        virsh(host, "domfsfreeze", guest["instance"])
        virsh(host, "suspend", guest["instance"])
        goes_on(host, guest)
        released = lambda: json.loads((folder / ".intent.json").read_text()).get("released")  # noqa: E731
        wait_until(released, 5, "the holder is told")
    finally:
        shutil.rmtree(folder)
