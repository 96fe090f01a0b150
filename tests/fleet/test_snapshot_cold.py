"""Cold snapshots: the guest comes back with the memory it had, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Scheduler, snapshots, virsh
from tests.fleet.writer import WRITER, console, counters, goes_on
from tests.lab import LabHost, wait_until


def test_a_running_guest_goes_on_where_it_was(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path
) -> None:
    guest = spawn(image=str(real), **WRITER)
    record = snapshot(guest["instance"], method="cold")
    assert record["state"] == "succeeded", record["error"]
    goes_on(host, guest)
    [taken] = snapshots(host)
    assert (taken.method, taken.power, taken.consistency) == ("cold", "running", "crash")
    first, second = counters(host, taken, tmp_path)
    assert first - second in {0, 1}

    restored = scheduler.call("snapshot_restore", snapshot=taken.id, name="again")
    try:
        assert restored["state"] == "succeeded", restored["error"]
        wait_until(lambda: "writing" in console(host, restored), 90, "what it holds boots")
    finally:
        scheduler.call("destroy", instance="again")


@pytest.mark.thorough
def test_a_guest_that_is_off_stays_off(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path
) -> None:
    guest = spawn(image=str(real), memory_mib=256, wait_for="agent")
    scheduler.call("power_off", instance=guest["instance"])
    for method in ("auto", "cold"):
        record = snapshot(guest["instance"], method=method)
        assert record["state"] == "succeeded", record["error"]
    assert virsh(host, "domstate", guest["instance"]).strip() == "shut off"
    # It shut itself down: nothing was left in its memory.
    assert [(one.method, one.consistency) for one in snapshots(host)] == [("cold", "application")] * 2
    refused = snapshot(guest["instance"], method="backup")
    assert (refused["state"], refused["error"]["code"]) == ("failed", "invalid_state")


@pytest.mark.thorough
@pytest.mark.parametrize("power", ["running", "paused"])
def test_a_cancelled_one_brings_the_guest_back(
    host: LabHost, spawn: Spawn, scheduler: Scheduler, real: Path, power: str
) -> None:
    guest = spawn(image=str(real), **WRITER)
    if power == "paused":
        scheduler.call("pause", instance=guest["instance"])
    operation = f"cancelled-{power}"
    answer = scheduler.send("snapshot", instance=guest["instance"], method="cold", limit_mib=1, operation_id=operation)
    wait_until(lambda: virsh(host, "domstate", guest["instance"]).strip() == "shut off", 60, "its memory is saved")
    scheduler.app.send_task("virtfleet.cancel", kwargs={"operation_id": operation}, queue="virtfleet")
    record = answer.get(timeout=60)
    assert record["state"] == "cancelled"
    assert virsh(host, "domstate", guest["instance"]).strip() == power
    assert snapshots(host) == []
    if power == "running":
        goes_on(host, guest)
