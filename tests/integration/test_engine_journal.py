"""The journal's scripts on a real Redis: who may own, execute, end and undo, whatever comes twice, late or lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings
from tests.lab.process import lab_folder, wait_until
from tests.lab.redis import Redis
from worker.engine import keys
from worker.engine.connection import connect
from worker.engine.journal import Admission, Journal, Lease, Phase
from worker.engine.lease import LeaseKeeper
from worker.engine.mirror import Copy, Mirror, MirrorWatch
from worker.engine.patience import patiently
from worker.engine.record import Record, State, StepPlan, StepState, UndoEntry
from worker.errors import BrokerUnavailable, FencedOff, OperationNotFound, RecordUnreadable

CHAIN = ((StepPlan("copy", "copy", "h1", "disk"),), (StepPlan("boot", "boot", "h1", "control"),))
GROUP = (tuple(StepPlan(key, "copy", "h1", "disk") for key in ("left", "right")),)
ENTRY = UndoEntry("remove", "h1", {"path": "/a"})


def admit(journal: Journal, name: str, *, wait: bool = False, stages: Any = CHAIN, instance: str = "vm") -> Admission:
    head = {"kind": "test", "request": {}, "instance": instance, "uuid": "u", "host": "h1"}
    return journal.admit(name, head, f"digest of {name}", stages, wait=wait)


def take(
    journal: Journal,
    step: str = "copy",
    name: str = "op",
    *,
    by: str = "first",
    phase: Phase = "run",
    instance: str = "vm",
) -> Lease:
    answer, lease = journal.acquire(name, step, instance, worker="disk@h1", token=by, phase=phase)
    assert lease, answer
    return lease


def refusal(journal: Journal, step: str = "copy", name: str = "op", phase: Phase = "run", instance: str = "vm") -> str:
    answer, lease = journal.acquire(name, step, instance, worker="disk@h1", token=f"not {name}'s", phase=phase)
    assert lease is None
    return answer


def done(journal: Journal, lease: Lease) -> None:
    assert journal.commit(lease, "done", look_in=10, result=None) == "ok"


def failed(journal: Journal, lease: Lease, verdict: State | None = State.FAILED) -> None:
    assert journal.commit(lease, "failed", look_in=10, verdict=verdict, error={"code": "permanent"}) == "ok"


def end(journal: Journal, name: str, state: State = State.SUCCEEDED) -> tuple[bool, str]:
    return journal.conclude(journal.read(name), state)


def lose_lease(journal: Journal, lease: Lease) -> None:
    """As when its time to live has passed without a renewal."""
    assert journal.redis.delete(keys.lease(lease.operation, lease.step)) == 1


def attention(journal: Journal, name: str = "op") -> float | None:
    """Seconds until the reaper looks at an operation."""
    score: Any = journal.redis.zscore(keys.ATTENTION, name)
    return None if score is None else score % keys.NOT_BEGUN - journal.now()


def owner(journal: Journal, instance: str = "vm") -> Any:
    return journal.redis.get(keys.claim(instance))


# --- admission ----------------------------------------------------------------------------------------------------


def test_admission_writes_the_record_and_claims_the_instance_at_once(journal: Journal) -> None:
    assert admit(journal, "op") == Admission("admitted", "queued")
    record = journal.read("op")
    assert (record.state, list(record.steps), record.stages) == (State.QUEUED, ["copy", "boot"], CHAIN)
    assert abs(record.submitted_at - journal.now()) < 5
    assert owner(journal) == "op"
    assert 0 < (attention(journal) or 0) <= 10


def test_of_many_admissions_of_one_id_exactly_one_is_taken_in(journal: Journal) -> None:
    with ThreadPoolExecutor(20) as pool:
        outcomes = [one.outcome for one in pool.map(lambda _: admit(journal, "op"), range(50))]
    assert outcomes.count("admitted") == 1
    assert outcomes.count("exists") == 49


def test_of_many_operations_on_one_instance_exactly_one_owns_it(journal: Journal) -> None:
    with ThreadPoolExecutor(20) as pool:
        admissions = list(pool.map(lambda number: admit(journal, f"op{number}"), range(50)))
    (winner,) = (f"op{number}" for number, one in enumerate(admissions) if one.outcome == "admitted")
    assert owner(journal) == winner
    assert [one for one in admissions if one.outcome != "admitted"] == [Admission("busy", winner)] * 49
    assert [record.id for record in journal.latest(100)] == [winner], "who was refused leaves nothing"


def test_an_id_that_was_used_says_for_what(journal: Journal) -> None:
    admit(journal, "op")
    assert admit(journal, "op", instance="other") == Admission("exists", "digest of op")
    assert owner(journal, "other") is None


def test_those_who_wait_get_the_instance_in_order_and_one_at_a_time(journal: Journal) -> None:
    admit(journal, "first")
    for name in ("second", "third", "fourth"):
        assert admit(journal, name, wait=True) == Admission("admitted", "waiting")
    assert refusal(journal, name="second") == "early"
    assert end(journal, "third", State.CANCELLED) == (True, ""), "who gives up waiting hands nothing over"

    assert end(journal, "first") == (True, "second")
    assert owner(journal) == "second"
    assert journal.read("second").state is State.QUEUED
    assert journal.read("fourth").state is State.WAITING
    assert (attention(journal, "second") or 0) <= 0, "should its first message be lost, the reaper sees to it"
    assert admit(journal, "fifth") == Admission("busy", "second")

    assert end(journal, "second", State.STUCK) == (True, "fourth")
    assert end(journal, "fourth") == (True, "")
    assert owner(journal) is None


def test_the_claim_passes_over_heirs_that_are_gone(journal: Journal) -> None:
    admit(journal, "first")
    admit(journal, "lost", wait=True)
    admit(journal, "heir", wait=True)
    journal.redis.delete(keys.operation("lost"))
    assert end(journal, "first") == (True, "heir")


@pytest.mark.parametrize("how", ["ended", "vanished"])
def test_a_claim_that_was_left_behind_is_taken_over(journal: Journal, how: str) -> None:
    admit(journal, "old")
    if how == "ended":
        journal.redis.hset(keys.operation("old"), "state", "failed")
    else:
        journal.redis.delete(keys.operation("old"))
    assert admit(journal, "new") == Admission("admitted", "queued")
    assert owner(journal) == "new"


def test_a_rejected_record_may_be_replaced_by_a_good_request(journal: Journal) -> None:
    head = {"kind": "test", "request": {}, "instance": "", "uuid": "", "host": ""}
    journal.reject("op", head, {"code": "invalid_spec", "message": "no"})
    rejected = journal.read("op")
    assert (rejected.state, rejected.error) == (State.REJECTED, {"code": "invalid_spec", "message": "no"})
    assert 0 < expiry(journal, "op") <= 7 * 86400

    assert admit(journal, "op").outcome == "admitted"
    record = journal.read("op")
    assert (record.state, record.error) == (State.QUEUED, None)
    assert expiry(journal, "op") == -1, "the record of an operation in progress must not expire"


def test_a_rejection_never_replaces_what_was_taken_in(journal: Journal) -> None:
    admit(journal, "op")
    journal.reject("op", {"kind": "x", "request": {}, "instance": "", "uuid": "", "host": ""}, {"code": "no"})
    assert journal.read("op").state is State.QUEUED


def expiry(journal: Journal, name: str) -> int:
    seconds: Any = journal.redis.ttl(keys.operation(name))
    return int(seconds)


# --- leases -------------------------------------------------------------------------------------------------------


def test_of_many_executors_exactly_one_gets_the_step(journal: Journal) -> None:
    admit(journal, "op")
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda n: journal.acquire("op", "copy", "vm", worker="w", token=f"t{n}", phase="run")[0], range(50)
            )
        )
    assert sorted(answers) == ["leased"] * 49 + ["yours"]
    assert journal.read("op").steps["copy"].attempt == 1


def test_acquiring_puts_down_who_executes_the_step(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    record = journal.read("op")
    step = record.steps["copy"]
    assert record.state is State.RUNNING
    assert (step.state, step.worker, step.attempt, step.fence) == (StepState.RUNNING, "disk@h1", 1, lease.fence)
    assert record.started_at is not None
    left = journal.leases(record, record.steps.values())
    assert list(left) == ["copy"]
    assert 0 < left["copy"] <= 30
    assert 25 < (attention(journal) or 0) <= 30


def test_acquiring_again_by_the_same_executor_gives_the_same_lease(journal: Journal) -> None:
    admit(journal, "op")
    assert take(journal) == take(journal)
    assert journal.read("op").steps["copy"].attempt == 1


def test_a_step_is_refused_when_it_is_not_to_run(journal: Journal) -> None:
    assert refusal(journal, name="unknown") == "gone"
    admit(journal, "op")
    copy = take(journal)
    assert refusal(journal) == "leased"
    assert refusal(journal, "undo:0", phase="undo") == "ended", "it is not being undone"
    done(journal, copy)
    assert refusal(journal) == "done"

    boot = take(journal, "boot")
    assert journal.commit(boot, "retry", look_in=60, error={}) == "ok"
    assert refusal(journal, "boot") == "early"
    journal.cancel("op")
    assert refusal(journal, "boot") == "cancel"
    end(journal, "op", State.CANCELLED)
    assert refusal(journal, "boot") == "ended"


def test_a_step_whose_predecessor_is_not_done_is_refused(journal: Journal) -> None:
    """Messages may come out of turn; the journal keeps the order."""
    admit(journal, "op")
    assert refusal(journal, "boot") == "early"
    copy = take(journal)
    assert refusal(journal, "boot") == "early"
    done(journal, copy)
    take(journal, "boot")


def test_steps_of_a_group_run_beside_each_other(journal: Journal) -> None:
    admit(journal, "op", stages=(*GROUP, *CHAIN))
    left, right = take(journal, "left"), take(journal, "right")
    done(journal, right)
    assert refusal(journal, "copy") == "early"
    done(journal, left)
    take(journal, "copy")


def test_undo_entries_run_newest_first_and_one_at_a_time(journal: Journal) -> None:
    admit(journal, "op")
    copy = take(journal)
    for number in range(3):
        journal.push_undo(copy, UndoEntry("remove", "h1", {"number": number}))
    failed(journal, copy)
    for number in (2, 1, 0):
        assert [refusal(journal, f"undo:{earlier}", phase="undo") for earlier in range(number)] == ["early"] * number
        done(journal, take(journal, f"undo:{number}", phase="undo"))


def test_fences_grow_also_after_redis_has_lost_its_memory(journal: Journal) -> None:
    fences = []
    for number in range(3):
        admit(journal, f"op{number}", instance=f"vm{number}")
        fences.append(take(journal, name=f"op{number}", instance=f"vm{number}").fence)
    journal.redis.flushall()
    admit(journal, "op")
    fences.append(take(journal).fence)
    assert fences == sorted(set(fences))


def test_a_lease_that_ran_out_is_taken_back_when_nobody_took_over(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    lose_lease(journal, lease)
    assert journal.renew(lease) == ("held", False)
    assert refusal(journal) == "leased"


def test_who_stood_still_between_taking_a_step_and_beginning_learns_that_it_is_anothers(
    journal: Journal, tmp_path: Path
) -> None:
    admit(journal, "op")
    old = take(journal)
    lose_lease(journal, old)
    take(journal, by="second")
    with (
        settings(data_dir=tmp_path),
        LeaseKeeper(journal, replace(old, asked_at=old.asked_at - 60)) as keeper,
        pytest.raises(FencedOff),
    ):
        keeper.check()


def test_a_lease_is_lost_when_somebody_took_over(journal: Journal) -> None:
    admit(journal, "op")
    old = take(journal)
    lose_lease(journal, old)
    new = take(journal, by="second")
    assert new.fence > old.fence
    assert new.attempt == 2
    assert journal.read("op").steps["copy"].lost == 1, "the first attempt ended in silence"
    assert journal.renew(old) == ("lost", False)
    assert journal.commit(old, "done", look_in=1, result="stale") == "refused"
    assert journal.push_undo(old, ENTRY) == "refused"
    lose_lease(journal, new)
    assert journal.renew(old) == ("lost", False), "also while the newer one is silent"
    assert journal.renew(new) == ("held", False)
    done(journal, new)
    assert journal.read("op").undo == ()


def test_a_renewal_tells_of_a_cancel_and_of_a_sibling_that_failed(journal: Journal) -> None:
    admit(journal, "op", stages=GROUP)
    left, right = take(journal, "left"), take(journal, "right")
    journal.cancel("op")
    assert journal.renew(left) == ("held", True)
    failed(journal, right)
    assert journal.renew(left) == ("stop", True)
    assert "left" in journal.leases(journal.read("op"), journal.read("op").steps.values())


# --- ending a step ------------------------------------------------------------------------------------------------


def test_a_commit_may_be_repeated(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    for _ in range(2):
        assert journal.commit(lease, "done", look_in=10, result={"bytes": 5}) == "ok"
    step = journal.read("op").steps["copy"]
    assert (step.state, step.result) == (StepState.DONE, {"bytes": 5})
    assert journal.leases(journal.read("op"), [step]) == {}
    assert journal.commit(lease, "failed", look_in=10, error={}) == "refused", "what is done cannot fail any more"


def test_a_retry_waits_for_its_time(journal: Journal) -> None:
    admit(journal, "op")
    assert journal.commit(take(journal), "retry", look_in=0.3, error={"code": "host_unreachable"}) == "ok"
    step = journal.read("op").steps["copy"]
    assert step.state is StepState.RETRY
    assert step.due is not None
    assert 0 < step.due - journal.now() <= 0.3
    assert 0 < (attention(journal) or 0) <= 0.3
    assert refusal(journal) == "early"
    wait_until(lambda: journal.now() > (step.due or 0), 2, "the retry is due")
    assert take(journal, by="second").attempt == 2


def test_a_cancel_does_not_wait_for_a_retry(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    journal.cancel("op")
    assert journal.commit(lease, "retry", look_in=300, error={"code": "host_unreachable"}) == "ok"
    assert (attention(journal) or 0) <= 0


def test_a_failure_turns_the_operation_back_in_the_same_instant(journal: Journal) -> None:
    admit(journal, "op", stages=GROUP)
    left, right = take(journal, "left"), take(journal, "right")
    failed(journal, left, State.CANCELLED)
    record = journal.read("op")
    assert (record.state, record.verdict, record.error) == (State.UNDOING, State.CANCELLED, {"code": "permanent"})
    assert journal.commit(right, "failed", look_in=1, verdict=State.FAILED, error={"code": "later"}) == "ok"
    record = journal.read("op")
    assert (record.verdict, record.error) == (State.CANCELLED, {"code": "permanent"}), "the first failure is the reason"


def test_what_json_does_not_know_does_not_keep_a_step_from_ending(journal: Journal) -> None:
    admit(journal, "op")
    details = {"path": object()}
    assert journal.commit(take(journal), "failed", look_in=1, verdict=State.FAILED, error=details) == "ok"


def test_an_executor_that_slept_through_the_end_changes_nothing(journal: Journal) -> None:
    """Its worker was frozen; the operation was cancelled, undone and ended without it."""
    admit(journal, "op")
    lease = take(journal)
    lose_lease(journal, lease)
    journal.cancel("op")
    journal.begin_undo("op", State.CANCELLED, {})
    end(journal, "op", State.CANCELLED)
    before = journal.dump("op")
    assert journal.renew(lease)[0] == "lost"
    assert journal.push_undo(lease, ENTRY) == "refused"
    assert journal.commit(lease, "failed", look_in=1, verdict=State.FAILED, error={}) == "refused"
    assert journal.dump("op") == before
    assert attention(journal) is None


def test_undo_entries_are_kept_once_and_in_order(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    second = UndoEntry("remove", "h1", {"path": "/b"})
    for entry in (ENTRY, second, ENTRY):
        assert journal.push_undo(lease, entry) == "ok"
    assert journal.read("op").undo == (ENTRY, second)
    done(journal, lease)
    assert journal.push_undo(lease, ENTRY) == "refused"


# --- cancelling and ending an operation ---------------------------------------------------------------------------


def test_a_cancel_is_kept_and_seen_at_once(journal: Journal) -> None:
    with pytest.raises(OperationNotFound, match="'op'"):
        journal.cancel("op")
    admit(journal, "op")
    assert journal.cancel("op") is State.QUEUED
    assert journal.read("op").cancel is not None
    assert (attention(journal) or 0) <= 0
    assert refusal(journal) == "cancel"


def test_what_is_cancelled_before_it_is_known_is_admitted_as_cancelled(journal: Journal) -> None:
    with pytest.raises(OperationNotFound):
        journal.cancel("op", on_arrival=True)
    ttl: Any = journal.redis.ttl(keys.unwanted("op"))
    assert 3500 < ttl <= 3600
    assert admit(journal, "op").outcome == "admitted"
    assert journal.read("op").cancel is not None
    assert refusal(journal) == "cancel"
    end(journal, "op", State.CANCELLED)
    with pytest.raises(OperationNotFound):
        journal.cancel("other")
    admit(journal, "other")
    assert journal.read("other").cancel is None


def test_a_cancel_that_comes_too_late_changes_nothing(journal: Journal) -> None:
    admit(journal, "op")
    end(journal, "op")
    assert journal.cancel("op") is State.SUCCEEDED
    record = journal.read("op")
    assert (record.state, record.cancel) == (State.SUCCEEDED, None)


def test_what_cannot_be_taken_back_cannot_be_cancelled(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    for _ in range(2):  # the first answer may be lost on its way
        assert journal.make_irrevocable(lease) == "ok"
    assert journal.cancel("op") is State.RUNNING
    record = journal.read("op")
    assert (record.irrevocable, record.cancel) == (True, None)
    assert journal.renew(lease) == ("held", False)


def test_who_is_asked_to_stop_first_takes_nothing_back_that_it_cannot(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    journal.cancel("op")
    assert journal.make_irrevocable(lease) == "cancel"
    assert not journal.read("op").irrevocable


def test_who_has_lost_the_step_cannot_make_it_irrevocable(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    assert journal.make_irrevocable(replace(lease, fence=lease.fence - 1)) == "refused"
    journal.redis.delete(keys.operation("op"))
    assert journal.make_irrevocable(lease) == "gone"


def test_the_end_frees_the_instance_and_lets_the_record_expire(journal: Journal) -> None:
    admit(journal, "op")
    copy = take(journal)
    journal.push_undo(copy, ENTRY)
    journal.report("op", "copy", {"done": 1})
    done(journal, copy)
    assert end(journal, "op") == (True, "")
    assert owner(journal) is None
    assert journal.progress("op") == {}
    assert attention(journal) is None
    assert 0 < expiry(journal, "op") <= 7 * 86400
    undo_expiry: Any = journal.redis.ttl(keys.undo("op"))
    assert undo_expiry > 0
    assert end(journal, "op", State.FAILED) == (False, ""), "an operation ends once"
    assert journal.read("op").state is State.SUCCEEDED


def test_the_record_of_a_stuck_operation_is_kept(journal: Journal) -> None:
    admit(journal, "op")
    end(journal, "op", State.STUCK)
    assert expiry(journal, "op") == -1
    assert owner(journal) is None


def test_stuck_operations_are_listed_however_many_came_after_them(journal: Journal) -> None:
    admit(journal, "op")
    end(journal, "op", State.STUCK)
    for number in range(5):
        admit(journal, f"later{number}", instance=f"other{number}")
    assert [record.id for record in journal.stuck(1)] == ["op"]
    assert journal.count_stuck() == 1
    assert journal.retry_undo(journal.read("op")) == ("ok", "")
    assert journal.count_stuck() == 0


def test_the_end_of_one_operation_does_not_free_the_instance_of_another(journal: Journal) -> None:
    admit(journal, "old")
    journal.redis.hset(keys.claim("unrelated"), "x", "y")
    journal.redis.set(keys.claim("vm"), "new")
    assert end(journal, "old") == (True, "")
    assert owner(journal) == "new"


def test_who_waits_for_the_end_is_told_until_it_has_ended(journal: Journal) -> None:
    admit(journal, "op")
    waiter = ("task", "control@h1")
    assert journal.wait_for("op", waiter)
    assert journal.wait_for("op", waiter)
    assert journal.waiters("op") == [waiter]
    end(journal, "op")
    assert attention(journal) is not None, "until the waiter has its answer"
    journal.waiter_answered("op", "task", "control@h1")
    assert journal.waiters("op") == []
    assert not journal.wait_for("op", ("late", "control@h1"))


def test_who_asks_by_name_is_told_of_the_end_though_the_worker_dies_right_after_admission(journal: Journal) -> None:
    head = {"kind": "test", "request": {}, "instance": "vm", "uuid": "u", "host": "h1"}
    assert journal.admit("op", head, "digest", CHAIN, wait=False, waiter=("task", "control@h1")).outcome == "admitted"
    assert journal.waiters("op") == [("task", "control@h1")]


def test_a_look_asked_for_sooner_stands(journal: Journal) -> None:
    admit(journal, "op")
    journal.look_in("op", 3, since=journal.now())
    journal.look_in("op", 8, since=journal.now())
    assert 2 < (attention(journal) or 0) <= 3
    journal.redis.zadd(keys.ATTENTION, {"op": journal.now() - 1})
    journal.look_in("op", 8, since=journal.now() - 2)
    assert (attention(journal) or 0) <= 0, "it was asked for after the record was read"
    journal.look_in("op", 8, since=journal.now())
    assert 7 < (attention(journal) or 0) <= 8, "one that is over is moved"
    journal.look_in("unknown", 1, since=journal.now())
    assert attention(journal, "unknown") is None


def test_recoveries_do_not_wait_behind_what_nobody_has_begun_with(journal: Journal) -> None:
    for name in ("long overdue", "queued", "begun", "taken back"):
        admit(journal, name, instance=name)
        journal.look_in(name, -1, since=journal.now())
        time.sleep(0.01)
    admit(journal, "waiting", instance="queued", wait=True)
    take(journal, name="begun", instance="begun")
    journal.look_in("begun", -1, since=journal.now() + 60)
    journal.cancel("taken back")
    assert journal.due(10) == ["begun", "taken back", "long overdue", "queued"], "the one that waits is not due"
    assert journal.due(1) == ["begun"]


def test_a_look_that_the_version_before_has_noted_is_kept(journal: Journal) -> None:
    """It made no difference between operations that have begun and others."""
    admit(journal, "op")
    journal.redis.zadd(keys.ATTENTION, {"op": journal.now() - 1})
    assert journal.due(10) == ["op"]
    journal.look_in("op", -1, since=journal.now())
    assert journal.due(10) == ["op"]


def test_a_cancel_is_looked_at_though_the_record_was_read_just_before(journal: Journal) -> None:
    admit(journal, "op")
    read = journal.now()
    journal.cancel("op")
    journal.look_in("op", 60, since=read)
    assert (attention(journal) or 0) <= 0


def test_a_publication_that_is_noted_late_does_not_hide_who_has_begun(journal: Journal) -> None:
    admit(journal, "op")
    published = journal.read("op").steps["copy"]
    journal.mark_published("op", [published])
    journal.mark_published("op", [published])
    assert journal.read("op").steps["copy"].publications == 2
    take(journal)
    journal.mark_published("op", [published])
    step = journal.read("op").steps["copy"]
    assert (step.published, step.publications) == (None, 0)


def test_the_listing_forgets_records_that_have_expired(journal: Journal) -> None:
    for name in ("expired", "running", "fresh"):
        admit(journal, name, instance=name)
    long_ago = journal.now() - 8 * 86400
    journal.redis.zadd(keys.OPERATIONS, {"expired": long_ago, "running": long_ago})
    journal.redis.delete(keys.operation("expired"))
    assert journal.trim() == 1
    assert {record.id for record in journal.latest(10)} == {"running", "fresh"}
    assert journal.redis.zcard(keys.OPERATIONS) == 2


# --- Redis loses its memory ---------------------------------------------------------------------------------------


def put_back(journal: Journal, lease: Lease, dump: tuple[dict[str, str], list[str]]) -> bool:
    field = f"step:{lease.step}:"
    return journal.restore(lease, {**dump[0], f"{field}fence": str(lease.fence)}, dump[1])


def test_what_redis_has_lost_is_put_back_whole(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    journal.push_undo(lease, ENTRY)
    before, dump = journal.read("op"), journal.dump("op")
    journal.redis.flushall()
    assert journal.renew(lease) == ("gone", False)
    assert journal.commit(lease, "done", look_in=1, result=None) == "gone"
    assert journal.push_undo(lease, ENTRY) == "gone"
    assert journal.find("op") is None, "nothing of it is left half"

    assert put_back(journal, lease, dump)
    assert replace(journal.read("op"), restored=None) == before
    assert owner(journal) == "op"
    assert attention(journal) is not None
    assert [record.id for record in journal.latest(10)] == ["op"]
    assert refusal(journal) == "leased", "the step is still being executed: nobody else may begin it"
    assert not put_back(journal, lease, dump)
    assert journal.renew(lease) == ("held", False)
    done(journal, lease)
    assert take(journal, "boot").fence > lease.fence


def test_a_record_that_a_sibling_put_back_is_completed(journal: Journal) -> None:
    """The sibling began earlier and has not heard of this step; both go on, neither is run twice."""
    admit(journal, "op", stages=GROUP)
    left = take(journal, "left")
    journal.push_undo(left, ENTRY)
    left_dump = journal.dump("op")
    right = take(journal, "right")
    own = UndoEntry("remove", "h1", {"path": "/right"})
    journal.push_undo(right, own)
    right_dump = journal.dump("op")
    journal.redis.flushall()

    assert put_back(journal, left, left_dump)
    assert journal.renew(right) == ("gone", False)
    assert put_back(journal, right, right_dump)
    assert journal.renew(right) == ("held", False)
    assert journal.renew(left) == ("held", False)
    assert journal.read("op").undo == (ENTRY, own)
    assert [refusal(journal, "left"), refusal(journal, "right")] == ["leased", "leased"]
    done(journal, left)
    done(journal, right)


def test_a_sibling_that_a_restored_record_shows_at_work_is_not_joined_before_it_could_renew(journal: Journal) -> None:
    admit(journal, "op", stages=GROUP)
    left, right = take(journal, "left"), take(journal, "right")
    dump = journal.dump("op")
    journal.redis.flushall()
    assert put_back(journal, left, dump)
    assert refusal(journal, "right") == "leased"
    assert journal.read("op").restored is not None
    assert journal.renew(right) == ("held", False)
    journal.redis.hset(keys.operation("op"), "restored", str(journal.now() - 10))
    lose_lease(journal, right)
    assert take(journal, "right").fence > right.fence


def test_who_takes_a_lease_knows_the_record_though_redis_loses_it_in_the_next_instant(journal: Journal) -> None:
    admit(journal, "op")
    lease = take(journal)
    dump = journal.dump("op")
    journal.redis.flushall()
    assert (lease.fields, lease.undo) == dump


def test_what_was_in_progress_goes_before_what_came_after_the_loss(journal: Journal) -> None:
    admit(journal, "old")
    lease = take(journal, name="old")
    dump = journal.dump("old")
    journal.redis.flushall()
    admit(journal, "new")
    assert put_back(journal, lease, dump)
    assert owner(journal) == "old"
    assert journal.read("new").state is State.WAITING
    assert refusal(journal, name="new") == "early"
    done(journal, lease)
    done(journal, take(journal, "boot", name="old"))
    assert end(journal, "old") == (True, "new")
    assert take(journal, name="new").fence


def test_what_began_after_the_loss_ends_before_the_lost_one_goes_on(journal: Journal) -> None:
    admit(journal, "old")
    lease = take(journal, name="old")
    done(journal, lease)
    fields, undo = journal.dump("old")
    journal.redis.flushall()
    admit(journal, "new")
    take(journal, name="new")
    assert journal.revive("old", lease.fence, fields, undo) == "put back"
    journal.let_go("old")
    assert owner(journal) == "new"
    assert refusal(journal, "boot", name="old") == "unowned"
    journal.mark_published("old", [journal.read("old").steps["boot"]])
    assert end(journal, "new") == (True, "old")
    assert owner(journal) == "old"
    assert journal.read("old").steps["boot"].published is None, "it goes out again at once"
    assert take(journal, "boot", name="old").fence


def at_the_second_step(journal: Journal) -> tuple[Lease, tuple[dict[str, str], list[str]], Lease]:
    """The ended lease of the first step, what its host knew at the end of it, and the lease of the second one."""
    admit(journal, "op")
    first = take(journal)
    journal.push_undo(first, ENTRY)
    done(journal, first)
    older = journal.dump("op")
    second = take(journal, "boot")
    journal.push_undo(second, UndoEntry("stop", "h2", {}))
    return first, older, second


def test_two_hosts_copies_of_a_lost_record_make_it_whole_before_it_goes_on(journal: Journal) -> None:
    first, older, second = at_the_second_step(journal)
    running = journal.dump("op")
    done(journal, second)
    whole, newer = journal.read("op"), journal.dump("op")
    journal.redis.flushall()

    assert journal.revive("op", first.fence, *older) == "put back"
    assert refusal(journal, "boot") == "early", "somebody may know more of it"
    assert journal.revive("op", second.fence, *running) == "completed"
    assert journal.read("op").steps["boot"].state is StepState.RUNNING
    assert journal.revive("op", second.fence, *newer) == "completed"
    assert [journal.revive("op", first.fence, *copy) for copy in (older, running, newer)] == ["", "", ""]
    journal.let_go("op")
    assert journal.read("op") == whole
    assert journal.revive("op", second.fence, *newer) == "", "it has gone on since"


def test_a_copy_that_knows_of_the_turning_back_turns_the_record_back(journal: Journal) -> None:
    first, older, second = at_the_second_step(journal)
    failed(journal, second)
    undoing = take(journal, "undo:1", phase="undo")
    done(journal, undoing)
    whole, newer = journal.read("op"), journal.dump("op")
    journal.redis.flushall()

    assert journal.revive("op", first.fence, *older) == "put back"
    assert journal.revive("op", undoing.fence, *newer) == "completed"
    journal.let_go("op")
    assert journal.read("op") == whole
    assert take(journal, "undo:0", phase="undo").fence > undoing.fence


def test_undo_entries_that_come_in_another_order_keep_what_became_of_them(journal: Journal) -> None:
    entries = [UndoEntry("remove", "h1", {"n": number}).as_json() for number in range(3)]
    admit(journal, "op")
    done(journal, take(journal))
    fields, _ = journal.dump("op")
    fields.update({"state": "undoing", "verdict": "failed", "error": "{}"})
    undone = {"step:undo:1:state": "done", "step:undo:1:fence": "7"}
    journal.redis.flushall()
    assert journal.revive("op", 1, fields, entries[:1]) == "put back"
    assert journal.revive("op", 7, {**fields, **undone}, [entries[2], entries[1]]) == "completed"
    journal.let_go("op")
    record = journal.read("op")
    assert [entry.arguments["n"] for entry in record.undo] == [0, 2, 1]
    assert [step.state for step in record.undo_steps] == [StepState.PENDING, StepState.PENDING, StepState.DONE]


def test_the_executor_of_a_held_record_has_it_go_on(journal: Journal) -> None:
    admit(journal, "op")
    older = journal.dump("op")
    lease = take(journal)
    dump = journal.dump("op")
    journal.redis.flushall()
    assert journal.revive("op", 0, *older) == "put back"
    assert journal.renew(lease) == ("gone", False)
    assert put_back(journal, lease, dump)
    assert journal.renew(lease) == ("held", False)
    assert journal.read("op").held is None
    done(journal, lease)
    assert take(journal, "boot").fence > lease.fence


def test_what_has_ended_does_not_begin_again_from_the_copy_of_a_host_that_had_not_heard(
    journal: Journal, tmp_path: Path
) -> None:
    stages = (*CHAIN, (StepPlan("settle", "settle", "h2", "control"),))
    admit(journal, "op", stages=stages)
    here, there = Mirror(tmp_path / "h1"), Mirror(tmp_path / "h2")
    done(journal, take(journal))
    here.keep(Copy("op", *journal.dump("op")))
    done(journal, take(journal, "boot"))
    done(journal, take(journal, "settle"))
    there.keep(Copy("op", *journal.dump("op")))
    record = journal.read("op")
    journal.conclude(record, State.SUCCEEDED)
    there.close("op", State.SUCCEEDED, record.hosts, record.submitted_at)
    journal.redis.flushall()

    behind, aware = MirrorWatch(here), MirrorWatch(there)
    wait_until(lambda: not behind.look(), 10, "the older copy is put back")
    assert refusal(journal, "boot") == "early"
    aware.look()
    assert journal.read("op").state is State.SUCCEEDED
    assert (journal.held(), owner(journal), attention(journal)) == ([], None, None)
    behind.look()
    assert list(here.copies()) == []


def test_an_id_that_is_used_again_is_not_ended_by_the_note_of_its_first_use(journal: Journal, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    admit(journal, "op")
    lease = take(journal)
    mirror.keep(Copy("op", *journal.dump("op")))
    mirror.close("op", State.REJECTED, {"h1", "h2"}, journal.read("op").submitted_at - 60)
    mirror.keep(Copy("op", *journal.dump("op")))
    journal.redis.flushall()
    watch = MirrorWatch(mirror)
    wait_until(lambda: not watch.look(), 10, "the copy is put back")
    watch.look()
    assert journal.read("op").state is State.RUNNING
    assert lease.operation in journal.held()


def test_what_is_stuck_can_be_tried_again_though_redis_has_lost_it(journal: Journal, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    admit(journal, "op")
    lease = take(journal)
    journal.push_undo(lease, ENTRY)
    failed(journal, lease)
    undoing = take(journal, "undo:0", phase="undo")
    failed(journal, undoing, verdict=None)
    mirror.keep(Copy("op", *journal.dump("op")))
    record = journal.read("op")
    journal.conclude(record, State.STUCK)
    mirror.close("op", State.STUCK, {"h1", "h2"}, record.submitted_at)
    MirrorWatch(mirror).look()
    journal.redis.flushall()
    watch = MirrorWatch(mirror)
    wait_until(lambda: not watch.look(), 10, "the copy is put back")
    journal.let_go("op")
    journal.conclude(journal.read("op"), State.STUCK)  # as the reaper finds it, its undo having failed
    assert journal.retry_undo(journal.read("op")) == ("ok", "")


def test_a_claim_that_was_lost_alone_is_taken_again(journal: Journal) -> None:
    admit(journal, "op")
    journal.redis.delete(keys.claim("vm"))
    take(journal)
    assert owner(journal) == "op"


def test_fences_outgrow_one_that_a_host_has_seen(journal: Journal) -> None:
    admit(journal, "op")
    seen = 2 * take(journal).fence
    journal.outgrow(seen)
    journal.outgrow(1)
    admit(journal, "other", instance="other")
    assert take(journal, name="other", instance="other").fence > seen


def test_a_note_that_comes_after_the_loss_leaves_no_half_record(journal: Journal) -> None:
    admit(journal, "op")
    published = journal.read("op").steps["copy"]
    journal.redis.flushall()
    journal.mark_published("op", [published])
    assert journal.find("op") is None


# --- records of other versions, and damaged ones ------------------------------------------------------------------


def test_a_record_of_a_newer_version_is_left_to_newer_workers(journal: Journal) -> None:
    admit(journal, "op")
    admit(journal, "other", instance="other")
    journal.redis.hset(keys.operation("op"), "schema", "99")
    assert refusal(journal) == "newer"
    with pytest.raises(RecordUnreadable, match="newer form"):
        journal.read("op")
    assert [record.id for record in journal.latest(10)] == ["other"]


def test_a_damaged_record_spoils_no_listing(journal: Journal) -> None:
    admit(journal, "op")
    admit(journal, "other", instance="other")
    journal.redis.hdel(keys.operation("op"), "head")
    with pytest.raises(RecordUnreadable, match="damaged"):
        journal.read("op")
    assert [record.id for record in journal.unfinished(10)] == ["other"]


# --- Redis is away ------------------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[tuple[Redis, Journal]]:
    """A Redis that this test may take down, and a journal on it."""
    with lab_folder() as folder, Redis(folder / "redis") as server, settings(redis_url=server.url):
        yield server, Journal(connect(server.url))


def test_a_redis_that_is_down_is_told_within_two_seconds(own: tuple[Redis, Journal]) -> None:
    server, journal = own
    admit(journal, "op")
    server.stop()
    for call in (lambda: admit(journal, "other"), lambda: journal.find("op"), journal.now, journal.uptime):
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{server.port}"):
            call()
        assert time.monotonic() - begun < 2.5


def test_patience_outlasts_a_restart_of_redis(own: tuple[Redis, Journal]) -> None:
    server, journal = own
    admit(journal, "op")
    lease = take(journal)
    server.kill9()
    with ThreadPoolExecutor(1) as pool:
        committed = pool.submit(lambda: patiently(journal.commit, lease, "done", look_in=1, result="kept"))
        wait_until(lambda: not committed.done(), 1, "the commit waits")
        server.start()
        assert committed.result(timeout=15) == "ok"
    assert journal.read("op").steps["copy"].result == "kept"


def test_a_full_redis_counts_as_away(own: tuple[Redis, Journal]) -> None:
    """It refuses writes: what is to be kept must be kept later, not given up."""
    _, journal = own
    admit(journal, "op")
    lease = take(journal)
    journal.redis.config_set("maxmemory", "1")
    with pytest.raises(BrokerUnavailable):
        journal.commit(lease, "done", look_in=1, result=None)
    journal.redis.config_set("maxmemory", "0")
    done(journal, lease)


def test_records_of_ended_operations_read_as_written(journal: Journal) -> None:
    admit(journal, "op")
    copy = take(journal)
    journal.push_undo(copy, ENTRY)
    failed(journal, copy)
    done(journal, take(journal, "undo:0", phase="undo"))
    end(journal, "op", State.FAILED)
    record: Record = journal.read("op")
    shown = record.as_dict()
    assert shown["state"] == "failed"
    assert shown["undo"][0]["state"] == "done"
    assert shown["steps"][0]["error"] == {"code": "permanent"}
