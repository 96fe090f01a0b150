"""Answering by-name tasks: their result is an operation's final record, whether or not the task itself still runs."""

from __future__ import annotations

import time

from worker.app import app
from worker.engine import events
from worker.engine.connection import translated
from worker.engine.record import Record, State


def answer(task_id: str, worker: str, record: Record) -> None:
    """Store the record as the task's result, and show in Flower how the operation ended; as that worker.

    The result is always a success of Celery's: a scheduler that knows none of our exceptions gets the record all the
    same. Flower, where people look, shows an operation that failed as a failure. Raises `BrokerUnavailable`.
    """
    with translated():
        app.backend.store_result(task_id, record.as_dict(), "SUCCESS")
    if record.state is State.SUCCEEDED:
        took = (record.ended_at or time.time()) - record.submitted_at
        events.tell(worker, "task-succeeded", task_id, result=f"{record.id} succeeded", runtime=took)
    else:
        message = (record.error or {}).get("message", "")
        events.tell(worker, "task-failed", task_id, exception=f"{record.id} {record.state.value}: {message}")
