"""Hosts find their way into the registry, also when the first look at them fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.conftest import settings
from tests.lab import wait_until
from worker.compute import survey
from worker.engine.journal import Journal
from worker.engine.worker import Heartbeat
from worker.errors import HostUnreachable, InstanceNotFound


def test_a_host_that_could_not_be_looked_at_is_looked_at_again_at_the_next_heartbeat(journal: Journal) -> None:
    looks: list[str] = []

    def introduce(host: str) -> None:
        looks.append(host)
        if len(looks) < 3:
            raise HostUnreachable(f"{host} does not answer")

    with settings(heartbeat_interval=0.1):
        heartbeat = Heartbeat(["hosta"], "disk", introduce)
        heartbeat.start()
        try:
            wait_until(lambda: len(looks) == 3, 10, "the host is looked at until it answers")
        finally:
            heartbeat.stop()
            heartbeat.join(10)
    assert looks == ["hosta"] * 3, "once it has answered, the next look is not due for a minute"


def test_a_guest_that_is_undefined_during_the_look_does_not_spoil_it() -> None:
    def vanished() -> Any:
        raise InstanceNotFound("no domain with matching uuid")

    # A stand-in for a connection: the real one would have to lose the guest between two particular calls.
    host: Any = SimpleNamespace(guests=lambda: [SimpleNamespace(owner=vanished)])
    local: Any = None
    assert survey.instances(local, host) == []
