"""One fleet for all tests of this folder; each test leaves it as it was, which is checked after each."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.parts import Commands, Record, Scheduler, WebServer, clear, idle_image, remains, snapshots, web_server
from tests.lab import Fleet, LabHost, guest_image, lab_folder

Spawn = Callable[..., Record]

_names = (f"guest-{number}" for number in itertools.count(1))


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    with lab_folder() as folder, Fleet(folder, ["hosta"]) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def host(fleet: Fleet) -> LabHost:
    return fleet.hosts["hosta"]


@pytest.fixture(scope="session")
def scheduler(fleet: Fleet) -> Scheduler:
    return Scheduler(fleet.redis.url)


@pytest.fixture(scope="session")
def command(fleet: Fleet) -> Iterator[Commands]:
    with closing(Commands(fleet)) as commands:
        yield commands


@pytest.fixture(scope="session")
def idle(host: LabHost) -> Path:
    """An image whose guests idle: for tests that need a running guest and nothing inside."""
    return idle_image(host.images / "idle.qcow2")


@pytest.fixture(scope="session")
def real(host: LabHost) -> Path:
    """An image with a Linux that boots in seconds, has an agent and hears the power button."""
    return Path(shutil.copy(guest_image(), host.images / "linux.qcow2"))


@pytest.fixture(scope="session")
def web() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_remains(fleet: Fleet) -> Iterator[None]:
    """After each test: no domain, file, claim, lease or entry of the registry is left."""
    yield
    left = remains(fleet)
    if left:
        clear(fleet)
    assert not left


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return next(_names)


@pytest.fixture
def wanted(name: str, idle: Path) -> dict[str, Any]:
    """A spawn with nothing wrong in it."""
    return {"name": name, "host": "hosta", "image": str(idle), "memory_mib": 64}


@pytest.fixture
def spawn(scheduler: Scheduler, idle: Path) -> Iterator[Spawn]:
    """Spawns instances, idle ones if nothing else is said; the final record. Destroyed when the test ends."""
    made: list[str] = []

    def spawn(**wanted: Any) -> Record:
        defaults: dict[str, Any] = {"name": next(_names), "host": "hosta", "image": str(idle), "memory_mib": 64}
        arguments = {**defaults, **wanted}
        made.append(str(arguments["name"]))
        return scheduler.call("spawn", **arguments)

    yield spawn
    for name in made:
        scheduler.call("destroy", instance=name)


@pytest.fixture
def snapshot(scheduler: Scheduler, spawn: Spawn, host: LabHost) -> Iterator[Spawn]:
    """Takes snapshots; the final record. Deleted when the test ends, the newest first."""

    def snapshot(instance: str, **wanted: Any) -> Record:
        return scheduler.call("snapshot", instance=instance, **wanted)

    yield snapshot
    for one in reversed(snapshots(host)):
        scheduler.call("snapshot_delete", snapshot=one.id)
