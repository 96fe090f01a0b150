"""What users may ask of an operation that is under way: to stop; or, when it is stuck, to try its undo again."""

from __future__ import annotations

from collections.abc import Callable

from worker.app import app
from worker.engine.advance import advance
from worker.engine.journal import Journal, journal
from worker.engine.patience import patiently
from worker.engine.record import Record, State
from worker.engine.registry import registry
from worker.errors import FleetError, InstanceBusy, InvalidState, OperationNotFound


def cancel(operation_id: str, *, give_up: bool = False) -> Record:
    """Ask an operation to stop; its record as it is then. Asking again, or too late, changes nothing.

    Too late is also when it is `irrevocable`: part of what it removes may be gone. With `give_up` it ends as it is: for
    an operation on a host that does not come back.

    Raises `OperationNotFound`, `BrokerUnavailable`. One that is not found may wait in a queue, as long as no worker is
    up: it will be cancelled as it arrives.
    """
    book = journal()
    try:
        state = book.cancel(operation_id, give_up=give_up)
    except OperationNotFound:
        registry().require_settled(f"operation {operation_id!r}")  # else its host is about to put it back
        state = _cancel_on_arrival(book, operation_id, give_up=give_up)
    if not state.final:
        advance(operation_id, prompt=True)
    return book.read(operation_id)


def _cancel_on_arrival(book: Journal, operation_id: str, *, give_up: bool) -> State:
    try:
        return book.cancel(operation_id, give_up=give_up, on_arrival=True)
    except OperationNotFound as error:
        raise OperationNotFound(
            error.message,
            hint="Should a request with this id still be queued, it will be cancelled as it arrives. "
            f"{error.default_hint}",
        ) from error


def retry_undo(operation_id: str) -> Record:
    """Try again to undo an operation that is stuck; its record as it is then.

    Raises `OperationNotFound`, `InvalidState` when it is not stuck, `InstanceBusy`.
    """
    book = journal()
    record = book.read(operation_id)
    answer, detail = book.retry_undo(record)
    if answer == "state":
        raise InvalidState(f"operation {operation_id} is {detail}, not stuck: there is nothing to try again")
    if answer == "busy":
        raise InstanceBusy(f"instance {record.instance!r} is owned by operation {detail} now", owner=detail)
    advance(operation_id, prompt=True)
    return book.read(operation_id)


@app.task(name="virtfleet.cancel", track_started=False)
def cancel_by_name(operation_id: str, *, give_up: bool = False) -> dict[str, object]:
    """Cancel an operation, for schedulers that send tasks by name."""
    # The message is gone from its queue: Redis being away is no reason to forget the wish.
    return _answer(lambda one: patiently(cancel, one, give_up=give_up), operation_id)


@app.task(name="virtfleet.retry_undo", track_started=False)
def retry_undo_by_name(operation_id: str) -> dict[str, object]:
    """Try again to undo an operation that is stuck, for schedulers that send tasks by name."""
    return _answer(retry_undo, operation_id)


def _answer(intervene: Callable[[str], Record], operation_id: str) -> dict[str, object]:
    """The record, or what stands against it in the form of a record: a bare client knows none of our exceptions."""
    try:
        return intervene(operation_id).as_dict()
    except FleetError as error:
        return {"id": operation_id, "state": State.REJECTED.value, "error": error.as_dict()}
