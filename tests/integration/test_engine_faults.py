"""Whatever dies in the middle of a step, the operation finishes, and no step is ever executed by two at a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.integration import engine_tasks as tasks
from tests.integration.conftest import PATIENCE, EngineFleet, Events
from tests.lab.process import kill9, lab_folder, wait_until
from worker.engine import keys
from worker.engine.intervention import cancel
from worker.engine.operation import new_id, submit
from worker.engine.record import Record, State
from worker.engine.registry import registry
from worker.errors import BrokerUnavailable

BUSY = 3.0
"""Seconds that a step works: longer than a lease lasts (2 s)."""


def begin(kind: type[tasks.Asked], events: Events, **fields: Any) -> Record:
    """Submit an operation on an instance of its own, and wait until its long step is at work."""
    request = kind(**{"log": str(events.path), "name": new_id(), "seconds": BUSY, **fields})
    record = submit(request)
    events.wait("tick")
    return record


def require_succeeded(fleet: EngineFleet, events: Events, record: Record) -> Record:
    """It ended well, each step to its end once, and the instance is free again."""
    ended = fleet.ended(record.id)
    assert (ended.state, ended.error) == (State.SUCCEEDED, None)
    assert sorted(line["step"] for line in events.lines("end")) == sorted(ended.steps)
    assert events.undone() == []
    events.require_no_overlap()
    assert fleet.journal.redis.exists(keys.claim(record.instance)) == 0
    assert fleet.journal.redis.zscore(keys.ATTENTION, record.id) is None
    return ended


# --- workers die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "control"])
def test_a_step_goes_on_after_its_worker_was_killed(kind: Any, fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest if kind == "disk" else tasks.CallRequest, events)
    fleet.workers[kind].kill9()
    fleet.heal()
    ended = require_succeeded(fleet, events, record)
    (long_step,) = (step for step in ended.steps.values() if step.key.startswith("test."))
    assert long_step.attempt == 2


@pytest.fixture(scope="module")
def patient() -> Iterator[EngineFleet]:
    """A fleet whose leases live longer than any test waits."""
    with lab_folder() as folder:
        fleet = EngineFleet(folder)
        fleet.settings["lease_ttl"] = 10 * PATIENCE
        with fleet, fleet.in_use():
            yield fleet


@pytest.mark.parametrize("kind", ["disk", "control"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_successor_does_not_wait_for_the_leases_of_who_died(
    kind: Any, cancelled: bool, patient: EngineFleet, events: Events
) -> None:
    record = begin(tasks.ChainRequest if kind == "disk" else tasks.CallRequest, events)
    patient.workers[kind].kill9()
    if cancelled:
        cancel(record.id)
    patient.heal()
    if not cancelled:
        require_succeeded(patient, events, record)
        return
    assert patient.ended(record.id).state is State.CANCELLED
    events.require_no_overlap()


def test_a_step_goes_on_after_its_pool_process_was_killed(fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest, events)
    kill9(events.lines("tick")[0]["pid"])
    ended = require_succeeded(fleet, events, record)
    assert ended.steps["test.copy"].attempt == 2
    assert fleet.workers["disk"].alive


def test_the_deaths_of_a_worker_spend_no_attempts(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(tasks.KilledRequest(log=str(events.path), name=new_id()))
    step = record.steps["test.killed"]
    assert (record.state, step.result, step.lost) == (State.SUCCEEDED, 4, 2)


def test_a_worker_that_was_frozen_does_not_work_beside_its_successor(fleet: EngineFleet, events: Events) -> None:
    """Its lease runs out; the operation is cancelled and undone; then it wakes up, and must change nothing."""
    record = begin(tasks.ChainRequest, events, seconds=30)
    worker = fleet.workers["disk"]
    pids = [worker.pid, *worker.children()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        cancel(record.id)
        assert fleet.ended(record.id).state is State.CANCELLED
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    woken = time.monotonic()
    events.wait("end", "test.copy")
    assert events.lines("end", "test.copy")[0]["at"] - woken < 2
    ended = fleet.journal.read(record.id)
    assert ended.state is State.CANCELLED
    assert events.undone() == ["test.copy"]


def test_a_cancel_is_carried_out_when_the_worker_has_died(fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest, events, seconds=30)
    fleet.workers["disk"].kill9()
    cancel(record.id)
    assert fleet.ended(record.id).state is State.CANCELLED
    assert events.undone() == ["test.copy"]
    assert events.begun() == ["before", "test.copy"]


# --- Redis dies ---------------------------------------------------------------------------------------------------


def test_redis_is_killed_for_longer_than_a_lease_lasts(fleet: EngineFleet, tmp_path: Path) -> None:
    kinds = [tasks.ChainRequest, tasks.GroupRequest, tasks.AskRequest]
    logs = [Events(tmp_path / kind.__name__) for kind in kinds]
    records = [
        submit(kind(log=str(log.path), name=new_id(), seconds=BUSY)) for kind, log in zip(kinds, logs, strict=True)
    ]
    for log, step in zip(logs, ["test.copy", "copy-1", "test.ask"], strict=True):
        log.wait("begin", step)
    fleet.redis.kill9()
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 2.2, 5, "the leases have run out")
    fleet.redis.start()
    for log, record in zip(logs[:2], records[:2], strict=True):
        assert {step.attempt for step in require_succeeded(fleet, log, record).steps.values()} == {1}
    asking = fleet.ended(records[2].id)
    assert asking.state is State.SUCCEEDED
    assert asking.steps["test.ask"].attempt > 1, "its work needs Redis: it is tried again, and not given up"
    logs[2].require_no_overlap()


def test_redis_is_away_as_a_step_ends(fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest, events, seconds=1)
    fleet.redis.kill9()
    killed = time.monotonic()
    assert events.wait("end", "test.copy")["at"] - killed < 5, "the work goes on meanwhile"
    with pytest.raises(BrokerUnavailable):
        cancel(record.id)
    fleet.redis.start()
    assert {step.attempt for step in require_succeeded(fleet, events, record).steps.values()} == {1}


def test_a_scheduler_that_asks_again_after_redis_died_gets_one_operation(fleet: EngineFleet, events: Events) -> None:
    """A message can be lost with the Redis that hands it out; asking again under the same id is always safe."""
    fields = {"log": str(events.path), "name": new_id(), "operation_id": new_id()}
    with Celery("scheduler", broker=fleet.redis.url, set_as_current=False) as scheduler:
        scheduler.send_task("test.chain", kwargs=fields, queue="virtfleet")
        fleet.redis.kill9()
    fleet.redis.start()
    with Celery("scheduler", broker=fleet.redis.url, backend=fleet.redis.url, set_as_current=False) as scheduler:
        answer = scheduler.send_task("test.chain", kwargs=fields, queue="virtfleet")
        assert answer.get(timeout=PATIENCE)["state"] == "succeeded"
    assert events.begun() == ["before", "test.copy", "after"]


def test_a_request_that_was_taken_is_not_turned_away_because_redis_died(fleet: EngineFleet, events: Events) -> None:
    gate = events.path.with_name("gate")
    with Celery("scheduler", broker=fleet.redis.url, set_as_current=False) as scheduler:
        fields = {"log": str(events.path), "name": new_id(), "operation_id": new_id(), "gate": str(gate)}
        scheduler.send_task("test.gate", kwargs=fields, queue="virtfleet")
    wait_until(lambda: gate.with_suffix(".reached").exists(), 20, "a worker has taken the request")
    fleet.redis.kill9()
    gate.touch()
    passed = gate.with_suffix(".passed")
    wait_until(lambda: passed.exists() and time.time() - passed.stat().st_mtime > 0.3, 20, "it has met the outage")
    fleet.redis.start()
    assert fleet.ended(fields["operation_id"]).state is State.SUCCEEDED
    assert events.begun() == ["test.call"]


def test_nothing_is_undone_beneath_a_step_when_its_cancel_follows_the_return_of_redis(
    fleet: EngineFleet, events: Events
) -> None:
    """Its lease has run out, and its worker has had no time to take it back."""
    record = begin(tasks.DeafRequest, events, seconds=9)  # Celery is back, and could undo, after 6 s
    fleet.redis.kill9()
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 2.2, 5, "the lease has run out")
    fleet.redis.start()
    cancel(record.id)
    assert fleet.ended(record.id).state is State.CANCELLED
    assert events.begun() == ["test.deaf"]
    assert events.undone() == ["deaf"]
    assert events.lines("undo")[0]["at"] > events.lines("end", "test.deaf")[0]["at"]


def test_a_silent_redis_does_not_hold_a_step_up(fleet: EngineFleet, events: Events) -> None:
    """It accepts connections and answers nothing; the copy goes on after the one report that met it."""
    record = begin(tasks.ChainRequest, events, seconds=2)
    with fleet.redis.paused():
        paused = time.monotonic()
        ended = events.wait("end", "test.copy")
    assert ended["at"] - paused < 12
    assert {step.attempt for step in require_succeeded(fleet, events, record).steps.values()} == {1}


@pytest.mark.parametrize("kind", [tasks.ChainRequest, tasks.GroupRequest])
def test_redis_loses_its_memory(kind: type[tasks.Asked], fleet: EngineFleet, events: Events) -> None:
    record = begin(kind, events)
    fleet.redis.flushall()
    ended = fleet.ended(record.id)
    assert ended.state is State.SUCCEEDED
    assert events.undone() == []
    if kind is tasks.ChainRequest:
        require_succeeded(fleet, events, record)
        assert {step.attempt for step in ended.steps.values()} == {1}


def test_what_was_in_progress_when_redis_lost_its_memory_goes_before_new_wishes(
    fleet: EngineFleet, events: Events
) -> None:
    """With both workers dead nobody but the host remembers it, and by then something else has been asked for."""
    record = begin(tasks.ChainRequest, events)
    for worker in fleet.workers.values():
        worker.kill9()
    fleet.redis.flushall()
    later = submit(tasks.CallRequest(log=str(events.path), name=record.instance, seconds=0.1))
    fleet.heal()
    assert fleet.ended(record.id).state is State.SUCCEEDED
    assert fleet.ended(later.id).state is State.SUCCEEDED
    events.require_no_overlap()
    lasts = {one: [line["at"] for line in events.lines() if line["operation"] == one] for one in (record.id, later.id)}
    begun_after_loss = [at for at in lasts[record.id] if at > min(lasts[later.id])]
    assert not begun_after_loss or min(begun_after_loss) > max(lasts[later.id]), "they took turns, one inside the other"


def test_a_host_is_introduced_after_its_memory_is_back(fleet: EngineFleet, events: Events) -> None:
    """So whoever asks for something of its instances meets the operations that were in progress."""
    record = begin(tasks.ChainRequest, events)
    for worker in fleet.workers.values():
        worker.kill9()
    fleet.redis.flushall()
    for worker in fleet.workers.values():
        worker.start()
    wait_until(lambda: registry().knows(tasks.HOST), PATIENCE, "the host is introduced")
    assert fleet.journal.find(record.id)
    assert fleet.ended(record.id).state is State.SUCCEEDED


def test_redis_loses_its_memory_and_what_is_undone_afterwards_is_complete(fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest, events, seconds=20)
    fleet.redis.flushall()
    wait_until(lambda: fleet.journal.find(record.id), 5, "the record is put back")
    cancel(record.id)
    assert fleet.ended(record.id).state is State.CANCELLED
    assert events.undone() == ["test.copy"]


def test_a_worker_that_comes_up_before_redis_keeps_its_steps(fleet: EngineFleet, events: Events) -> None:
    """Its predecessor was told to stop, and nobody could take that back as it started."""
    disk = fleet.workers["disk"]
    disk.kill(signal.SIGTERM)
    wait_until(lambda: not disk.alive, 20, "the disk worker ends")
    fleet.redis.kill9()
    disk.start()
    time.sleep(3)
    fleet.redis.start()
    fleet.heal()
    require_succeeded(fleet, events, begin(tasks.ChainRequest, events))
    assert len(events.lines("begin", "test.copy")) == 1


def test_every_connection_to_redis_is_cut(fleet: EngineFleet, events: Events) -> None:
    record = begin(tasks.ChainRequest, events)
    with fleet.redis.client() as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
    ended = require_succeeded(fleet, events, record)
    assert {step.attempt for step in ended.steps.values()} == {1}
