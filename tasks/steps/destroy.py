"""The step that unmakes an instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.steps.local import local_host
from worker.compute import provision
from worker.compute.local import LocalInstance
from worker.engine.patience import patiently
from worker.engine.retries import FINISH_RETRIES
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.models import Frozen

if TYPE_CHECKING:
    from tasks.destroy import DestroyRequest


class Destroyed(Frozen):
    """What there was to remove."""

    domain: bool
    files: bool
    note: str


@step("destroy_instance", queue="control", retries=FINISH_RETRIES)
def destroy_instance(ctx: StepContext, request: DestroyRequest) -> Destroyed:
    """Remove the domain and its files. One step: a cancel must not leave disks without their domain."""
    ctx.check()
    local = local_host(ctx)
    uuid = ctx.uuid or provision.uuid_of(local, ctx.instance)
    if uuid is None:
        return Destroyed(domain=False, files=False, note=f"host {ctx.host} has no domain {ctx.instance!r}")
    instance = LocalInstance(local, ctx.instance, uuid)
    domain, files = provision.destroy(instance, ctx, foreign=request.foreign)
    patiently(ctx.registry.forget, ctx.instance, uuid, destroyed_by=ctx.operation, host=ctx.host)
    return Destroyed(domain=domain, files=files, note="destroyed" if domain or files else "already gone")
