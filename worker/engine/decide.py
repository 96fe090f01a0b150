"""What an operation needs next, decided from its record alone: a pure function, so every case can be tried.

Both the worker that just ended a step and the reaper that finds an operation at rest ask it, so that there is
one answer to "what now?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.engine.record import Record, State, StepPlan, StepRecord, StepState

MAX_GRACE = 300.0
"""Seconds: the longest pause between two publications of a step that waits behind others in its queue."""


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


def decide(record: Record, leases: Mapping[str, float], clock: Clock, *, prompt: bool = False) -> Decision:
    """What to do for an operation.

    `leases` tells for each leased step how many seconds its lease still runs. With `prompt` a step that was never
    published goes out at once; without it, only after the grace in which its message may still be on its way.
    """
    if record.state.final:
        return End(record.state)
    if record.state is State.WAITING:
        return TurnBack() if record.cancel else Look(clock.grace)
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
    since = max(step.published or 0.0, _ready_since(record))
    patience = min(clock.grace * 2.0 ** min(max(step.publications - 1, 0), 20), MAX_GRACE)
    return since + patience - clock.now


def _ready_since(record: Record) -> float:
    """When nothing stood before the step any more: the end of the latest step before it, or the admission."""
    ends: Sequence[float] = [other.ended_at for other in (*record.steps.values(), *record.undo_steps) if other.ended_at]
    return max([record.submitted_at, *ends])


def _left(record: Record, stage: Sequence[StepPlan]) -> list[StepRecord]:
    steps = [record.steps[plan.key] for plan in stage]
    return [step for step in steps if step.state not in {StepState.DONE, StepState.FAILED}]
