"""Why an operation does not move: for people who look after the fleet."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from worker.engine.record import Record, State, StepRecord, StepState

TAKEN_WITHIN = 15.0
"""Seconds after the publication of a step from which on "nobody has taken it" is worth telling, if no worker is up."""

OFTEN = 6
"""Publications of a step, ten minutes of them, after which that is worth telling also of a worker that is up: until
then it has enough to do, as a rule."""

Alive = Callable[[str], Container[str]]
"""Tells which kinds of worker a host has up."""


def why_stalled(record: Record, leases: Mapping[str, float], now: float, alive: Alive) -> str:
    """What holds an operation up; empty when it moves or waits its turn. `leases`: seconds by step, if leased.

    `now` by Redis' clock.
    """
    if record.state is State.STUCK:
        undo = zip(record.undo, record.undo_steps, strict=True)
        left = [f"{entry.action} on {entry.host}" for entry, step in undo if step.state is not StepState.DONE]
        return f"undo failed; remains: {', '.join(left)} (try again: virtfleet operation retry-undo {record.id})"
    if record.state.final:
        return ""
    if record.held is not None:
        hosts = ", ".join(sorted(record.hosts))
        return f"put back after Redis had lost it: waits until each of its hosts ({hosts}) has told what it knows"
    reasons = [_why(step, leases, now, alive) for step in (*record.steps.values(), *record.undo_steps)]
    return "; ".join(reason for reason in reasons if reason)


def _why(step: StepRecord, leases: Mapping[str, float], now: float, alive: Alive) -> str:
    where = f"{step.key} on {step.plan.host}"
    if step.state is StepState.RETRY and step.error:
        attempts = f"attempt {step.error.get('attempt', step.attempt)} of {step.error.get('attempts', '?')}"
        return f"{where}: {attempts} failed: {step.error['message']}"
    if step.state is StepState.RUNNING and step.key not in leases:
        return f"{where}: its worker {step.worker} fell silent"
    if step.published is not None and step.state is not StepState.DONE:
        ago = now - step.published
        if step.publications >= OFTEN if step.plan.queue in alive(step.plan.host) else ago > TAKEN_WITHIN:
            return f"{where}: published {step.publications} times, last {ago:.0f} s ago, and no worker has taken it"
    return ""
