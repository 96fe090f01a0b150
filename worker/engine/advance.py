"""Doing what an operation needs next: publish its steps, undo them, or end it and tell who waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog
from celery import chain

from worker.app import app
from worker.engine.answers import answer
from worker.engine.canvas import Canvas, remaining, step_signature
from worker.engine.connection import translated
from worker.engine.decide import Clock, Decision, End, Look, Publish, Queues, TurnBack, Undo, decide
from worker.engine.journal import Journal, journal
from worker.engine.mirror import LOOK_EVERY, Mirror
from worker.engine.queues import QueueLook
from worker.engine.record import Record, State, StepRecord, StepState
from worker.engine.registry import registry
from worker.engine.silence import silence
from worker.errors import BrokerUnavailable, Cancelled
from worker.settings import get_settings

log = structlog.get_logger(__name__)

UNDO_TASK = "undo"

RENEWED = 3.0
"""Seconds after Redis' silence, or its loss of a record, in which every worker that lives has renewed its leases: it
tries twice a second. As in lua/common.lua."""


def advance(operation_id: str, *, prompt: bool = False, queues: Queues | None = None) -> Decision | None:
    """Decide what an operation needs and do it; what was decided, or None when there is no such operation.

    Safe to call at any time by anybody: what it publishes twice runs once. `queues`: for who advances many at a time.
    """
    book = journal()
    clock = _clock(book)
    record = book.find(operation_id)
    if record is None:
        book.forget_attention(operation_id)
        return None
    if record.held is not None and not _may_go_on(book, record):
        book.look_in(operation_id, LOOK_EVERY / 2, since=clock.now)
        return Look(LOOK_EVERY / 2)
    if record.state is State.WAITING:
        book.release(record.instance)  # where the owner it waits for has ended without a word
        record = book.find(operation_id) or record
    if record.restored is not None and clock.now - record.restored < RENEWED:
        clock = replace(clock, leases_count=False)
    executing = [step for step in (*record.steps.values(), *record.undo_steps) if step.state is StepState.RUNNING]
    leases = book.leases(record, executing)
    decision = decide(record, leases, clock, prompt=prompt, queues=queues or QueueLook(book.redis))
    match decision:
        case Publish(heads):
            _publish(book, record, heads, clock)
        case Undo(steps):
            _publish_undo(book, record, steps, clock)
        case TurnBack():
            turn_back(operation_id)
        case End(state):
            _end(book, record, state)
        case Look(seconds):
            book.look_in(operation_id, seconds, since=clock.now)
    return decision


def _may_go_on(book: Journal, record: Record) -> bool:
    """Whether a record that was put back knows all that its hosts know of it; if so it is held no longer.

    A host is introduced after it has looked through its copies, and looks again twice in the time that all are held.
    For one that stays away the others wait so long: what it may have done is not done again before it is back, nor
    undone, for that has to be done there.
    """
    age = book.now() - (record.held or 0.0)
    away = [host for host in record.hosts if not (registry().knows(host) and registry().alive(host))]
    if age < 2 * LOOK_EVERY or (away and age < get_settings().hold_for_hosts):
        return False
    if away:
        log.error("goes on without hosts that may know more of it", operation=record.id, hosts=sorted(away))
    book.let_go(record.id)
    return True


def see_to(operation_id: str) -> None:
    """Do at once what an operation needs next; while Redis is away, leave it to the reaper."""
    try:
        advance(operation_id, prompt=True)
    except BrokerUnavailable as error:
        log.warning("Redis is away; the reaper goes on from here", operation=operation_id, error=str(error))


def turn_back(operation_id: str) -> None:
    """Begin to undo an operation that was asked to stop while none of its steps runs."""
    reason = Cancelled(f"operation {operation_id} was cancelled on request")
    journal().begin_undo(operation_id, State.CANCELLED, reason.as_dict())
    advance(operation_id, prompt=True)


def _clock(book: Journal) -> Clock:
    settings = get_settings()
    # Leases run out while Redis is away, or silent; whoever is alive renews within this time.
    renewed = book.uptime() > 1.5 * settings.lease_ttl and silence.over_for > RENEWED
    return Clock(book.now(), settings.publish_grace, leases_count=renewed)


def _publish(book: Journal, record: Record, heads: tuple[str, ...], clock: Clock) -> None:
    app.loader.import_default_modules()  # a client that only cancels has imported no step
    left = [key for key, step in record.steps.items() if step.state is not StepState.DONE]
    stage = next(stage for stage in record.stages if any(plan.key in heads for plan in stage))
    beside = {plan.key for plan in stage} & set(left) - set(heads)
    # With a step of the same stage still in somebody's hands, what follows is published by whoever ends last.
    wanted = heads if beside else left
    canvas = remaining(record.stages, wanted, record.id, record.instance)
    _send(book, record, canvas, [record.steps[key] for key in heads], clock)


def _publish_undo(book: Journal, record: Record, steps: Sequence[StepRecord], clock: Clock) -> None:
    app.loader.import_default_modules()  # a client that only cancels has imported no step
    task = app.tasks[UNDO_TASK]
    messages = [step_signature(task, step.plan, record.id, record.instance) for step in steps]
    _send(book, record, messages[0] if len(messages) == 1 else chain(*messages), steps[:1], clock)


def _send(book: Journal, record: Record, canvas: Canvas, heads: Sequence[StepRecord], clock: Clock) -> None:
    book.look_in(record.id, clock.grace, since=clock.now)
    try:
        with translated():
            canvas.apply_async()
    except (BrokerUnavailable, RuntimeError) as error:  # RuntimeError: Celery could not note down a chord's size
        steps = [step.key for step in heads]
        log.warning("could not publish; the reaper will", operation=record.id, steps=steps, error=str(error))
        return
    book.mark_published(record.id, heads)


def _end(book: Journal, record: Record, state: State) -> None:
    first, heir = book.conclude(record, state)
    if first:
        log.info("ended", operation=record.id, kind=record.kind, instance=record.instance, state=state.value)
    Mirror().close(record.id, state, record.hosts, record.submitted_at)
    _tell(book, record.id)
    if heir:
        advance(heir, prompt=True)


def _tell(book: Journal, operation_id: str) -> None:
    """Store the final record as the result of every Celery task that waits for it, and show it in Flower."""
    record = book.find(operation_id)
    for task_id, worker in book.waiters(operation_id):
        if record:
            answer(task_id, worker, record)
        book.waiter_answered(operation_id, task_id, worker)
    book.forget_attention(operation_id)
