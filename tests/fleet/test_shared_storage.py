"""Hosts that have the same storage: nothing is copied between them, and there is never a second copy to lose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.instances import Lab, domains, lab_of
from tests.fleet.parts import idle_image
from tests.lab import Fleet, lab_folder, wait_until

FORCE = {"timeout": 0}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    def share(fleet: Fleet) -> None:
        fleet.hosts["hostb"].data = fleet.hosts["hosta"].data

    with lab_folder() as folder, lab_of(folder, "hosta", "hostb", networked=True, before=share) as lab:
        idle_image(lab.fleet.hosts["hosta"].images / "idle.qcow2")
        yield lab


@pytest.fixture(autouse=True)
def nothing_remains(lab: Lab) -> Iterator[None]:
    """After each test neither host has anything left."""
    yield
    for name, one in lab.instances().items():
        if one["move"]:
            lab.done("confirm", instance=name)
        lab.done("destroy", instance=name)
    assert [domains(host) for host in lab.fleet.hosts.values()] == [{}, {}]
    assert list((lab.fleet.hosts["hosta"].data / "instances").iterdir()) == []


def spawned(lab: Lab, name: str) -> Path:
    image = str(lab.fleet.hosts["hosta"].images / "idle.qcow2")
    record = lab.done("spawn", name=name, host="hosta", image=image, memory_mib=64, ephemeral_gib=[1])
    return lab.folder("hosta", str(record["uuid"]))


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.qcow2")}


def where(lab: Lab, name: str) -> dict[str, bool | None]:
    return {host: domains(one).get(name) for host, one in lab.fleet.hosts.items()}


def test_confirm_keeps_the_one_copy(lab: Lab) -> None:
    folder = spawned(lab, "confirmed")
    before = inodes(folder)
    lab.done("migrate", instance="confirmed", to="hostb", **FORCE)
    assert where(lab, "confirmed") == {"hosta": None, "hostb": True}
    assert lab.instances()["confirmed"]["move"]["shared"] is True
    lab.done("confirm", instance="confirmed")
    found = {one["where"]: one for one in lab.run("doctor", "--json").record["findings"]}
    told = found[str(folder)]
    assert (told["code"], told["severity"]) == ("files_of_another_host", "info")
    assert "is on host hostb" in told["what"]
    assert "rm " not in told["remedy"], "its guest runs on these very files"
    assert where(lab, "confirmed") == {"hosta": None, "hostb": True}
    assert inodes(folder) == before
    assert not list(folder.glob(".handover.*"))


@pytest.mark.thorough
def test_a_revert_starts_it_where_it_was(lab: Lab) -> None:
    folder = spawned(lab, "reverted")
    before = inodes(folder)
    lab.done("migrate", instance="reverted", to="hostb", **FORCE)
    lab.done("revert", instance="reverted", **FORCE)
    assert where(lab, "reverted") == {"hosta": True, "hostb": None}
    assert inodes(folder) == before
    assert lab.instances()["reverted"]["host"] == "hosta"
    wait_until(lambda: lab.instances()["reverted"]["move"] is None, 60, "it is settled")
    lab.done("power_off", instance="reverted", wait_if_busy=True, **FORCE)


@pytest.mark.thorough
def test_a_move_that_fails_at_its_end_leaves_it_running_where_it_was(lab: Lab) -> None:
    folder = spawned(lab, "failing")
    before = inodes(folder)
    late = {"wait_for": "console", "console_line": "never said", "ready_timeout": 1}
    record = lab.call("migrate", instance="failing", to="hostb", **late, **FORCE)
    assert (record["state"], record["error"]["code"]) == ("failed", "guest_not_ready")
    assert where(lab, "failing") == {"hosta": True, "hostb": None}
    assert inodes(folder) == before


def test_new_sizes_are_refused_before_anything_is_touched(lab: Lab) -> None:
    spawned(lab, "resized")
    record = lab.call("migrate", instance="resized", to="hostb", vcpus=2, **FORCE)
    assert record["error"]["code"] == "invalid_spec"
    assert where(lab, "resized") == {"hosta": True, "hostb": None}


def test_a_snapshot_that_both_see_is_read_where_it_lies(lab: Lab) -> None:
    spawned(lab, "original")
    lab.done("snapshot", instance="original", operation_id="seen-by-both", disks=["vda"])
    cable = lab.fleet.hosts["hosta"].cable
    assert cable
    cable.cut()
    try:
        lab.done("spawn", name="twin", host="hostb", image="snapshot:seen-by-both", memory_mib=64)
    finally:
        cable.plug()
    assert where(lab, "twin") == {"hosta": None, "hostb": True}
    lab.done("snapshot_delete", snapshot="seen-by-both")
