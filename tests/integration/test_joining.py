"""Hosts find their way into the registry, also when the first look at them fails."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.spawn import SpawnRequest
from tests.conftest import settings
from tests.lab import wait_until
from worker.compute import survey
from worker.engine import keys
from worker.engine.journal import Journal
from worker.engine.registry import HostRecord, registry
from worker.engine.worker import Heartbeat
from worker.errors import (
    BrokerUnavailable,
    FleetError,
    HostUnreachable,
    InstanceNotFound,
    SnapshotNotFound,
    UnknownHost,
)


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


def test_what_is_not_known_may_only_not_have_joined_again(journal: Journal) -> None:
    """Redis has lost its memory: to turn a request away for good, as one about nothing, would be wrong."""
    fleet = registry()
    looks: dict[Callable[[str], Any], type[FleetError]] = {
        fleet.require_host: UnknownHost,
        fleet.require: InstanceNotFound,
        fleet.require_snapshot: SnapshotNotFound,
    }
    for _ in range(2):
        for look in looks:
            with pytest.raises(BrokerUnavailable, match="'pet' is not known, but Redis knew nothing"):
                look("pet")
        fleet.settle("hosta")
        fleet.put_host(HostRecord(name="hosta", libvirt_uri="", data_dir=""))
    journal.redis.delete(keys.SETTLING)  # after some seconds
    for look, error in looks.items():
        with pytest.raises(error, match="pet"):
            look("pet")


def test_a_name_is_not_free_before_all_have_joined_again(journal: Journal) -> None:
    fleet, wanted = registry(), SpawnRequest(name="pet", host="hosta", image="/i")
    fleet.put_host(HostRecord(name="hosta", libvirt_uri="", data_dir=""))
    fleet.settle("hosta")
    with pytest.raises(BrokerUnavailable, match="'pet' is not known"):
        wanted.target(fleet, "op")
    journal.redis.delete(keys.SETTLING)
    assert wanted.target(fleet, "op").host == "hosta"


def test_a_guest_that_is_undefined_during_the_look_does_not_spoil_it() -> None:
    def vanished() -> Any:
        raise InstanceNotFound("no domain with matching uuid")

    # A stand-in for a connection: the real one would have to lose the guest between two particular calls.
    host: Any = SimpleNamespace(guests=lambda: [SimpleNamespace(owner=vanished)])
    local: Any = None
    assert survey.instances(local, host) == []
