"""Steps that give an instance other sizes, and what undoes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.steps.local import local_host, local_instance, register
from tasks.steps.power import shut_down_for
from worker.compute import provision, resize
from worker.compute.local import LocalInstance
from worker.compute.power import PowerChange
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.models import DiskSet, Outcome

if TYPE_CHECKING:
    from tasks.resize import ResizeRequest


@step("plan_resize", queue="disk")
def plan_resize(ctx: StepContext, request: ResizeRequest) -> resize.Plan:
    """Find out what changes, and refuse what cannot be, while the guest runs untouched."""
    return resize.plan(local_instance(ctx), request.sizes(), ctx)


@step("shut_down", queue="control")
def shut_down(ctx: StepContext, request: ResizeRequest) -> PowerChange | None:
    """Shut the guest down, unless it has the wanted sizes already."""
    plan = ctx.result(plan_resize)
    return shut_down_for(ctx, request.patience(), plan.power) if plan.changes else None


@step("resize_disks", queue="disk")
def resize_disks(ctx: StepContext, request: ResizeRequest) -> DiskSet:  # noqa: ARG001
    """Grow the disks, and make its swap anew."""
    return resize.resize_disks(local_instance(ctx), ctx.result(plan_resize), ctx)


@step("redefine", queue="control")
def redefine(ctx: StepContext, request: ResizeRequest) -> None:  # noqa: ARG001
    """Give the domain its new sizes."""
    resize.redefine(local_instance(ctx), ctx.result(plan_resize), ctx.result(resize_disks), ctx)


@step("finish_resize", queue="control")
def finish_resize(ctx: StepContext, request: ResizeRequest) -> Outcome:  # noqa: ARG001
    """Bring the guest's power back to what it was."""
    instance, plan = local_instance(ctx), ctx.result(plan_resize)
    power = resize.finish(instance, plan, ctx)
    entry = register(ctx, power, provision.spec_of(instance.local, instance.uuid))
    return Outcome.of(entry, "" if plan.changes else "it has these sizes already: nothing was done")


@undoes("revert_resize")
def undo_resize(ctx: StepContext, name: str, uuid: str) -> None:
    """Give the instance its old sizes back."""
    resize.revert(LocalInstance(local_host(ctx), name, uuid), ctx)
