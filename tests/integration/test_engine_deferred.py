"""Requests that the fleet submits later itself: when they are due, once, and without harm if they cannot be."""

from __future__ import annotations

import time
from uuid import uuid4

from worker.engine import deferred, keys
from worker.engine.journal import Journal
from worker.engine.record import State
from worker.engine.registry import HostRecord, registry
from worker.models import Instance, Move, PowerState

KIND = "virtfleet.power_on"


def known(name: str) -> dict[str, str]:
    registry().put(Instance(name=name, uuid=uuid4(), host="hosta", power=PowerState.OFF))
    return {"instance": name}


def test_a_request_is_submitted_when_it_is_due_and_not_before(journal: Journal) -> None:
    deferred.defer("op-later", KIND, known("web"), 0.5)
    deferred.submit_due(journal.redis, 10)
    assert journal.find("op-later") is None
    time.sleep(0.6)
    deferred.submit_due(journal.redis, 10)
    assert journal.read("op-later").state is State.QUEUED
    assert journal.read("op-later").request["instance"] == "web"


def test_asking_twice_or_dying_in_between_submits_it_once(journal: Journal) -> None:
    request = known("web")
    for _ in range(2):
        deferred.defer("op-once", KIND, request, 0.0)
        deferred.submit_due(journal.redis, 10)
    assert len(journal.latest(10)) == 1
    assert journal.read("op-once").state is State.QUEUED


def test_one_that_is_forgotten_is_not_submitted(journal: Journal) -> None:
    deferred.defer("op-never", KIND, known("web"), 0.0)
    deferred.forget("op-never")
    deferred.submit_due(journal.redis, 10)
    assert journal.find("op-never") is None


def test_many_that_are_due_do_not_keep_the_reaper_from_operations_that_stand_still(journal: Journal) -> None:
    for number in range(5):
        deferred.defer(f"op-{number}", KIND, known(f"web-{number}"), 0.0)
    assert deferred.submit_due(journal.redis, 10, seconds=0.0), "some are left for the next tick"
    assert [record.id for record in journal.latest(10)] == ["op-0"]
    while deferred.submit_due(journal.redis, 10, seconds=0.0):
        pass
    assert {record.id for record in journal.latest(10)} == {f"op-{number}" for number in range(5)}


def test_one_that_is_turned_away_does_not_hold_up_the_others(journal: Journal) -> None:
    deferred.defer("op-wrong", KIND, {"instance": "nobody"}, 0.0)
    deferred.defer("op-right", KIND, known("web"), 0.0)
    deferred.submit_due(journal.redis, 10)  # no host has joined yet
    assert journal.find("op-wrong") is None
    assert journal.read("op-right").state is State.QUEUED
    registry().put_host(HostRecord(name="hosta", libvirt_uri="", data_dir=""))
    deferred.submit_due(journal.redis, 10)
    assert journal.read("op-wrong").state is State.REJECTED


def test_one_that_this_version_does_not_know_is_put_off_and_holds_up_nobody(journal: Journal) -> None:
    deferred.defer("op-strange", KIND, {**known("db"), "no_such_field": 1}, 0.0)
    deferred.defer("op-unknown", "virtfleet.nosuch", {}, 0.0)
    deferred.defer("op-right", KIND, known("web"), 0.0)
    deferred.submit_due(journal.redis, 10)
    assert journal.read("op-right").state is State.QUEUED
    assert journal.redis.zrange(keys.DEFERRED, 0, -1) == ["op-strange", "op-unknown"]


def test_a_confirmation_waits_for_the_host_that_was_left(journal: Journal) -> None:
    move = Move(operation="op-move", authoritative="hosta", leftover="hostb", shared=False)
    uuid = uuid4()
    registry().put(Instance(name="web", uuid=uuid, host="hosta", power=PowerState.OFF, move=move))
    deferred.defer("op-confirm", "virtfleet.confirm", {"instance": "web"}, 0.0)
    deferred.submit_due(journal.redis, 10)
    assert journal.find("op-confirm") is None, "the instance is not kept busy by a host that is away"
    assert journal.redis.zcount(keys.DEFERRED, journal.now(), "+inf") == 1
    registry().heartbeat("hostb", "disk", {})
    journal.redis.zadd(keys.DEFERRED, {"op-confirm": 0})
    deferred.submit_due(journal.redis, 10)
    assert journal.read("op-confirm").state is State.QUEUED
