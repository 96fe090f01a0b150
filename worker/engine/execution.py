"""Executing one step once: take its lease, do the work, put down how it ended, see to what comes next."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from celery.exceptions import Ignore

from worker.context import watched_by
from worker.engine import events
from worker.engine.advance import see_to, turn_back
from worker.engine.attempts import Attempts
from worker.engine.journal import Answer, Journal, Outcome, Phase, journal
from worker.engine.lease import LeaseKeeper
from worker.engine.mirror import Mirror
from worker.engine.patience import patiently
from worker.engine.record import UNDO_STEP, State, StepState
from worker.engine.step_context import StepContext
from worker.engine.succession import new_token
from worker.engine.turn import require_unchanged
from worker.errors import (
    BrokerUnavailable,
    Cancelled,
    FencedOff,
    FenceTooLow,
    FleetError,
    InstanceLocked,
    InternalError,
    WorkerLost,
)

if TYPE_CHECKING:
    from worker.engine.step import Step

log = structlog.get_logger(__name__)

_here: set[tuple[str, str]] = set()
"""The steps that threads of this process are at, by operation and key."""
_here_lock = threading.Lock()


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    outcome: Outcome
    result: Any = None
    error: FleetError | None = None


def execute(made: Step[Any], task: Any, operation_id: str, key: str, instance: str) -> Any:
    """Body of every step's Celery task. Messages that come twice, late or out of turn do no harm."""
    book = journal()
    phase: Phase = "undo" if key.startswith(UNDO_STEP) else "run"
    worker, token = str(task.request.hostname), new_token()
    with structlog.contextvars.bound_contextvars(operation=operation_id, step=key), _alone(operation_id, key) as alone:
        if not alone:
            return _decline(task, book, "leased", operation_id, key)
        if _had_ended(book, operation_id):
            return _decline(task, book, "ended", operation_id, key)
        answer, lease = patiently(book.acquire, operation_id, key, instance, worker=worker, token=token, phase=phase)
        if lease is None:
            return _decline(task, book, answer, operation_id, key)
        with LeaseKeeper(book, lease) as keeper:
            ctx = StepContext(keeper.record(), lease, keeper, book, task)
            ending = _attempt(made, ctx)
            committed = _commit(made, ctx, book, keeper, ending)
        return _go_on(task, ctx, ending, committed=committed)


@contextmanager
def _alone(operation_id: str, key: str) -> Iterator[bool]:
    """Whether no other thread of this process is at this step: one may that stood still till its lease ran out."""
    with _here_lock:
        alone = (operation_id, key) not in _here
        _here.add((operation_id, key))
    try:
        yield alone
    finally:
        if alone:
            with _here_lock:
                _here.remove((operation_id, key))


def _had_ended(book: Journal, operation_id: str) -> bool:
    """Whether this host knows that the operation has ended, which a host with an older copy of it did not."""
    end = Mirror().ended(operation_id)
    record = patiently(book.find, operation_id) if end else None
    if not end or not record or record.state.final or record.submitted_at != end.submitted_at:
        return False
    log.warning("put back by another host, but it had ended", state=end.state.value)
    patiently(book.conclude, record, end.state)
    see_to(operation_id)
    return True


@contextmanager
def _logged(ctx: StepContext) -> Iterator[None]:
    """Say in the host's log from when to when this process works: whatever Redis says, that shows who did what."""
    facts = {"instance": ctx.instance, "attempt": ctx.lease.attempt, "fence": ctx.fence, "pid": os.getpid()}
    log.info("begins", **facts, at=time.monotonic())
    try:
        yield
    except InstanceLocked:
        facts["met_lock"] = True
        raise
    finally:
        log.info("ends", **facts, at=time.monotonic())


def _attempt(made: Step[Any], ctx: StepContext) -> Ending:
    attempts = Attempts(ctx, made.retries)
    if attempts.were_lost:
        return Ending("failed", error=WorkerLost(f"the worker died {ctx.step.lost} times in this step"))
    try:
        ctx.check()  # this process may have stood still since it took the step
        with _logged(ctx), watched_by(ctx):
            require_unchanged(ctx)
            result = made.run(ctx)
        ctx.flush()
        return Ending("done", result)
    except FleetError as error:
        return Ending("retry" if attempts.may_follow(error) else "failed", error=error)
    except Exception as error:
        log.exception("unforeseen error")
        told = InternalError(f"{type(error).__name__}: {error}")
        return Ending("retry" if attempts.may_follow(error) else "failed", error=told)


