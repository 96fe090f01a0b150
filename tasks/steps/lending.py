"""Lending files, over NBD, to the steps of the same stage that fetch them on another host."""

from __future__ import annotations

from worker.engine.journal import journal
from worker.engine.record import StepState
from worker.engine.step import Retries
from worker.engine.step_context import StepContext
from worker.errors import BrokerUnavailable, OperationNotFound

LEND_RETRIES = Retries(attempts=10_000, first_pause=1.0, longest_pause=5.0)
"""Who has no slot to lend in looks again every few seconds: those who fetch say when it takes too long."""


def lender_waits(ctx: StepContext) -> bool:
    """Whether who lends what this step fetches waits for a slot, behind other operations' copies."""
    beside = next(stage for stage in ctx.record.stages if ctx.plan in stage)
    try:
        steps = journal().read(ctx.operation).steps
    except (BrokerUnavailable, OperationNotFound):
        return False
    return any(steps[plan.key].state is StepState.RETRY for plan in beside if plan.host != ctx.host)


def are_fetched(ctx: StepContext) -> bool:
    """Whether all the steps on the other host are done that run beside this one."""
    beside = next(stage for stage in ctx.record.stages if ctx.plan in stage)
    try:
        steps = journal().read(ctx.operation).steps
    except (BrokerUnavailable, OperationNotFound):  # Redis has lost it: who executes a step puts it back
        return False
    return all(steps[plan.key].state is StepState.DONE for plan in beside if plan.host != ctx.host)
