"""Whether an operation whose turn has come is still about what it was admitted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.engine.kinds import kind_of
from worker.errors import InvalidState

if TYPE_CHECKING:
    from worker.engine.step_context import StepContext


def require_unchanged(ctx: StepContext) -> None:
    """Look once more before the first step of an operation that had to wait for its instance.

    It was admitted for the host where the instance was then, and may have waited for one that moved or destroyed it.
    Raises InvalidState, and what the request itself raises when it is admitted.
    """
    record = ctx.record
    begins = any(plan.key == ctx.lease.step for plan in record.stages[0])
    if not (record.waited and begins) or record.undo or ctx.is_irrevocable:
        return
    now = kind_of(record.kind).of(record).request.target(ctx.registry, record.id)
    if (now.uuid, now.host) != (record.uuid, record.host):
        raise InvalidState(
            f"{record.instance} is on host {now.host} now: it has left host {record.host} while this waited for it",
            hint="Nothing was done. Ask again.",
        )
