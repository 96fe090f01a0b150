"""Answers of tasks. Those of operations by name are their final records, whether or not the task itself still runs."""

from __future__ import annotations

import time
from typing import Any

from celery.result import AsyncResult

from worker.app import app
from worker.engine import events
from worker.engine.connection import translated
from worker.engine.record import Record, State

LOOK_EVERY = 0.05
"""Seconds between two looks whether a task has been answered."""


def await_end(asked: AsyncResult[Any], timeout: float) -> bool:
    """Wait up to `timeout` seconds for a task's answer; whether it is there, to be had by `get` at once.

    Celery's own wait is told of it by a message, which it misses for good when Redis restarts in between.
    Raises `BrokerUnavailable`.
    """
    deadline = time.monotonic() + timeout
    with translated():
        while not asked.ready():
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY)
    return True


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
