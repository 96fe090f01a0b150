"""What an operation needs next, decided from its record alone: a pure function, so every case can be tried.

Both the worker that just ended a step and the reaper that finds an operation at rest ask it, so that there is
one answer to "what now?".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from worker.engine.record import Record, State, StepPlan, StepRecord, StepState

MAX_GRACE = 300.0
"""Seconds: the longest pause between two publications of a step, or between two looks at what waits."""


class Traffic(StrEnum):
    """What there is in a queue, and whether somebody takes it."""

    NONE = "no message waits"
    FLOWS = "messages wait, and a worker takes one after the other"
    STANDS = "messages wait, and no worker is up"


Queues = Callable[[StepPlan], Traffic]
"""Tells how it stands in the queue of a step."""


@dataclass(frozen=True)
class Publish:
    """Send messages for the steps that are left; the first of them are `heads`."""

    heads: tuple[str, ...]


@dataclass(frozen=True)
class Undo:
    """Send messages for the undo entries that are left, newest first."""

    steps: tuple[StepRecord, ...]


@dataclass(frozen=True)
class TurnBack:
    """Nobody executes anything and a cancel was asked for: begin to undo."""


@dataclass(frozen=True)
class End:
    """Nothing is left to do."""

    state: State


@dataclass(frozen=True)
class Look:
    """Nothing to do now; look again in so many seconds."""

    seconds: float


Decision = Publish | Undo | TurnBack | End | Look


@dataclass(frozen=True)
class Clock:
    """The time, and how patient to be. Seconds."""

    now: float
    grace: float
    leases_count: bool = True
    """False just after Redis restarted: leases ran out while nobody could renew them."""


def decide(
    record: Record,
    leases: Mapping[str, float],
    clock: Clock,
    *,
    prompt: bool = False,
    queues: Queues = lambda _: Traffic.NONE,
) -> Decision:
    """What to do for an operation.

    `leases` tells for each leased step how many seconds its lease still runs. With `prompt` a step that was never
    published goes out at once; without it, only after the grace in which its message may still be on its way.
    """
    return _without_queueing_twice(_next(record, leases, clock, prompt=prompt), record, clock, queues)


def _next(record: Record, leases: Mapping[str, float], clock: Clock, *, prompt: bool) -> Decision:
    if record.state.final:
        return End(record.state)
    if record.state is State.WAITING:
        return TurnBack() if record.cancel else Look(_as_long_again(record.submitted_at, clock))
    if record.state is State.UNDOING:
        return _undoing(record, leases, clock, prompt=prompt)
    return _running(record, leases, clock, prompt=prompt)


def _running(record: Record, leases: Mapping[str, float], clock: Clock, *, prompt: bool) -> Decision:
    stage = next((stage for stage in record.stages if _left(record, stage)), None)
    if stage is None:
        return End(State.SUCCEEDED)
    left = _left(record, stage)
    if record.cancel and not any(_is_in_hands(step, leases, clock) for step in record.steps.values()):
        return TurnBack()
    waits = {step.key: _wait(step, record, leases, clock, prompt=prompt) for step in left}
    ready = tuple(key for key, wait in waits.items() if wait <= 0)
    return Publish(ready) if ready else Look(min(waits.values()))


def _undoing(record: Record, leases: Mapping[str, float], clock: Clock, *, prompt: bool) -> Decision:
    executing = [step for step in record.steps.values() if step.state is StepState.RUNNING]
    held = [leases[step.key] for step in executing if step.key in leases]
    if held:
        return Look(min(held))  # a sibling still works: undoing beside it would pull the ground from under it
    if executing and not clock.leases_count:
        return Look(clock.grace)
    if any(step.state is StepState.FAILED for step in record.undo_steps):
        return End(State.STUCK)
    left = tuple(step for step in reversed(record.undo_steps) if step.state is not StepState.DONE)
    if not left:
        return End(record.verdict or State.FAILED)
    wait = _wait(left[0], record, leases, clock, prompt=prompt)
    return Undo(left) if wait <= 0 else Look(wait)


def _without_queueing_twice(decision: Decision, record: Record, clock: Clock, queues: Queues) -> Decision:
    """Leave out what seems to wait in its queue already: that must not grow by what it holds."""
    if isinstance(decision, Publish):
        wanted = [record.steps[key] for key in decision.heads]
    elif isinstance(decision, Undo):
        wanted = [decision.steps[0]]
    else:
        return decision
    missing = [step for step in wanted if not _is_in_line(step, record, clock, queues)]
    if not missing:
        return Look(min(_as_long_again(_since(step, record), clock) for step in wanted))
    return Publish(tuple(step.key for step in missing)) if isinstance(decision, Publish) else decision


def _is_in_line(step: StepRecord, record: Record, clock: Clock, queues: Queues) -> bool:
    """Whether the message of a step seems to wait behind others; should it be lost, it goes out once they are gone."""
    if step.published is None:
        return False
    traffic = queues(step.plan)
    is_recent = clock.now - _since(step, record) < MAX_GRACE
    return traffic is Traffic.STANDS or (traffic is Traffic.FLOWS and is_recent)


def _as_long_again(since: float, clock: Clock) -> float:
    """Seconds until the next look at what has waited since then, and may wait for long: ever more seldom."""
    return min(max(clock.now - since, clock.grace), MAX_GRACE)


def _is_in_hands(step: StepRecord, leases: Mapping[str, float], clock: Clock) -> bool:
    """Whether somebody executes the step, or may do so for all that is known."""
    return step.key in leases or (step.state is StepState.RUNNING and not clock.leases_count)


def _wait(step: StepRecord, record: Record, leases: Mapping[str, float], clock: Clock, *, prompt: bool) -> float:
    """Seconds until the step must be published; zero or less: now."""
    if step.key in leases:
        return max(leases[step.key], 0.05)
    if step.state is StepState.RUNNING and not clock.leases_count:
        return clock.grace
    if step.state is StepState.RETRY and step.due is not None and step.due > clock.now:
        return step.due - clock.now
    if step.published is None and (prompt or step.state is not StepState.PENDING):
        return 0.0
    patience = min(clock.grace * 2.0 ** min(max(step.publications - 1, 0), 20), MAX_GRACE)
    return _since(step, record) + patience - clock.now


def _since(step: StepRecord, record: Record) -> float:
    """When the step was published last, or could have been."""
    return max(step.published or 0.0, _ready_since(record))


def _ready_since(record: Record) -> float:
    """When nothing stood before the step any more: the end of the latest step before it, or the admission."""
    ends: Sequence[float] = [other.ended_at for other in (*record.steps.values(), *record.undo_steps) if other.ended_at]
    return max([record.submitted_at, *ends])


def _left(record: Record, stage: Sequence[StepPlan]) -> list[StepRecord]:
    steps = [record.steps[plan.key] for plan in stage]
    return [step for step in steps if step.state not in {StepState.DONE, StepState.FAILED}]
