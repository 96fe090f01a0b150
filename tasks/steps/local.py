"""From a step's context to the host it stands on."""

from __future__ import annotations

from uuid import UUID

from worker.compute.departure import move_of
from worker.compute.local import LocalHost, LocalInstance
from worker.engine.patience import patiently
from worker.engine.step_context import StepContext
from worker.models import Instance, InstanceSpec, PowerState


def local_host(ctx: StepContext) -> LocalHost:
    """The host this step runs on."""
    return LocalHost(ctx.host, ctx.settings)


def local_instance(ctx: StepContext) -> LocalInstance:
    """The operation's instance on this step's host."""
    return LocalInstance(local_host(ctx), ctx.instance, ctx.uuid)


def register(ctx: StepContext, power: PowerState, spec: InstanceSpec | None = None) -> Instance:
    """Put the instance's present state into the registry; the entry."""
    known = patiently(ctx.registry.find, ctx.instance)
    entry = Instance(
        name=ctx.instance,
        uuid=UUID(ctx.uuid),
        host=ctx.host,
        power=power,
        operation=ctx.operation,
        vcpus=spec.vcpus if spec else (known.vcpus if known else 0),
        memory_mib=spec.memory_mib if spec else (known.memory_mib if known else 0),
        files=local_host(ctx).data.instance(ctx.uuid).files(),
        move=move_of(local_host(ctx), ctx.instance, ctx.uuid),
    )
    return patiently(ctx.registry.put, entry)