def _commit(made: Step[Any], ctx: StepContext, book: Journal, keeper: LeaseKeeper, ending: Ending) -> bool:
    """Put the ending down, waiting for Redis as long as it takes; False when a newer execution owns the step."""
    if isinstance(ending.error, FencedOff):
        return False
    lease, error = ctx.lease, ending.error
    if isinstance(error, FenceTooLow):
        # Where a newer execution was here, the journal refuses what follows. Where the fence came from a Redis that was
        # lost since, or whose clock was ahead, the next attempt gets a higher one.
        patiently(book.outgrow, error.details["current_fence"])
    attempts = Attempts(ctx, made.retries)
    fields = {"result": ending.result} if error is None else {"error": _told(error, attempts)}
    fields |= attempts.noted(error)
    pause = attempts.pause_after(error) if ending.outcome == "retry" else ctx.settings.publish_grace
    verdict = _verdict(ctx, book, error) if error and ending.outcome == "failed" else None

    def commit() -> str:
        return patiently(book.commit, lease, ending.outcome, look_in=pause, verdict=verdict, **fields)

    answer = commit()
    if answer == "gone":
        patiently(keeper.restore)
        answer = commit()
    if answer == "ok":
        keeper.refresh()
    return answer == "ok"


def _told(error: FleetError, attempts: Attempts) -> dict[str, Any]:
    """The error with where and when it happened."""
    ctx = attempts.ctx
    return {**error.as_dict(), "step": ctx.lease.step, "host": ctx.host, **attempts.told(error)}


def _verdict(ctx: StepContext, book: Journal, error: FleetError) -> State | None:
    """How the operation will end once it is undone; an undo step that fails has no say in that."""
    if ctx.is_undo:
        return None
    if isinstance(error, Cancelled):
        return State.CANCELLED
    found = patiently(book.find, ctx.operation)
    made_nothing = found is not None and not found.undo
    return State.REJECTED if error.bad_input and made_nothing else State.FAILED


def _go_on(task: Any, ctx: StepContext, ending: Ending, *, committed: bool) -> Any:
    """Leave what follows to Celery's chain where there is one; else see what the operation needs now."""
    if not committed:
        log.warning("refused: a newer execution owns this step")
        raise _ignored(task, "task-rejected")
    if ending.error is None:
        if not task.request.chain:
            see_to(ctx.operation)
        return ending.result
    log.warning(ending.outcome, code=ending.error.code, error=str(ending.error), attempt=ctx.lease.attempt)
    if ending.outcome == "retry":
        # The reaper publishes it when it is due: a message with an ETA would kill a Celery 5.7 worker.
        raise _ignored(task, "task-retried", exception=str(ending.error))
    see_to(ctx.operation)
    raise ending.error


def _decline(task: Any, book: Journal, answer: Answer, operation_id: str, key: str) -> Any:
    """A message for a step that is not to run now: go on where it is done already, else end quietly."""
    log.info("declined", answer=answer)
    if answer == "done" and _pass_on(book, operation_id, key):
        return None  # what it returned is in the journal
    if answer == "cancel":
        turn_back(operation_id)
    raise _ignored(task, "task-rejected")


def _pass_on(book: Journal, operation_id: str, key: str) -> bool:
    """Whether a message for a step that is done has to see to the next one: who did it may have died.

    Only once: were every message that came twice to send another one, each step of an operation would double them.
    """
    record = patiently(book.find, operation_id)
    following = record.following(key) if record else ()
    if not following or any(step.state is not StepState.PENDING or step.published for step in following):
        return False
    patiently(book.mark_published, operation_id, following)
    return True


def _ignored(task: Any, event: str, **fields: Any) -> Ignore:
    """What ends this message without a result; Flower is told why, or would show it as started for ever."""
    try:
        events.tell(task.request.hostname, event, task.request.id, **fields)
    except BrokerUnavailable as error:
        log.debug("not shown in Flower", told=event, error=str(error))
    return Ignore()
