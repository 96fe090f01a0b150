"""Doing what an operation needs next: publish its steps, undo them, or end it and tell who waits."""

from __future__ import annotations

import time

import structlog
from celery import chain
from kombu.exceptions import OperationalError

from worker.app import app
from worker.engine.canvas import remaining, step_signature
from worker.engine.decide import Clock, Decision, End, Look, Publish, TurnBack, Undo, decide
from worker.engine.journal import Journal, journal
from worker.engine.kinds import kind_of
from worker.engine.record import Record, State, StepState
from worker.errors import Cancelled
from worker.settings import get_settings

log = structlog.get_logger(__name__)

UNDO_TASK = "undo"


def advance(operation_id: str, *, prompt: bool = False, leases_count: bool = True) -> Decision | None:
    """Decide what an operation needs and do it; what was decided, or None when there is no such operation.

    Safe to call at any time by anybody: what it publishes twice runs once.
    """
    book = journal()
    record = book.find(operation_id)
    if record is None:
        book.forget_attention(operation_id)
        return None
    executing = [step for step in (*record.steps.values(), *record.undo_steps) if step.state is StepState.RUNNING]
    clock = Clock(book.now(), get_settings().publish_grace, leases_count)
    decision = decide(record, book.leases(record, executing), clock, prompt=prompt)
    match decision:
        case Publish(heads):
            _publish(book, record, heads)
        case Undo(steps):
            _publish_undo(book, record, [step.key for step in steps])
        case TurnBack():
            turn_back(operation_id)
        case End(state):
            _end(book, record, state)
        case Look(seconds):
            book.look_in(operation_id, seconds)
    return decision


def turn_back(operation_id: str) -> None:
    """Begin to undo an operation that was asked to stop while none of its steps runs."""
    reason = Cancelled(f"operation {operation_id} was cancelled on request")
    journal().begin_undo(operation_id, State.CANCELLED, reason.as_dict())
    advance(operation_id, prompt=True)


def _publish(book: Journal, record: Record, heads: tuple[str, ...]) -> None:
    operation = kind_of(record.kind).of(record)
    left = [key for key, step in record.steps.items() if step.state is not StepState.DONE]
    stage = next(stage for stage in record.stages if any(plan.key in heads for plan in stage))
    beside = {plan.key for plan in stage} & set(left) - set(heads)
    # With a step of the same stage still in somebody's hands, what follows is published by whoever ends last.
    wanted = heads if beside else left
    canvas = remaining(kind_of(record.kind).build(operation), wanted)
    _send(book, record, canvas, heads)


def _publish_undo(book: Journal, record: Record, steps: list[str]) -> None:
    plans = {step.key: step.plan for step in record.undo_steps}
    task = app.tasks[UNDO_TASK]
    messages = [step_signature(task, plans[key], record.id, record.instance) for key in steps]
    _send(book, record, messages[0] if len(messages) == 1 else chain(*messages), steps[:1])


def _send(book: Journal, record: Record, canvas: object, heads: tuple[str, ...] | list[str]) -> None:
    try:
        canvas.apply_async()  # type: ignore[attr-defined]
    except OperationalError as error:
        log.warning("could not publish; the reaper will", operation=record.id, steps=heads, error=str(error))
        return
    book.mark_published(record.id, heads)
    book.look_in(record.id, get_settings().publish_grace)


def _end(book: Journal, record: Record, state: State) -> None:
    first, heir = book.conclude(record, state)
    if first:
        log.info("ended", operation=record.id, kind=record.kind, instance=record.instance, state=state.value)
    _tell(book, record.id)
    if heir:
        advance(heir, prompt=True)


def _tell(book: Journal, operation_id: str) -> None:
    """Store the final record as the result of every Celery task that waits for it, and show it in Flower."""
    record = book.find(operation_id)
    for task_id, worker in book.waiters(operation_id):
        result = record.as_dict() if record else None
        app.backend.store_result(task_id, result, "SUCCESS")
        _show_ended(task_id, worker, record)
        book.waiter_answered(operation_id, task_id, worker)
    book.forget_attention(operation_id)


def _show_ended(task_id: str, worker: str, record: Record | None) -> None:
    """Tell Flower how the operation behind a by-name task ended; the task itself answered long ago."""
    if record is None:
        return
    with app.events.default_dispatcher(hostname=worker) as dispatcher:
        if record.state is State.SUCCEEDED:
            took = (record.ended_at or time.time()) - record.submitted_at
            dispatcher.send("task-succeeded", uuid=task_id, result=f"{record.id} succeeded", runtime=took)
        else:
            message = (record.error or {}).get("message", "")
            dispatcher.send("task-failed", uuid=task_id, exception=f"{record.id} {record.state.value}: {message}")
