"""Taking the place of a worker that died: its steps go on, or are undone, as soon as its successor is up.

Without that they would wait for the end of its leases. That it is dead is certain: a worker and the processes of its
pool hold a lock of the host for as long as one of them lives, be it stopped, and tokens of leases say whose they are.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading

import structlog

from worker.engine.advance import see_to
from worker.engine.journal import journal
from worker.engine.patience import patiently
from worker.engine.record import StepState
from worker.errors import WorkerLost
from worker.images.layout import boot
from worker.settings import get_settings

log = structlog.get_logger(__name__)

MOST = 10_000
"""Unfinished operations to look through; the rest wait for their leases."""

_owner = ""
"""How this worker's tokens begin; without the lock there is nothing to tell a successor when it is dead."""


def new_token() -> str:
    """What tells an execution of a step from all others; it begins with whose it is."""
    return f"{_owner}{secrets.token_hex(8)}"


def take_place(name: str) -> None:
    """Go on where the worker of that name on this host has died. Call it before the pool's processes are made.

    Returns at once: a predecessor that is being stopped is waited for.
    """
    global _owner  # noqa: PLW0603 - inherited by the pool
    folder = get_settings().data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Left open for good. Processes that are forked have a part in the lock, programs that are started have not.
        descriptor = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("the steps of a worker that dies will wait for their leases", error=str(error))
        return
    _owner = f"{_machine()}{os.getpid()}-"
    threading.Thread(target=_succeed, args=[name, descriptor], name="succession", daemon=True).start()


def _succeed(name: str, descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    error = WorkerLost(f"worker {name} died in this step; it goes on").as_dict()
    for operation, step in patiently(_left_by, name):
        if patiently(journal().inherit, operation, step, error, dead=_machine(), living=_owner):
            log.warning("its worker died: the step goes on", operation=operation, step=step)
            see_to(operation)


def _left_by(name: str) -> list[tuple[str, str]]:
    """Operations and steps that a worker of that name executes, or did when it died."""
    return [
        (record.id, step.key)
        for record in journal().unfinished(MOST)
        for step in (*record.steps.values(), *record.undo_steps)
        if step.state is StepState.RUNNING and step.worker == name
    ]


def _machine() -> str:
    """This boot of this machine: processes of another one are none of ours."""
    return f"{boot()}."
