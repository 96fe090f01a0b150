"""Cancelling: a durable wish that every step hears within half a second, and that needs no worker to be heard."""

from __future__ import annotations

from worker.app import SHARED_QUEUE, app
from worker.engine.advance import advance
from worker.engine.journal import journal
from worker.engine.record import Record


def cancel(operation_id: str) -> Record:
    """Ask an operation to stop; its record as it is then. Asking again, or too late, changes nothing.

    Raises `OperationNotFound`, `BrokerUnavailable`.
    """
    book = journal()
    if not book.cancel(operation_id).final:
        advance(operation_id, prompt=True)
    return book.read(operation_id)


@app.task(name="virtfleet.cancel", queue=SHARED_QUEUE)
def cancel_by_name(operation_id: str) -> dict[str, object]:
    """Cancel an operation, for schedulers that send tasks by name."""
    return cancel(operation_id).as_dict()
