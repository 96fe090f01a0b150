"""Undoing: actions by name, journalled before the effect they take back, run newest first as steps of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker.engine.record import UNDO_STEP
from worker.engine.retries import Retries
from worker.engine.step import step
from worker.engine.step_context import StepContext

Action = Callable[..., None]
_actions: dict[str, Action] = {}

UNDO_RETRIES = Retries(attempts=1000, first_pause=2.0, longest_pause=60.0)
"""A host that is away delays its undo instead of losing it: about 16 hours of trying."""


def undoes(name: str) -> Callable[[Action], Action]:
    """Make a function `(ctx, **arguments)` the undo action of that name. It must be idempotent."""

    def register(action: Action) -> Action:
        _actions[name] = action
        return action

    return register


@step("undo", queue="control", retries=UNDO_RETRIES)
def undo(ctx: StepContext, request: Any) -> None:  # noqa: ARG001 - every step's body gets the request
    """Take back one effect of an operation that failed or was cancelled."""
    entry = ctx.record.undo[int(ctx.lease.step.removeprefix(UNDO_STEP))]
    _actions[entry.action](ctx, **entry.arguments)
