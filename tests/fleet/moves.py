"""Instances that are moved between real hosts, as tests make them, look at them, and disturb them."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.instances import Lab, domains
from tests.lab import wait_until

MIB = 1024**2
DATA_MIB = 48
FORCE = {"timeout": 0}
"""No guest of these tests listens to a power button."""


@pytest.fixture(autouse=True)
def nothing_remains(lab: Lab) -> Iterator[None]:
    """After each test no host has anything left of its instances."""
    yield
    forget_all(lab)


def forget_all(lab: Lab) -> None:
    """Destroy all instances; then no host may have anything left of them."""
    for name, one in lab.instances().items():
        if one["move"]:
            lab.done("confirm", instance=name)
        lab.done("destroy", instance=name, wait_if_busy=True)
    hosts = lab.fleet.hosts
    assert {name: domains(host) for name, host in hosts.items()} == {name: {} for name in hosts}
    assert {name: leftovers(lab, name) for name in hosts} == {name: [] for name in hosts}


def leftovers(lab: Lab, host: str) -> list[str]:
    data = lab.fleet.hosts[host].data
    return sorted(str(path.relative_to(data)) for kind in ("instances", "tmp") for path in (data / kind).glob("*"))


def idle(lab: Lab, name: str, **options: Any) -> str:
    """An instance whose guest does nothing, with data on its disks; its uuid."""
    image = str(lab.fleet.hosts["hosta"].images / "idle.qcow2")
    record = lab.done("spawn", name=name, host="hosta", image=image, memory_mib=64, **{"disk_gib": 1, **options})
    uuid = str(record["uuid"])
    lab.done("power_off", instance=name, **FORCE)
    for disk in disks(lab.folder("hosta", uuid)):
        write(disk, DATA_MIB)
    lab.done("power_on", instance=name)
    return uuid


def disks(folder: Path) -> list[Path]:
    """Those that hold data."""
    return sorted([*folder.glob("root.*"), *folder.glob("ephemeral*.qcow2")])


def write(disk: Path, mib: int) -> None:
    """Put random data on a disk of a guest that is off."""
    form, random = disk.suffix.removeprefix("."), disk.with_name("random")
    subprocess.run(["dd", "if=/dev/urandom", f"of={random}", "bs=1M", f"count={mib}", "status=none"], check=True)
    write = f"write -q -s {random} 1M {mib}M"
    subprocess.run(["qemu-io", "-f", form, "-c", write, str(disk)], check=True, capture_output=True)
    random.unlink()


def contents(folder: Path) -> dict[str, str]:
    """What a guest reads from the beginning of each disk, where its data is."""
    found = {}
    for disk in disks(folder):
        flat, form = disk.with_name("flat"), disk.suffix.removeprefix(".")
        subprocess.run(["qemu-img", "convert", "-U", "-f", form, "-O", "raw", str(disk), str(flat)], check=True)
        with flat.open("rb") as file:
            found[disk.name] = hashlib.blake2b(file.read((DATA_MIB + 2) * MIB)).hexdigest()
        flat.unlink()
    return found


def ended(lab: Lab, operation: str, timeout: float = 240) -> dict[str, Any]:
    """The record of an operation once it is over."""
    wait_until(lambda: lab.field(operation, "ended_at"), timeout, f"{operation} ends")
    return lab.run("operation", operation).record


def begin(lab: Lab, name: str, to: str = "hostb", **options: Any) -> str:
    """Have an instance moved; the operation's id."""
    operation = f"moving-{name}"
    lab.scheduler.send("migrate", instance=name, to=to, operation_id=operation, **FORCE, **options)
    wait_until(lambda: lab.field(operation, "state"), 30, f"{operation} is admitted")
    return operation


def step(record: dict[str, Any], key: str) -> dict[str, Any]:
    """A step of a record."""
    return next(one for one in record["steps"] if one["key"] == key)


def runs_at_home_as_before(lab: Lab, name: str, uuid: str, before: dict[str, str]) -> None:
    """Also: nothing is left on any other host."""
    assert {host: domains(one) for host, one in lab.fleet.hosts.items() if domains(one)} == {"hosta": {name: True}}
    assert contents(lab.folder("hosta", uuid)) == before
    left = {host: leftovers(lab, host) for host in lab.fleet.hosts}
    assert left == {host: [f"instances/{uuid}"] if host == "hosta" else [] for host in lab.fleet.hosts}
    assert (lab.instances()[name]["host"], lab.instances()[name]["move"]) == ("hosta", None)


def unmarked(xml: str) -> list[str]:
    """A definition without what says whose it is."""
    return [line for line in xml.splitlines() if "virtfleet:instance" not in line]


def arrived(folder: Path) -> int:
    """Bytes of the root disk that have come over ssh."""
    return sum(path.stat().st_size for path in folder.glob(".root.qcow2.*.part")) if folder.exists() else 0


def kill_workers(lab: Lab, host: str, operation: str) -> None:
    """SIGKILL a host's workers, and start them again."""
    for kind in ("control", "disk"):
        worker = lab.fleet.worker(host, kind)
        worker.kill9()
        worker.start()


def kill_all_workers(lab: Lab, host: str, operation: str) -> None:
    """SIGKILL the workers of every host, and start them again."""
    for each in lab.fleet.hosts:
        kill_workers(lab, each, operation)


def kill_redis(lab: Lab, host: str, operation: str) -> None:
    """SIGKILL Redis, and start it again."""
    lab.fleet.redis.kill9()
    lab.fleet.redis.start()


def kill_libvirtd(lab: Lab, host: str, operation: str) -> None:
    """SIGKILL a host's libvirtd, and start it again."""
    lab.fleet.hosts[host].libvirtd_kill9()
    time.sleep(1)
    lab.fleet.hosts[host].libvirtd_start()


def cancel(lab: Lab, host: str, operation: str) -> None:
    """Ask for the operation to be taken back."""
    lab.scheduler.app.send_task("virtfleet.cancel", kwargs={"operation_id": operation}, queue="virtfleet")
