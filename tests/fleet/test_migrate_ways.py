"""Other ways to move between three real hosts: over NBD, flattened, one after the other, off, paused, by UEFI."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings
from tests.fleet.instances import Lab, domain, domains, lab_of
from tests.fleet.moves import (
    DATA_MIB,
    FORCE,
    MIB,
    arrived,
    begin,
    cancel,
    contents,
    disks,
    ended,
    forget_all,
    idle,
    kill_libvirtd,
    kill_workers,
    leftovers,
    nothing_remains,  # noqa: F401 - after each test
    runs_at_home_as_before,
    step,
)
from tests.fleet.parts import Page, idle_image, image_info, web_server
from tests.lab import Fleet, lab_folder, wait_until

pytestmark = pytest.mark.thorough

HOSTS = ("hosta", "hostb", "hostc")
NBD = {"transport": "nbd"}
SMALL_MIB = 700


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three hosts; hostc has a small file system of its own for its data."""
    with lab_folder() as folder:
        small = folder / "hostc" / "data"

        def mount(_: Fleet) -> None:
            small.mkdir(parents=True)
            small.parent.chmod(0o755)
            options = f"size={SMALL_MIB}m,mode=755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)], check=True)

        try:
            with lab_of(folder, *HOSTS, networked=True, before=mount) as lab:
                for host in lab.fleet.hosts.values():
                    idle_image(host.images / "idle.qcow2")
                yield lab
                subprocess.run(["umount", "-l", str(small)], check=True)
        finally:
            subprocess.run(["umount", "-l", str(small)], check=False, capture_output=True)


@pytest.mark.parametrize("root", ["overlay", "copy", "raw"])
def test_over_nbd_all_of_it_arrives(lab: Lab, name: str, root: str) -> None:
    uuid = idle(lab, name, root_disk=root, ephemeral_gib=[1], swap_mib=16)
    before = contents(lab.folder("hosta", uuid))
    record = lab.done("migrate", instance=name, to="hostb", **NBD, **FORCE)
    assert step(record, "lend:disks")["state"] == "done"
    assert contents(lab.folder("hostb", uuid)) == before
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    for disk in disks(lab.folder("hostb", uuid)):
        there = lab.folder("hosta", f"{uuid}_resize") / disk.name
        assert disk.stat().st_blocks <= 1.02 * there.stat().st_blocks
    assert not servers()
    lab.done("confirm", instance=name)
    assert leftovers(lab, "hosta") == []


def servers() -> list[str]:
    """The NBD servers that run on this machine's hosts."""
    wanted = ["pgrep", "-af", "qemu-storage-daemon"]
    found = subprocess.run(wanted, check=False, capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "/vf-" in line]


