"""Operations: what a scheduler asks for. Requests are admitted here, by name or from this process."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any, NoReturn

import structlog
from celery.exceptions import Ignore
from pydantic import ValidationError

from worker.app import app
from worker.engine.advance import see_to
from worker.engine.answers import answer
from worker.engine.canvas import Canvas, stages_of
from worker.engine.journal import Waiter, journal
from worker.engine.kinds import Asked, Kind, Operation, add_kind, kind_for
from worker.engine.patience import patiently
from worker.engine.record import Record, State
from worker.engine.registry import registry
from worker.engine.requests import Request, Target
from worker.errors import BrokerUnavailable, FleetError, InstanceBusy, OperationConflict
from worker.models import explain

log = structlog.get_logger(__name__)

MOST_FIELDS = 64
"""Fields of a rejected request that its record keeps; no request has more."""

_OF_THE_CALL = ("operation_id", "wait_if_busy")


def operation(
    name: str, request: type[Asked]
) -> Callable[[Callable[[Operation[Asked]], Canvas]], Callable[[Operation[Asked]], Canvas]]:
    """Make a function that builds a canvas into a kind of operation, with a Celery task that admits it by name."""

    def register(build: Callable[[Operation[Asked]], Canvas]) -> Callable[[Operation[Asked]], Canvas]:
        kind = Kind(name, request, build)
        add_kind(kind)

        def by_name(task: Any, /, *unnamed: Any, **arguments: Any) -> None:
            # Requests have named fields only: what came without a name is rejected like an unknown field.
            _admit_by_name(kind, task, {**arguments, **({"args": list(unnamed)} if unnamed else {})})

        by_name.__doc__ = build.__doc__
        # track_started: were Redis to die as Celery notes that down, a request that was taken would be lost with it.
        app.task(name=name, bind=True, track_started=False)(by_name)
        return build

    return register


def submit(request: Request) -> Record:
    """Take a request in and set it going; the operation's record as it is then.

    Attaches to the operation when its id was used before for the same request. Raises `BadInput` errors (nothing but
    a record of the rejection is kept), `InstanceBusy`, `OperationConflict`, `BrokerUnavailable`.
    """
    return _admit(kind_for(request), request, request.operation_id or new_id())


def new_id() -> str:
    """An id for an operation whose caller gave none."""
    return f"op-{secrets.token_hex(6)}"


def _admit(kind: Kind[Any], request: Request, operation_id: str, waiter: Waiter | None = None) -> Record:
    book = journal()
    asked = request.model_dump(mode="json", exclude=set(_OF_THE_CALL))
    digest = hashlib.sha256(json.dumps([kind.name, asked], sort_keys=True).encode()).hexdigest()
    known = book.find(operation_id)
    if known and known.state is not State.REJECTED:
        return _attach(known, kind, asked)
    task = waiter[0] if waiter else ""
    if known and task and known.task == task:
        return known  # the same message again: it has had its answer
    try:
        target = request.target(registry(), operation_id)
        stages = stages_of(
            kind.build(Operation(operation_id, request, target.instance, target.uuid, target.host, target.details))
        )
        head = _head(kind, asked, target)
        admission = book.admit(operation_id, head, digest, stages, wait=request.wait_if_busy, waiter=waiter)
        if admission.outcome == "busy":
            raise InstanceBusy(
                f"instance {target.instance!r} is owned by operation {admission.detail}",
                hint=f"Wait for it (virtfleet watch {admission.detail}) or ask to be queued (--wait-if-busy).",
                owner=admission.detail,
            )
    except BrokerUnavailable:
        raise
    except FleetError as error:
        book.reject(operation_id, _head(kind, asked, _named(asked)), error.as_dict(), task)
        raise
    if admission.outcome == "exists":
        return _attach(book.read(operation_id), kind, asked)
    log.info("admitted", operation=operation_id, kind=kind.name, instance=target.instance, host=target.host)
    see_to(operation_id)
    try:
        return book.read(operation_id)
    except BrokerUnavailable as error:
        raise BrokerUnavailable(
            f"operation {operation_id} was accepted, but then Redis went silent: {error.message}",
            hint=f"It goes on by itself. Follow it: virtfleet watch {operation_id}",
            operation=operation_id,
        ) from error


def _attach(known: Record, kind: Kind[Any], asked: dict[str, Any]) -> Record:
    if (known.kind, known.request) != (kind.name, asked):
        differing = sorted(key for key in {*asked, *known.request} if asked.get(key) != known.request.get(key))
        raise OperationConflict(
            f"operation id {known.id!r} was used before for another request "
            f"({known.kind} of {known.instance!r}; differing: {', '.join(differing) or 'kind'})",
            operation=known.id,
        )
    return known


def _head(kind: Kind[Any], asked: dict[str, Any], target: Target) -> dict[str, Any]:
    return {
        "kind": kind.name,
        "request": asked,
        "instance": target.instance,
        "uuid": target.uuid,
        "host": target.host,
        "details": target.details,
    }


def _named(asked: dict[str, Any]) -> Target:
    """What a rejected request says of its target, for the record; no longer than a good one could be."""
    return Target(str(asked.get("instance") or asked.get("name") or "")[:63], "", str(asked.get("host") or "")[:63])


def _admit_by_name(kind: Kind[Any], task: Any, arguments: dict[str, Any]) -> NoReturn:
    """Body of the task a scheduler sends: answered with the final record, now or when the operation ends."""
    given = arguments.get("operation_id")
    # Celery may deliver a message twice: a task without an id of the caller's gets one that is always the same.
    own_id = f"op-{hashlib.sha256(task.request.id.encode()).hexdigest()[:12]}"
    operation_id = given if isinstance(given, str) and given else own_id
    task_id, worker = task.request.id, str(task.request.hostname)
    try:
        request = _validated(kind, arguments, operation_id)
        # The message is gone from its queue: Redis being away is no reason to turn the request away.
        record = patiently(_admit, kind, request, operation_id, (task_id, worker))
    except FleetError as error:
        record = _turned_away(kind, operation_id, arguments, error)
    else:
        if not record.state.final and patiently(journal().wait_for, record.id, (task_id, worker)):
            raise Ignore  # answered when the operation ends
        record = patiently(journal().read, record.id)
    patiently(answer, task_id, worker, record)
    raise Ignore


def _validated(kind: Kind[Any], arguments: dict[str, Any], operation_id: str) -> Request:
    try:
        request: Request = kind.request.model_validate(arguments)
    except ValidationError as error:
        reason = explain(error)
        head = _head(kind, _bounded(arguments), _named(arguments))
        if not any(one["field"] == "operation_id" for one in reason.details["fields"]):
            patiently(journal().reject, operation_id, head, reason.as_dict())
        raise reason from error
    return request


def _bounded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments few and short enough to be kept in the record of their rejection."""
    kept = dict(list(arguments.items())[:MOST_FIELDS])
    return {key[:100]: value if len(json.dumps(value)) <= 1000 else "<too long>" for key, value in kept.items()}


def _turned_away(kind: Kind[Any], operation_id: str, arguments: dict[str, Any], error: FleetError) -> Record:
    target = _named(arguments)
    return Record(
        id=operation_id,
        kind=kind.name,
        request=_bounded(arguments),
        instance=target.instance,
        uuid="",
        host=target.host,
        state=State.REJECTED,
        error=error.as_dict(),
    )
