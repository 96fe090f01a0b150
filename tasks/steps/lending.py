"""Lending files, over NBD, to the steps of the same stage that fetch them on another host."""

from __future__ import annotations

from worker.engine.journal import journal
from worker.engine.record import StepState
from worker.engine.retries import Retries
from worker.engine.step_context import StepContext
from worker.errors import BrokerUnavailable, OperationNotFound

LEND_RETRIES = Retries(attempts=10_000, first_pause=1.0, longest_pause=5.0)
"""Who has no slot to lend in looks again every few seconds: those who fetch say when it takes too long."""


def lender_waits(ctx: StepContext) -> bool:
    """Whether who lends what this step fetches waits for a slot, behind other operations' copies."""
    return any(state is StepState.RETRY for state in _across(ctx))


def are_fetched(ctx: StepContext) -> bool:
    """Whether all the steps on the other host are done that run beside this one."""
    across = _across(ctx)
    return bool(across) and all(state is StepState.DONE for state in across)


def _across(ctx: StepContext) -> list[StepState]:
    """How the steps stand that run beside this one on the other host; none where Redis has lost the operation."""
    beside = next(stage for stage in ctx.record.stages if ctx.plan in stage)
    try:
        steps = journal().read(ctx.operation).steps
    except (BrokerUnavailable, OperationNotFound):  # who executes a step puts it back
        return []
    return [steps[plan.key].state for plan in beside if plan.host != ctx.host]
