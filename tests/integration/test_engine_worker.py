"""Real workers carry operations out: in order, once each step, undone when they fail, and cancelled when asked."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery

from tests.integration import engine_tasks as tasks
from tests.integration.conftest import PATIENCE, EngineFleet, Events
from tests.lab.process import REPOSITORY, lab_folder, wait_until
from worker.engine import keys
from worker.engine.intervention import cancel
from worker.engine.journal import Journal
from worker.engine.operation import new_id, submit
from worker.engine.record import Record, State, StepState
from worker.errors import InstanceBusy, OperationConflict, OperationNotFound


def asked(kind: type[tasks.Asked], events: Events, **fields: Any) -> Any:
    """A request of that kind, on an instance of its own."""
    return kind(**{"log": str(events.path), "name": new_id(), "operation_id": new_id(), **fields})


def states(record: Record) -> dict[str, str]:
    return {key: step.state.value for key, step in record.steps.items()}


# --- going well ---------------------------------------------------------------------------------------------------


def test_the_steps_of_a_chain_run_once_and_in_order(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.ChainRequest, events, seconds=0.3))
    assert record.state is State.SUCCEEDED
    assert events.begun() == ["before", "test.copy", "after"]
    assert record.result == "after called"
    assert record.steps["test.copy"].result == {"bytes": 5}
    assert {step.attempt for step in record.steps.values()} == {1}
    assert {step.worker for step in record.steps.values()} == {"control@h1", "disk@h1"}
    assert events.undone() == []


def test_the_steps_of_a_group_run_beside_each_other(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.GroupRequest, events, seconds=0.5))
    assert record.state is State.SUCCEEDED
    begun = events.begun()
    assert (begun[0], sorted(begun[1:3]), begun[3:]) == ("before", ["copy-0", "copy-1"], ["after"])
    begins, ends = ([line["at"] for line in events.lines(what)] for what in ("begin", "end"))
    assert sorted(begins)[2] < sorted(ends)[1], "the second copy began before the first one ended"
    assert events.lines("begin", "after")[0]["at"] >= sorted(ends)[-2]


def test_a_running_step_tells_how_far_it_is(fleet: EngineFleet, events: Events) -> None:
    record = submit(asked(tasks.ChainRequest, events, seconds=1.5))
    wait_until(lambda: fleet.journal.progress(record.id).get("test.copy", {}).get("done"), 20, "progress is told")
    report = fleet.journal.progress(record.id)["test.copy"]
    assert 0 < report["done"] < report["total"] == 30
    assert report["rate"] > 0
    fleet.ended(record.id)
    assert fleet.journal.progress(record.id) == {}


def test_a_retryable_failure_is_tried_again_later(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.FlakyRequest, events))
    assert (record.state, record.result) == (State.SUCCEEDED, 3)
    assert record.steps["test.flaky"].attempt == 3
    begins = [line["at"] for line in events.lines("begin")]
    assert begins[1] - begins[0] > 0.15
    assert begins[2] - begins[1] > 0.3, "the pause doubles"


def test_who_waits_for_its_turn_spends_no_attempts(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.QueueingRequest, events))
    assert (record.state, record.result, len(events.lines("begin"))) == (State.SUCCEEDED, 1, 5)


def test_a_copy_that_gets_on_is_not_given_up_however_often_it_breaks_off(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.GettingOnRequest, events))
    error = record.error or {}
    assert (record.state, error["code"]) == (State.FAILED, "transfer_interrupted")
    assert (record.steps["test.getting_on"].attempt, error["attempt"], error["attempts"]) == (7, 2, 2)


# --- failing ------------------------------------------------------------------------------------------------------


def test_who_meets_the_lock_of_another_process_spends_no_attempts(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.LockedRequest, events))
    step = record.steps["test.locked"]
    assert (record.state, step.result, step.locked) == (State.SUCCEEDED, 6, 4)


@pytest.mark.parametrize("failure", ["retryable", "permanent", "os"])
def test_what_cannot_be_taken_back_is_tried_more_often_than_its_step(
    failure: str, fleet: EngineFleet, events: Events
) -> None:
    record = fleet.run(asked(tasks.NoWayBackRequest, events, failure=failure))
    assert (record.state, record.steps["test.no_way_back"].result) == (State.SUCCEEDED, 2)


def test_a_failure_undoes_what_was_done_newest_first(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.FailRequest, events))
    assert record.state is State.FAILED
    assert events.begun() == ["copy-0", "copy-1", "copy-2", "test.full"]
    assert events.undone() == ["copy-2", "copy-1", "copy-0"]
    assert {step.state for step in record.undo_steps} == {StepState.DONE}
    error = record.error or {}
    assert (error["code"], error["step"], error["host"], error["attempt"]) == ("no_space", "test.full", "h1", 1)
    assert error["details"] == {"path": "/full", "needed": 5}


def test_a_defect_fails_and_is_undone(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.DefectRequest, events))
    assert (record.state, (record.error or {})["code"]) == (State.FAILED, "internal_error")
    assert "ValueError: a bug" in (record.error or {})["message"]
    assert events.undone() == ["defect"]


def test_bad_input_found_by_a_step_rejects_the_operation(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.RefusalRequest, events))
    assert (record.state, (record.error or {})["code"]) == (State.REJECTED, "invalid_spec")


def test_what_fails_in_a_group_stops_its_sibling_before_anything_is_undone(fleet: EngineFleet, events: Events) -> None:
    record = fleet.run(asked(tasks.HalfRequest, events, seconds=20))
    assert (record.state, (record.error or {})["code"]) == (State.FAILED, "no_space")
    assert "after" not in events.begun()
    if "test.copy" in events.begun():
        assert events.undone() == ["test.copy"]
        assert events.lines("end", "test.copy")[0]["at"] < events.lines("undo")[0]["at"]


def test_an_undo_that_fails_leaves_the_operation_stuck_and_says_what_remains(
    fleet: EngineFleet, events: Events
) -> None:
    record = fleet.run(asked(tasks.StuckRequest, events))
    assert record.state is State.STUCK
    remains = [entry for entry in record.as_dict()["undo"] if entry["state"] != "done"]
    assert {entry["action"]: entry["state"] for entry in remains} == {"test.remove": "pending", "test.refuse": "failed"}
    (refused,) = (entry for entry in remains if entry["state"] == "failed")
    assert refused["host"] == "h1"
    assert refused["error"]["message"] == "cannot be undone"
    assert (record.error or {})["code"] == "no_space"
    assert events.undone() == []


# --- cancelling ---------------------------------------------------------------------------------------------------


def test_a_running_step_stops_within_two_seconds_of_a_cancel(fleet: EngineFleet, events: Events) -> None:
    record = submit(asked(tasks.ChainRequest, events, seconds=30))
    events.wait("tick", "test.copy")
    asked_at = time.monotonic()
    cancel(record.id)
    record = fleet.ended(record.id)
    assert events.lines("end", "test.copy")[0]["at"] - asked_at < 2
    assert (record.state, (record.error or {})["code"]) == (State.CANCELLED, "cancelled")
    assert events.undone() == ["test.copy"]
    assert "after" not in events.begun()


def test_nothing_is_undone_beneath_a_step_that_is_slow_to_stop(fleet: EngineFleet, events: Events) -> None:
    """It blocks for longer than a lease lasts, as saving a large guest does."""
    record = submit(asked(tasks.DeafRequest, events, seconds=4.5))
    events.wait("tick")
    cancel(record.id)
    record = fleet.ended(record.id)
    assert record.state is State.CANCELLED
    assert events.begun() == ["test.deaf"]
    assert events.undone() == ["deaf"]
    assert events.lines("undo")[0]["at"] > events.lines("end", "test.deaf")[0]["at"]


def test_an_operation_that_waits_for_its_retry_can_be_cancelled(fleet: EngineFleet, events: Events) -> None:
    record = submit(asked(tasks.PutOffRequest, events))
    fleet.reaches(record.id, "test.put_off", StepState.RETRY)
    cancel(record.id)
    assert fleet.ended(record.id).state is State.CANCELLED
    assert events.undone() == ["put off"]


def test_a_client_that_knows_no_operation_can_cancel(fleet: EngineFleet, events: Events) -> None:
    record = submit(asked(tasks.PutOffRequest, events))
    fleet.reaches(record.id, "test.put_off", StepState.RETRY)
    script = f"from worker.engine.intervention import cancel; print(cancel({record.id!r}).state)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert fleet.ended(record.id).state is State.CANCELLED
    assert events.undone() == ["put off"]


def test_a_queued_operation_is_cancelled_also_while_no_worker_is_up(journal: Journal, events: Events) -> None:
    record = submit(asked(tasks.ChainRequest, events))
    assert record.state is State.QUEUED
    assert cancel(record.id).state is State.CANCELLED
    assert journal.redis.exists(keys.claim(record.instance)) == 0


def test_an_operation_that_waits_for_its_instance_can_be_cancelled(fleet: EngineFleet, events: Events) -> None:
    first = submit(asked(tasks.CallRequest, events, seconds=2))
    waiting = submit(asked(tasks.CallRequest, events, name=first.instance, wait_if_busy=True))
    assert waiting.state is State.WAITING
    assert cancel(waiting.id).state is State.CANCELLED
    assert fleet.ended(first.id).state is State.SUCCEEDED
    assert {line["operation"] for line in events.lines()} == {first.id}


# --- one instance, one operation ----------------------------------------------------------------------------------


def test_operations_on_one_instance_run_one_after_the_other_in_order(fleet: EngineFleet, events: Events) -> None:
    name = new_id()
    ids = [submit(asked(tasks.CallRequest, events, name=name, wait_if_busy=True, seconds=0.05)).id for _ in range(20)]
    assert {fleet.ended(one).state for one in ids} == {State.SUCCEEDED}
    moments = [(line["operation"], line["what"]) for line in events.lines() if line["what"] != "tick"]
    assert moments == [(one, what) for one in ids for what in ("begin", "end")]


def test_a_second_operation_is_refused_and_told_who_owns_the_instance(fleet: EngineFleet, events: Events) -> None:
    first = submit(asked(tasks.CallRequest, events, seconds=2))
    second = asked(tasks.CallRequest, events, name=first.instance)
    with pytest.raises(InstanceBusy, match=first.id) as refused:
        submit(second)
    assert refused.value.details == {"owner": first.id}
    assert fleet.journal.read(second.operation_id).state is State.REJECTED
    fleet.ended(first.id)
    assert fleet.run(second).state is State.SUCCEEDED, "the same id again, now that the instance is free"


def test_the_same_id_again_attaches_and_another_request_under_it_is_refused(fleet: EngineFleet, events: Events) -> None:
    request = asked(tasks.CallRequest, events, seconds=1)
    with ThreadPoolExecutor(5) as pool:
        assert {record.id for record in pool.map(submit, [request] * 5)} == {request.operation_id}
    with pytest.raises(OperationConflict, match="seconds"):
        submit(request.model_copy(update={"seconds": 2}))
    fleet.ended(request.operation_id)
    assert submit(request).state is State.SUCCEEDED
    assert events.begun() == ["test.long_call"]


# --- schedulers that know only Celery -----------------------------------------------------------------------------


@pytest.fixture
def scheduler(fleet: EngineFleet) -> Iterator[Celery]:
    with Celery("scheduler", broker=fleet.redis.url, backend=fleet.redis.url, set_as_current=False) as app:
        yield app


def send(scheduler: Celery, task: str, /, **fields: Any) -> Any:
    return scheduler.send_task(task, kwargs=fields, queue="virtfleet")


def test_a_scheduler_gets_the_final_record_whatever_becomes_of_it(scheduler: Celery, events: Events) -> None:
    log = str(events.path)
    good = send(scheduler, "test.chain", log=log, name="good", operation_id=new_id())
    failed = send(scheduler, "test.fail", log=log, name="failed")
    refused = send(scheduler, "test.refusal_only", log=log, name="refused")
    unknown = send(scheduler, "test.chain", log=log, name="x", colour="blue")
    wrong = send(scheduler, "test.chain", log=log, name="no/name")

    record = good.get(timeout=PATIENCE)
    assert (record["state"], record["result"], len(record["steps"])) == ("succeeded", "after called", 3)
    record = failed.get(timeout=PATIENCE)
    assert (record["state"], record["error"]["code"]) == ("failed", "no_space")
    assert [entry["state"] for entry in record["undo"]] == ["done"] * 3
    record = refused.get(timeout=PATIENCE)
    assert (record["state"], record["error"]["code"]) == ("rejected", "invalid_spec")
    record = unknown.get(timeout=PATIENCE)
    assert (record["state"], record["error"]["details"]["field"]) == ("rejected", "colour")
    assert "there is no such field" in record["error"]["message"]
    record = wrong.get(timeout=PATIENCE)
    assert (record["state"], record["error"]["details"]["field"]) == ("rejected", "name")


def test_two_schedulers_with_one_id_share_one_operation(scheduler: Celery, events: Events) -> None:
    fields = {"log": str(events.path), "name": new_id(), "operation_id": new_id(), "seconds": 0.5}
    answers = [send(scheduler, "test.call_only", **fields) for _ in range(2)]
    records = [answer.get(timeout=PATIENCE) for answer in answers]
    assert records[0] == records[1]
    assert records[0]["state"] == "succeeded"
    assert events.begun() == ["test.long_call"]
    again = send(scheduler, "test.call_only", **fields).get(timeout=PATIENCE)
    assert again == records[0]


def test_a_scheduler_is_told_when_the_instance_is_busy(scheduler: Celery, fleet: EngineFleet, events: Events) -> None:
    owner = submit(asked(tasks.CallRequest, events, seconds=2))
    answer = send(scheduler, "test.call_only", log=str(events.path), name=owner.instance).get(timeout=PATIENCE)
    assert (answer["state"], answer["error"]["code"]) == ("rejected", "instance_busy")
    assert answer["error"]["details"] == {"owner": owner.id}
    fleet.ended(owner.id)


def test_a_scheduler_can_cancel(scheduler: Celery, fleet: EngineFleet, events: Events) -> None:
    record = submit(asked(tasks.ChainRequest, events, seconds=30))
    events.wait("tick", "test.copy")
    scheduler.send_task("virtfleet.cancel", args=[record.id], queue="virtfleet").get(timeout=PATIENCE)
    assert fleet.ended(record.id).state is State.CANCELLED


def test_a_request_that_no_worker_has_taken_yet_can_be_cancelled(
    scheduler: Celery, fleet: EngineFleet, events: Events
) -> None:
    """It waits in Celery's queue, and the journal does not know of it."""
    fields = {"log": str(events.path), "name": new_id(), "operation_id": new_id()}
    worker = fleet.workers["control"]
    worker.kill(signal.SIGTERM)
    wait_until(lambda: not worker.alive, 20, "the worker ends")
    answer = send(scheduler, "test.chain", **fields)
    with pytest.raises(OperationNotFound) as unknown:
        cancel(fields["operation_id"])
    assert "cancelled as it arrives" in unknown.value.hint
    fleet.heal()
    assert answer.get(timeout=PATIENCE)["state"] == "cancelled"
    assert events.lines() == []
    assert fleet.run(asked(tasks.ChainRequest, events, name=fields["name"])).state is State.SUCCEEDED