def test_over_nbd_a_cut_cable_is_survived_without_sending_again_what_has_arrived(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    cable = lab.fleet.hosts["hosta"].cable
    assert cable
    before, size = contents(lab.folder("hosta", uuid)), lab.folder("hosta", uuid).joinpath("root.qcow2").stat().st_size
    operation, part = begin(lab, name, bandwidth_mib=8, **NBD), lab.folder("hostb", uuid)
    wait_until(lambda: proven(part) > size // 2, 120, "half of it has arrived")
    cable.cut()
    time.sleep(3)
    received, have = cable.received(), proven(part)
    time.sleep(22)
    cable.plug()
    record = ended(lab, operation)
    assert record["state"] == "succeeded", record["error"]
    assert step(record, "copy_disk:root.qcow2")["attempt"] > 1
    assert contents(lab.folder("hostb", uuid)) == before
    assert cable.received() - received < 1.02 * (size - have) + 0.05 * have


@pytest.mark.parametrize("transport", ["ssh", "nbd"])
def test_a_killed_worker_is_survived_without_sending_again_what_has_arrived(
    lab: Lab, name: str, transport: str
) -> None:
    uuid = idle(lab, name)
    here = {"ssh": arrived, "nbd": proven}[transport]
    cable = lab.fleet.hosts["hosta"].cable
    assert cable
    before, size = contents(lab.folder("hosta", uuid)), lab.folder("hosta", uuid).joinpath("root.qcow2").stat().st_size
    operation, part = begin(lab, name, bandwidth_mib=8, transport=transport), lab.folder("hostb", uuid)
    wait_until(lambda: here(part) > size // 2, 120, "half of it has arrived")
    worker = lab.fleet.worker("hostb", "disk")
    worker.kill9()
    time.sleep(1)
    received, have = cable.received(), here(part)
    worker.start()
    record = ended(lab, operation)
    assert record["state"] == "succeeded", record["error"]
    assert step(record, "copy_disk:root.qcow2")["attempt"] > 1
    assert contents(lab.folder("hostb", uuid)) == before
    assert cable.received() - received < 1.02 * (size - have) + 0.05 * have


def proven(folder: Path) -> int:
    """Bytes of the root disk that have come over NBD, and whose sums are noted."""
    notes = folder.glob(".root.qcow2.*.part.sums") if folder.exists() else []
    return sum(path.stat().st_size // 32 * MIB for path in notes)


NBD_STEPS = [
    ("prepare_destination", "hosta"),
    ("prepare_destination", "hostb"),
    ("copy_disk:root.qcow2", "hosta"),
    ("copy_disk:root.qcow2", "hostb"),
    ("verify_disks", "hosta"),
]


@pytest.mark.thorough
@pytest.mark.parametrize("fault", [kill_workers, kill_libvirtd, cancel])
@pytest.mark.parametrize(("key", "host"), NBD_STEPS)
def test_over_nbd_whatever_happens_the_guest_runs_on_one_host_with_its_data(
    lab: Lab, name: str, key: str, host: str, fault: Callable[[Lab, str, str], None]
) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    operation = begin(lab, name, bandwidth_mib=16, **NBD)
    wait_until(lambda: lab.field(operation, f"step:{key}:state") in ("running", "done", "failed"), 60, f"{key} begins")
    fault(lab, host, operation)
    record = ended(lab, operation)
    assert not servers()
    if record["state"] == "cancelled" or (record["state"] == "failed" and fault is not cancel):
        runs_at_home_as_before(lab, name, uuid, before)
        return
    assert record["state"] == "succeeded", json.dumps(record["error"], indent=1)
    assert domains(lab.fleet.hosts["hosta"]) == {name: False}
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    assert contents(lab.folder("hostb", uuid)) == before


@pytest.mark.parametrize("transport", ["ssh", "nbd"])
def test_flattened_it_needs_its_image_no_more(lab: Lab, name: str, transport: str) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    assert image_info(lab.folder("hosta", uuid) / "root.qcow2")["backing-filename"]
    lab.succeed("migrate", name, "--to", "hostb", "--flatten", "--transport", transport, "--timeout", "0")
    assert "backing-filename" not in image_info(lab.folder("hostb", uuid) / "root.qcow2")
    assert contents(lab.folder("hostb", uuid)) == before
    assert not list(lab.folder("hosta", f"{uuid}_resize").glob(".root*"))
    lab.done("revert", instance=name, **FORCE)
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "the other copy goes")
    runs_at_home_as_before(lab, name, uuid, before)
    assert image_info(lab.folder("hosta", uuid) / "root.qcow2")["backing-filename"]


def forget_image(lab: Lab, host: str) -> None:
    """Empty a host's image cache."""
    for path in (lab.fleet.hosts[host].data / "images").rglob("*"):
        if path.is_file():
            path.unlink()


def base_notes(record: dict[str, Any]) -> str:
    return " ".join(step(record, "prepare_destination")["result"]["notes"])


def test_the_base_comes_from_the_cache_else_its_address_else_the_other_host(lab: Lab, name: str) -> None:
    image = idle_image(lab.fleet.hosts["hosta"].images / "served.qcow2")
    with web_server() as web:
        url = web.put("/idle.qcow2", page := Page(image.read_bytes()))
        spec = {"name": name, "host": "hosta", "image": url, "memory_mib": 64}
        lab.done("spawn", **spec)
        moves = [("hostb", "where it was once fetched"), ("hosta", "was here")]
        for to, wanted in moves:
            if to == "hostb":
                forget_image(lab, "hostb")
            record = lab.done("migrate", instance=name, to=to, auto_confirm=True, **FORCE)
            assert wanted in base_notes(record)
            wait_until(lambda: lab.instances()[name]["move"] is None, 60, "it is confirmed by itself")
        forget_image(lab, "hostb")
        web.put("/idle.qcow2", Page(page.body[::-1], etag='"2"'))  # replaced by something else since
        record = lab.done("migrate", instance=name, to="hostb", auto_confirm=True, **FORCE)
        assert "came from host hosta" in base_notes(record)
        assert domains(lab.fleet.hosts["hostb"]) == {name: True}
        wait_until(lambda: lab.instances()[name]["move"] is None, 60, "it is confirmed by itself")


def test_without_its_base_the_disk_comes_flattened(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    forget_image(lab, "hostb")
    base = Path(image_info(lab.folder("hosta", uuid) / "root.qcow2")["full-backing-filename"])
    sound = base.read_bytes()
    base.chmod(0o644)
    base.write_bytes(sound + bytes(512))  # not what its name says any more, though the guest reads the same
    try:
        record = lab.done("migrate", instance=name, to="hostb", **FORCE)
    finally:
        base.write_bytes(sound)
        base.chmod(0o444)
    assert "comes without one" in base_notes(record)
    assert "backing-filename" not in image_info(lab.folder("hostb", uuid) / "root.qcow2")
    assert contents(lab.folder("hostb", uuid)) == before
    forget_image(lab, "hosta")


@pytest.mark.parametrize("state", ["off", "paused"])
def test_a_guest_does_afterwards_what_it_did_before(lab: Lab, name: str, state: str) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    lab.done("power_off" if state == "off" else "pause", instance=name, **(FORCE if state == "off" else {}))
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    assert lab.instances()[name]["power"] == state
    assert domains(lab.fleet.hosts["hostb"]) == {name: state == "paused"}
    assert contents(lab.folder("hostb", uuid)) == before
    lab.done("revert", instance=name, **FORCE)
    assert (lab.instances()[name]["host"], lab.instances()[name]["power"]) == ("hosta", state)
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "the other copy goes")


def test_checkpoints_stay_behind_and_that_is_told(lab: Lab, name: str) -> None:
    idle(lab, name)
    with domain(lab.fleet.hosts["hosta"], name) as found:
        found.checkpointCreateXML("<domaincheckpoint><name>daily</name></domaincheckpoint>")
    record = lab.done("migrate", instance=name, to="hostb", **FORCE)
    assert "checkpoint daily is not taken along" in record["result"]["note"]
    with domain(lab.fleet.hosts["hostb"], name) as found:
        assert found.listAllCheckpoints() == []


@pytest.mark.parametrize("transport", ["ssh", "nbd"])
def test_what_uefi_keeps_goes_with_the_guest_and_back(lab: Lab, name: str, transport: str) -> None:
    image = str(lab.fleet.hosts["hosta"].images / "idle.qcow2")
    uuid = lab.done("spawn", name=name, host="hosta", image=image, memory_mib=128, firmware="efi")["uuid"]
    lab.done("power_off", instance=name, **FORCE)
    variables = lab.folder("hosta", uuid) / "nvram.fd"
    with variables.open("r+b") as file:  # at the very end of the flash, where nothing is
        file.seek(-16, 2)
        file.write(b"what UEFI keeps!")
    before = variables.read_bytes()
    lab.done("migrate", instance=name, to="hostb", transport=transport, **FORCE)
    assert (lab.folder("hostb", uuid) / "nvram.fd").read_bytes() == before
    lab.done("power_on", instance=name)
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    lab.done("revert", instance=name, **FORCE)
    assert variables.read_bytes() == before
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "the other copy goes")
    lab.done("migrate", instance=name, to="hostb", auto_confirm=True, **FORCE)
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "it is confirmed by itself")
    assert (lab.folder("hostb", uuid) / "nvram.fd").read_bytes() == before


def test_from_host_to_host_to_host_and_home_again(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    for to in ("hostb", "hostc", "hosta"):
        lab.done("migrate", instance=name, to=to, **FORCE)
        lab.done("confirm", instance=name)
        assert {host: domains(one) for host, one in lab.fleet.hosts.items() if domains(one)} == {to: {name: True}}
        assert contents(lab.folder(to, uuid)) == before


def test_several_moves_at_once_keep_to_the_slots(lab: Lab, name: str) -> None:
    names = [f"{name}-{number}" for number in range(3)]
    uuids = {name: idle(lab, name) for name in names}
    before = {name: contents(lab.folder("hosta", uuid)) for name, uuid in uuids.items()}
    targets = dict(zip(names, ("hostb", "hostc", "hostb"), strict=True))
    operations = [begin(lab, name, to, bandwidth_mib=24) for name, to in targets.items()]
    most = 0
    while not all(lab.field(operation, "ended_at") for operation in operations):
        most = max(most, sending(lab))
        time.sleep(0.1)
    records = [ended(lab, operation) for operation in operations]
    assert [record["error"] for record in records] == [None] * 3
    assert 1 <= most <= 2
    for goer, to in targets.items():
        assert contents(lab.folder(to, uuids[goer])) == before[goer]


def sending(lab: Lab) -> int:
    """How many copies hosta sends right now, by the slots that are held."""
    locked = {line.split()[5].rpartition(":")[2] for line in Path("/proc/locks").read_text().splitlines()}
    slots = lab.fleet.hosts["hosta"].data.glob(".outgoing-*.lock")
    return sum(str(slot.stat().st_ino) in locked for slot in slots)


@pytest.mark.parametrize("transport", ["ssh", "nbd"])
def test_a_destination_that_fills_up_gives_the_guest_back(lab: Lab, name: str, transport: str) -> None:
    uuid = idle(lab, name)
    before, data = contents(lab.folder("hosta", uuid)), lab.fleet.hosts["hostc"].data
    operation = begin(lab, name, "hostc", transport=transport, bandwidth_mib=8)
    wait_until(lambda: coming(data / "instances" / uuid) > DATA_MIB * MIB // 4, 120, "some of it has arrived")
    filler = data / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], check=False, capture_output=True)
    try:
        record = ended(lab, operation)
    finally:
        filler.unlink()
    assert (record["state"], record["error"]["code"]) == ("failed", "no_space")
    runs_at_home_as_before(lab, name, uuid, before)


def coming(folder: Path) -> int:
    parts = folder.glob(".root.qcow2.*.part") if folder.exists() else []
    return sum(path.stat().st_blocks * 512 for path in parts)


def test_a_move_that_is_to_be_confirmed_by_itself_is_so_though_redis_has_forgotten(name: str) -> None:
    with settings(confirm_after=15), lab_folder() as folder, lab_of(folder, *HOSTS[:2], networked=True) as lab:
        idle_image(lab.fleet.hosts["hosta"].images / "idle.qcow2")
        uuid = idle(lab, name)
        lab.done("migrate", instance=name, to="hostb", **FORCE)
        lab.fleet.redis.flushall()
        wait_until(lambda: lab.instances().get(name, {}).get("move"), 60, "hostb is known again")
        assert lab.folder("hosta", f"{uuid}_resize").exists(), "it is not time yet"
        wait_until(lambda: lab.instances()[name]["move"] is None, 60, "it is confirmed")
        assert leftovers(lab, "hosta") == []
        forget_all(lab)
