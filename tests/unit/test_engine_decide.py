"""What is next for an operation: for every record there can be, the decision is safe and leads on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.decide import MAX_GRACE, Clock, Decision, End, Look, Publish, Traffic, TurnBack, Undo, decide
from worker.engine.record import FINAL, Record, State, StepPlan, StepRecord, StepState, UndoEntry, undo_plan

NOW = 1_000_000.0
GRACE = 10.0
UNFINISHED = sorted(set(State) - FINAL)
Situation = tuple[Record, dict[str, float], Clock, bool]
"""A record, what is left of each lease, the time, and whether to be prompt."""

# A step's failure and the operation's turning back are one commit, as are its first step and its running;
# undo entries are executed once it has turned back.
REACHED: dict[State, list[StepState]] = {
    State.WAITING: [StepState.PENDING],
    State.QUEUED: [StepState.PENDING],
    State.RUNNING: [state for state in StepState if state is not StepState.FAILED],
}
MOMENTS = [None, NOW - 1000, NOW - 15, NOW - 5, NOW, NOW + 100]


def steps_of(plan: StepPlan, states: Sequence[StepState]) -> st.SearchStrategy[StepRecord]:
    return st.builds(
        StepRecord,
        plan=st.just(plan),
        state=st.sampled_from(states),
        due=st.sampled_from(MOMENTS),
        published=st.sampled_from(MOMENTS),
        publications=st.sampled_from([0, 1, 2, 7, 5000]),
        ended_at=st.sampled_from(MOMENTS),
    )


@st.composite
def records(draw: st.DrawFn, states: Iterable[State] = tuple(State)) -> Record:
    number = count()
    sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    stages = tuple(tuple(StepPlan(f"s{next(number)}", "s", "h1", "disk") for _ in range(size)) for size in sizes)
    entries = tuple(UndoEntry("remove", "h1", {"n": n}) for n in range(draw(st.integers(0, 3))))
    state = draw(st.sampled_from(list(states)))
    reached = REACHED.get(state, list(StepState))
    undone = list(StepState) if state not in REACHED else [StepState.PENDING]
    return Record(
        id="op",
        kind="test",
        request={},
        instance="vm",
        uuid="u",
        host="h1",
        state=state,
        stages=stages,
        steps={plan.key: draw(steps_of(plan, reached)) for stage in stages for plan in stage},
        undo=entries,
        undo_steps=tuple(draw(steps_of(undo_plan(index, entry), undone)) for index, entry in enumerate(entries)),
        cancel=draw(st.none() | st.just(NOW - 1)),
        verdict=draw(st.sampled_from([None, State.FAILED, State.CANCELLED, State.REJECTED])),
        submitted_at=NOW - 2000,
    )


@st.composite
def situations(draw: st.DrawFn, states: Iterable[State] = tuple(State)) -> Situation:
    record = draw(records(states))
    executing = [step.key for step in every_step(record) if step.state is StepState.RUNNING]
    left = {key: draw(st.sampled_from([None, 0.001, 30.0])) for key in executing}
    leases = {key: seconds for key, seconds in left.items() if seconds}
    return record, leases, Clock(NOW, GRACE, draw(st.booleans())), draw(st.booleans())


def every_step(record: Record) -> list[StepRecord]:
    return [*record.steps.values(), *record.undo_steps]


def current_stage(record: Record) -> tuple[str, ...]:
    stages = ([plan.key for plan in stage] for stage in record.stages)
    unfinished = (stage for stage in stages if any(record.steps[key].state is not StepState.DONE for key in stage))
    return tuple(next(unfinished, ()))


@given(situations())
def test_an_executed_step_is_never_published(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    decision = decide(record, leases, clock, prompt=prompt)
    if isinstance(decision, Publish):
        assert not set(decision.heads) & set(leases)
    if isinstance(decision, Undo):
        assert decision.steps[0].key not in leases


@given(situations(states=[State.QUEUED, State.RUNNING]))
def test_steps_are_published_in_order(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    decision = decide(record, leases, clock, prompt=prompt)
    if isinstance(decision, Publish):
        assert decision.heads
        assert set(decision.heads) <= set(current_stage(record))
        assert all(record.steps[key].state is not StepState.DONE for key in decision.heads)


@given(situations(states=[State.UNDOING]))
def test_nothing_is_undone_beneath_a_step_that_runs(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    if set(leases) & set(record.steps):
        assert isinstance(decide(record, leases, clock, prompt=prompt), Look)


@given(situations(states=[State.UNDOING]))
def test_undo_goes_newest_first_and_does_nothing_twice(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    decision = decide(record, leases, clock, prompt=prompt)
    if isinstance(decision, Undo):
        left = [step for step in record.undo_steps if step.state is not StepState.DONE]
        assert list(decision.steps) == left[::-1]


@given(situations())
def test_an_operation_ends_only_when_nothing_is_left(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    decision = decide(record, leases, clock, prompt=prompt)
    if not isinstance(decision, End):
        assert not record.state.final
    elif record.state.final:
        assert decision.state is record.state
    elif decision.state is State.SUCCEEDED:
        assert record.state in {State.QUEUED, State.RUNNING}
        assert all(step.state is StepState.DONE for step in record.steps.values())
    elif decision.state is State.STUCK:
        assert any(step.state is StepState.FAILED for step in record.undo_steps)
    else:
        assert decision.state is (record.verdict or State.FAILED)
        assert all(step.state is StepState.DONE for step in record.undo_steps)


@given(situations(states=UNFINISHED))
def test_nobody_waits_for_ever_and_nobody_spins(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    decision = decide(record, leases, clock, prompt=prompt)
    if isinstance(decision, Look):
        assert math.isfinite(decision.seconds)
        assert 0 < decision.seconds <= MAX_GRACE + 1000


@given(situations(states=UNFINISHED))
def test_an_operation_turns_back_only_when_asked_to_and_at_rest(situation: Situation) -> None:
    record, leases, clock, prompt = situation
    if isinstance(decide(record, leases, clock, prompt=prompt), TurnBack):
        assert record.cancel is not None
        assert record.state is not State.UNDOING
        assert not isinstance(decide(replace(record, cancel=None), leases, clock, prompt=prompt), TurnBack)
        assert not leases


@given(situations(states=[State.QUEUED, State.RUNNING, State.UNDOING]))
def test_leases_are_not_judged_just_after_a_restart_of_redis(situation: Situation) -> None:
    """A running step without a lease may be alive: its lease ran out while nobody could renew it."""
    record, leases, clock, prompt = situation
    decision = decide(record, leases, replace(clock, leases_count=False), prompt=prompt)
    executing = {step.key for step in every_step(record) if step.state is StepState.RUNNING}
    if isinstance(decision, TurnBack):
        assert not executing & set(record.steps)
    if isinstance(decision, Publish):
        assert not set(decision.heads) & executing
    if isinstance(decision, Undo):
        assert not executing & {*record.steps, decision.steps[0].key}


# --- single cases -------------------------------------------------------------------------------------------------

CLOCK = Clock(NOW, GRACE)
PLAN = StepPlan("only", "s", "h1", "disk")


def running(step: StepRecord, state: State = State.RUNNING, cancel: float | None = None) -> Record:
    return Record("op", "test", {}, "vm", "u", "h1", state, ((PLAN,),), {"only": step}, cancel=cancel, submitted_at=NOW)


def test_a_step_whose_worker_died_is_published_again_at_once() -> None:
    orphan = running(StepRecord(PLAN, StepState.RUNNING, attempt=1))
    assert decide(orphan, {}, CLOCK) == Publish(("only",))
    assert decide(orphan, {"only": 4.0}, CLOCK) == Look(4.0)


def test_a_retry_is_published_when_it_is_due() -> None:
    assert decide(running(StepRecord(PLAN, StepState.RETRY, due=NOW + 3)), {}, CLOCK) == Look(3.0)
    assert decide(running(StepRecord(PLAN, StepState.RETRY, due=NOW - 0.001)), {}, CLOCK) == Publish(("only",))


def test_a_new_step_goes_out_at_once_but_to_the_reaper_its_message_may_be_on_its_way() -> None:
    fresh = running(StepRecord(PLAN), State.QUEUED)
    assert decide(fresh, {}, CLOCK, prompt=True) == Publish(("only",))
    assert decide(fresh, {}, CLOCK) == Look(GRACE)
    assert decide(fresh, {}, Clock(NOW + GRACE, GRACE)) == Publish(("only",))


@pytest.mark.parametrize(
    ("publications", "grace"), [(1, 10), (2, 20), (3, 40), (5, 160), (6, MAX_GRACE), (5000, MAX_GRACE)]
)
def test_a_message_that_waits_in_a_long_queue_is_repeated_ever_more_seldom(publications: int, grace: float) -> None:
    record = running(StepRecord(PLAN, published=NOW, publications=publications), State.QUEUED)
    assert decide(record, {}, CLOCK, prompt=True) == Look(grace)
    assert decide(record, {}, Clock(NOW + grace, GRACE)) == Publish(("only",))


@pytest.mark.parametrize("publications", [1, 5000])
def test_a_step_is_not_published_again_while_it_waits_in_its_queue(publications: int) -> None:
    record = running(StepRecord(PLAN, published=NOW, publications=publications), State.QUEUED)

    def after(seconds: float, traffic: Traffic) -> Decision:
        return decide(record, {}, Clock(NOW + seconds, GRACE), queues=lambda _: traffic)

    assert after(MAX_GRACE - 1, Traffic.FLOWS) == (Look(MAX_GRACE - 1) if publications == 1 else Look(1.0)), (
        "looks come ever more seldom"
    )
    assert after(MAX_GRACE, Traffic.FLOWS) == Publish(("only",)), "should it be lost in a queue that never is empty"
    assert after(1000 * MAX_GRACE, Traffic.STANDS) == Look(MAX_GRACE), "a worker that comes up finds it"
    assert after(1000 * MAX_GRACE, Traffic.NONE) == Publish(("only",))


@pytest.mark.parametrize("traffic", Traffic)
def test_what_was_not_published_since_it_was_begun_does_not_wait_for_a_queue(traffic: Traffic) -> None:
    due, orphan, new = (
        StepRecord(PLAN, StepState.RETRY, due=NOW - 1),
        StepRecord(PLAN, StepState.RUNNING, attempt=1),
        StepRecord(PLAN),
    )
    for step in (due, orphan, new):
        assert decide(running(step), {}, CLOCK, prompt=True, queues=lambda _: traffic) == Publish(("only",))


def test_a_cancel_is_heeded_where_nothing_runs() -> None:
    asked = running(StepRecord(PLAN, StepState.RETRY, due=NOW + 100), cancel=NOW)
    assert decide(asked, {}, CLOCK) == TurnBack()
    assert decide(asked, {}, replace(CLOCK, leases_count=False)) == TurnBack()
    asked = running(StepRecord(PLAN, StepState.RUNNING), cancel=NOW)
    assert decide(asked, {}, CLOCK) == TurnBack()
    assert decide(asked, {"only": 3.0}, CLOCK) == Look(3.0)
    assert decide(asked, {}, replace(CLOCK, leases_count=False)) == Look(GRACE)


def test_who_waits_for_an_instance_can_be_cancelled_there() -> None:
    assert decide(running(StepRecord(PLAN), State.WAITING), {}, CLOCK) == Look(GRACE)
    assert decide(running(StepRecord(PLAN), State.WAITING), {}, Clock(NOW + 60, GRACE)) == Look(60)
    assert decide(running(StepRecord(PLAN), State.WAITING), {}, Clock(NOW + 3600, GRACE)) == Look(MAX_GRACE)
    assert decide(running(StepRecord(PLAN), State.WAITING, cancel=NOW), {}, CLOCK) == TurnBack()


# --- whole lives --------------------------------------------------------------------------------------------------

Accident = st.sampled_from(["message lost", "worker dies", "retry", "fails", "cancel", "redis restarts"])


class Life:
    """An operation in a world where the given accidents happen, one per published step, and then no more."""

    def __init__(self, record: Record, accidents: list[str]) -> None:
        self.record = record
        self.accidents = accidents
        self.now = NOW

    def live(self) -> list[Decision]:
        decisions: list[Decision] = []
        while not self.record.state.final:
            leases_count = self._next("redis restarts") is None
            decisions.append(decide(self.record, {}, Clock(self.now, GRACE, leases_count)))
            self._do(decisions[-1])
            assert len(decisions) < 200, decisions[-5:]
        return decisions

    def _next(self, *kinds: str) -> str | None:
        return self.accidents.pop(0) if self.accidents and self.accidents[0] in kinds else None

    def _do(self, decision: Decision) -> None:
        if isinstance(decision, Look):
            self.now += decision.seconds
        elif isinstance(decision, TurnBack):
            self.record = replace(self.record, state=State.UNDOING, verdict=State.CANCELLED)
        elif isinstance(decision, End):
            self.record = replace(self.record, state=decision.state)
        elif isinstance(decision, Publish):
            for key in decision.heads:
                steps = {**self.record.steps, key: self._executed(self.record.steps[key])}
                self.record = replace(self.record, state=State.RUNNING, steps=steps)
            if any(step.state is StepState.FAILED for step in self.record.steps.values()):
                self.record = replace(self.record, state=State.UNDOING, verdict=State.FAILED)
        else:
            done = self._executed(decision.steps[0])
            steps_ = tuple(done if step.key == done.key else step for step in self.record.undo_steps)
            self.record = replace(self.record, undo_steps=steps_)

    def _executed(self, step: StepRecord) -> StepRecord:
        self.now += 1
        accident = self._next("message lost", "worker dies", "retry", "fails", "cancel")
        if accident == "cancel":
            self.record = replace(self.record, cancel=self.now)
        if accident in {"message lost", "cancel"}:
            return replace(step, published=self.now, publications=step.publications + 1)
        begun = replace(step, published=None, publications=0, attempt=step.attempt + 1)
        if accident == "worker dies":
            return replace(begun, state=StepState.RUNNING)
        if accident == "retry":
            return replace(begun, state=StepState.RETRY, due=self.now + 30)
        return replace(begun, state=StepState.FAILED if accident == "fails" else StepState.DONE, ended_at=self.now)


@given(records(states=[State.QUEUED, State.RUNNING, State.UNDOING]), st.lists(Accident, max_size=12))
def test_every_operation_ends_whatever_happens_on_its_way(record: Record, accidents: list[str]) -> None:
    life = Life(record, accidents)
    life.live()
    unfinished = {step.state for step in life.record.undo_steps} - {StepState.DONE}
    if life.record.state is State.SUCCEEDED:
        assert {step.state for step in life.record.steps.values()} == {StepState.DONE}
    elif life.record.state is not State.STUCK:
        assert not unfinished, "what was done is undone"


def test_what_follows_a_step_is_its_next_stage_once_all_beside_it_are_done() -> None:
    plans = [StepPlan(key, "s", "h1", "disk") for key in ("a", "b", "c", "d")]
    stages = ((plans[0],), (plans[1], plans[2]), (plans[3],))
    entries = tuple(UndoEntry("remove", "h1", {"n": n}) for n in range(2))

    def following(key: str, *done: str) -> list[str]:
        steps = {one.key: StepRecord(one, StepState.DONE if one.key in done else StepState.PENDING) for one in plans}
        undo_steps = tuple(StepRecord(undo_plan(number, entry)) for number, entry in enumerate(entries))
        record = Record("op", "test", {}, "vm", "u", "h1", State.RUNNING, stages, steps, entries, undo_steps)
        return [step.key for step in record.following(key)]

    assert following("a", "a") == ["b", "c"]
    assert following("b", "a", "b") == [], "c is not done"
    assert following("b", "a", "b", "c") == ["d"]
    assert following("d", "a", "b", "c", "d") == []
    assert following("undo:1") == ["undo:0"]
    assert following("undo:0") == []