# --- messages that come twice -------------------------------------------------------------------------------------


def test_every_message_delivered_twice_has_its_effect_once(events: Events) -> None:
    with lab_folder() as folder, EngineFleet(folder, "twice") as fleet, fleet.in_use():
        with Celery("scheduler", broker=fleet.redis.url, backend=fleet.redis.url, set_as_current=False) as scheduler:
            fields = {"log": str(events.path), "name": "chain", "operation_id": "chain", "seconds": 0.3}
            for answer in (send(scheduler, "test.chain", **fields), send(scheduler, "test.chain", **fields)):
                assert answer.get(timeout=PATIENCE)["state"] == "succeeded"
            del answer
        assert events.begun() == ["before", "test.copy", "after"]

        grouped = Events(events.path.with_name("group"))
        assert fleet.run(asked(tasks.GroupRequest, grouped, seconds=0.3)).state is State.SUCCEEDED
        assert sorted(grouped.begun()) == ["after", "before", "copy-0", "copy-1"]

        failed = Events(events.path.with_name("failed"))
        assert fleet.run(asked(tasks.FailRequest, failed)).state is State.FAILED
        assert failed.begun() == ["copy-0", "copy-1", "copy-2", "test.full"]
        assert failed.undone() == ["copy-2", "copy-1", "copy-0"]
