"""A snapshot of one host serves as an image on another: all of it arrives, once, and whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fleet.instances import TELL_AND_MARK, Lab, domains, lab_of
from tests.fleet.moves import DATA_MIB, MIB, cancel, ended, forget_all, idle, kill_workers, leftovers, step
from tests.fleet.parts import idle_image, image_info, qemu_img, snapshots
from tests.lab import LabHost, lab_folder, wait_until

BANDWIDTH_MIB = 16
GOES_ON_WRITING = """
(n=0; while n=$((n+1)); do printf %012d $n | dd of=/dev/vda bs=1M seek=80 conv=notrunc; sync; sleep 0.1; done) &
"""


@pytest.fixture(scope="module", params=["ssh", pytest.param("nbd", marks=pytest.mark.thorough)])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as environment, lab_folder() as folder:
        environment.setenv("VIRTFLEET_COPY_TRANSPORT", request.param)
        environment.setenv("VIRTFLEET_COPY_BANDWIDTH_MIB", str(BANDWIDTH_MIB))
        environment.setenv("VIRTFLEET_LEASE_TTL", "5")
        with lab_of(folder, "hosta", "hostb", networked=True) as lab:
            for host in lab.fleet.hosts.values():
                idle_image(host.images / "idle.qcow2")
            yield lab


@pytest.fixture(autouse=True)
def nothing_remains(lab: Lab) -> Iterator[None]:
    """After each test no host has anything left of its instances and snapshots."""
    yield
    for one in reversed(snapshots(lab.fleet.hosts["hosta"])):
        lab.done("snapshot_delete", snapshot=one.id)
    forget_all(lab)


@pytest.fixture
def taken(lab: Lab, name: str) -> str:
    """A snapshot on hosta of an instance with data on its disk."""
    idle(lab, name)
    return str(lab.done("snapshot", instance=name, operation_id=f"of-{name}")["id"])


def test_a_guest_boots_from_it_with_its_data_and_the_second_one_fetches_nothing(lab: Lab, name: str) -> None:
    writes: dict[str, Any] = {"user_data": TELL_AND_MARK + GOES_ON_WRITING, "memory_mib": 128, "disk_gib": 1}
    told: dict[str, Any] = {"wait_for": "console", "console_line": "told"}
    image = str(lab.fleet.hosts["hosta"].images / lab.image.name)
    lab.done("spawn", name=name, host="hosta", image=image, **writes, **told)
    for number in range(3):
        lab.done("snapshot", instance=name, incremental=True, operation_id=f"night-{number}")
    assert [one.parent for one in snapshots(lab.fleet.hosts["hosta"])] == [None, "night-0", "night-1"]

    tells: dict[str, Any] = {"user_data": TELL_AND_MARK, "memory_mib": 128, **told}
    made = lab.done("spawn", name="from-increment", host="hostb", image="snapshot:night-2", **tells)
    assert "mark-of-vda!" in lab.wait_told("hostb", made["uuid"], 1)
    holds_what(lab, made, "night-2")
    full = lab.done("spawn", name="from-full", host="hostb", image="snapshot:night-0", memory_mib=64)
    holds_what(lab, full, "night-0")

    before = received(lab.fleet.hosts["hosta"])
    again = lab.done("spawn", name="again", host="hostb", image="snapshot:night-2", memory_mib=64)
    assert received(lab.fleet.hosts["hosta"]) - before < MIB
    assert step(again, "fetch_image")["result"] == step(made, "fetch_image")["result"]


def holds_what(lab: Lab, record: dict[str, Any], snapshot: str) -> None:
    """An instance on hostb stands on an image that reads as the snapshot on hosta does, and nothing else is left."""
    found = next(one for one in snapshots(lab.fleet.hosts["hosta"]) if one.id == snapshot)
    base = Path(image_info(lab.folder("hostb", record["uuid"]) / "root.qcow2")["full-backing-filename"])
    assert base.parent == lab.fleet.hosts["hostb"].data / "images"
    assert "backing-filename" not in image_info(base)
    there = lab.fleet.hosts["hosta"].data / "snapshots" / found.id / found.disks[0].file
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", str(there), str(base))
    assert not [path for path in leftovers(lab, "hostb") if path.startswith("tmp/")]


def received(host: LabHost) -> int:
    """Bytes that have come from a host."""
    assert host.cable
    return host.cable.received()


def begin(lab: Lab, name: str, snapshot: str) -> str:
    """Have an instance made of it on hostb, and wait until some of it has arrived; the operation's id."""
    operation = f"making-{name}"
    wanted = {"name": f"{name}-b", "host": "hostb", "image": f"snapshot:{snapshot}", "memory_mib": 64}
    lab.scheduler.send("spawn", operation_id=operation, **wanted)
    wait_until(lambda: arrived(lab) > DATA_MIB * MIB // 3, 60, "a third of it has arrived")
    return operation


def arrived(lab: Lab) -> int:
    found = (lab.fleet.hosts["hostb"].data / "tmp").glob("*.part")
    return sum(path.stat().st_blocks * 512 for path in found)


def test_it_goes_on_where_a_killed_worker_left_off(lab: Lab, name: str, taken: str) -> None:
    before = received(lab.fleet.hosts["hosta"])
    operation = begin(lab, name, taken)
    wait_until(lambda: progress(lab, operation).get("done", 0) > 0, 10, "bytes are shown")
    told = progress(lab, operation)
    kill_workers(lab, "hostb", operation)
    record = ended(lab, operation)
    assert record["state"] == "succeeded", record["error"]
    assert told["done"] < DATA_MIB * MIB < told["total"] < 1.1 * DATA_MIB * MIB
    assert received(lab.fleet.hosts["hosta"]) - before < 1.2 * DATA_MIB * MIB
    assert domains(lab.fleet.hosts["hostb"]) == {f"{name}-b": True}
    holds_what(lab, record, taken)


def progress(lab: Lab, operation: str) -> dict[str, Any]:
    """What is shown of the fetch."""
    with lab.fleet.redis.client() as client:
        told = cast("str | None", client.hget(f"virtfleet:op:{operation}:progress", "fetch_image"))
    return cast("dict[str, Any]", json.loads(told or "{}"))


def test_three_spawns_at_once_fetch_it_once(lab: Lab, name: str, taken: str) -> None:
    before = received(lab.fleet.hosts["hosta"])
    wanted: dict[str, Any] = {"host": "hostb", "image": f"snapshot:{taken}", "memory_mib": 64}
    sent = [lab.scheduler.send("spawn", name=f"{name}-{number}", **wanted) for number in range(3)]
    for record in [one.get(timeout=120) for one in sent]:
        assert record["state"] == "succeeded", record["error"]
        holds_what(lab, record, taken)
    assert received(lab.fleet.hosts["hosta"]) - before < 1.2 * DATA_MIB * MIB


def test_cancelled_it_leaves_nothing(lab: Lab, name: str, taken: str) -> None:
    operation = begin(lab, name, taken)
    cancel(lab, "hostb", operation)
    assert ended(lab, operation)["state"] == "cancelled"
    assert leftovers(lab, "hostb") == []


def test_one_that_was_deleted_meanwhile_is_not_found_and_leaves_nothing(lab: Lab, name: str, taken: str) -> None:
    shutil.rmtree(lab.fleet.hosts["hosta"].data / "snapshots" / taken)  # the registry learns of it later
    record = lab.call("spawn", name=f"{name}-b", host="hostb", image=f"snapshot:{taken}", memory_mib=64)
    assert record["state"] in {"failed", "rejected"}
    assert record["error"]["code"] == "snapshot_not_found"
    assert leftovers(lab, "hostb") == []


@pytest.mark.thorough
def test_one_that_is_damaged_is_refused(lab: Lab, name: str, taken: str) -> None:
    [found] = snapshots(lab.fleet.hosts["hosta"])
    with (lab.fleet.hosts["hosta"].data / "snapshots" / taken / found.disks[0].file).open("r+b") as file:
        file.seek(DATA_MIB * MIB // 2)
        file.write(b"not what was here")
    record = lab.call("spawn", name=f"{name}-b", host="hostb", image=f"snapshot:{taken}", memory_mib=64)
    assert (record["state"], record["error"]["code"]) == ("failed", "snapshot_damaged")
    assert leftovers(lab, "hostb") == []


@pytest.mark.thorough
def test_a_host_that_is_away_is_waited_for(lab: Lab, name: str, taken: str) -> None:
    cable = lab.fleet.hosts["hosta"].cable
    assert cable
    operation = begin(lab, name, taken)
    cable.cut()
    try:
        wait_until(lambda: "transfer_interrupted" in lab.field(operation, "step:fetch_image:error"), 60, "it is told")
    finally:
        cable.plug()
    record = ended(lab, operation)
    assert record["state"] == "succeeded", record["error"]
    holds_what(lab, record, taken)
