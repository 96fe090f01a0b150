"""Steps that change a guest's power."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tasks.steps.local import local_host, local_instance, register
from worker.compute import power
from worker.compute.local import LocalInstance
from worker.compute.power import Patience, PowerChange
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.models import Frozen, PowerState

if TYPE_CHECKING:
    from tasks.power import PowerRequest, RebootRequest, ShutdownRequest

Timeout = Annotated[float, Field(ge=0, le=86400)]
Interval = Annotated[float, Field(gt=0, le=3600)]


class Shutdown(Frozen):
    """How to shut a guest down: ask every `retry_interval` seconds until `timeout`, then by force; 0 forces at once."""

    timeout: Timeout = 60.0
    retry_interval: Interval = 10.0

    def patience(self) -> Patience:
        """How to ask the guest."""
        return Patience(timeout=self.timeout, retry_interval=self.retry_interval)


@step("power_on", queue="control")
def power_on(ctx: StepContext, request: PowerRequest) -> PowerChange:  # noqa: ARG001
    """Start the guest."""
    return _registered(ctx, power.power_on(local_instance(ctx), ctx))


@step("power_off", queue="control")
def power_off(ctx: StepContext, request: ShutdownRequest) -> PowerChange:
    """Shut the guest down in time, or by force."""
    return _registered(ctx, power.power_off(local_instance(ctx), request.patience(), ctx))


@step("reboot", queue="control")
def reboot(ctx: StepContext, request: RebootRequest) -> PowerChange:
    """Shut the guest down and start it again."""
    return _registered(ctx, power.reboot(local_instance(ctx), request.patience(), ctx))


@step("pause", queue="control")
def pause(ctx: StepContext, request: PowerRequest) -> PowerChange:  # noqa: ARG001
    """Stop the guest's CPUs."""
    return _registered(ctx, power.pause(local_instance(ctx), ctx))


@step("resume", queue="control")
def resume(ctx: StepContext, request: PowerRequest) -> PowerChange:  # noqa: ARG001
    """Let a paused guest run on."""
    return _registered(ctx, power.resume(local_instance(ctx), ctx))


def shut_down_for(ctx: StepContext, patience: Patience, before: PowerState) -> PowerChange:
    """Shut the guest down for an operation that, if it fails, brings its power back to what it was `before`."""
    instance = local_instance(ctx)
    ctx.undo("power_as_before", name=instance.name, uuid=instance.uuid, before=before.value)
    return _registered(ctx, power.power_off(instance, patience, ctx, comes_back=True))


@undoes("await_shutdown")
def undo_request(ctx: StepContext, name: str, uuid: str, **_earlier: float) -> None:
    """Wait whether a guest that was asked to shut down does, before it is started again."""
    power.await_shutdown(LocalInstance(local_host(ctx), name, uuid), ctx)


@undoes("power_as_before")
def undo_shut_down(ctx: StepContext, name: str, uuid: str, before: str) -> None:
    """Bring a guest's power back to what it was before the operation."""
    _registered(ctx, power.restore(LocalInstance(local_host(ctx), name, uuid), PowerState(before), ctx))


@undoes("pause_again")
def undo_resume(ctx: StepContext, name: str, uuid: str) -> None:
    """Pause a guest again that was let run to hear the request to shut down."""
    _registered(ctx, power.pause_again(LocalInstance(local_host(ctx), name, uuid), ctx))


@undoes("power_on")
def undo_power_off(ctx: StepContext, name: str, uuid: str) -> None:
    """Start a guest that the operation had taken down."""
    _registered(ctx, power.power_on(LocalInstance(local_host(ctx), name, uuid), ctx))


def _registered(ctx: StepContext, change: PowerChange) -> PowerChange:
    register(ctx, change.after)
    return change
