"""Power: on, off, reboot, pause, resume of an instance."""

from __future__ import annotations

from tasks.steps import power as steps
from worker.compute.power import BY_FORCE, Patience
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.requests import ExistingInstance


class PowerRequest(ExistingInstance):
    """An instance whose power is to change."""


class PowerOnRequest(PowerRequest):
    """Start an instance."""


class PauseRequest(PowerRequest):
    """Stop an instance's CPUs."""


class ResumeRequest(PowerRequest):
    """Let a paused instance run on."""


class ShutdownRequest(PowerRequest, steps.Shutdown):
    """Shut an instance down: ask every `retry_interval` seconds until `timeout`, then by force; 0 forces at once."""


class RebootRequest(ShutdownRequest):
    """Shut an instance down and start it again; `hard` without asking the guest."""

    hard: bool = False

    def patience(self) -> Patience:
        """How to ask the guest; not at all for a hard reboot."""
        return BY_FORCE if self.hard else super().patience()


@operation("virtfleet.power_on", PowerOnRequest)
def power_on(op: Operation[PowerOnRequest]) -> Canvas:
    """Start an instance."""
    return steps.power_on.on(op)


@operation("virtfleet.power_off", ShutdownRequest)
def power_off(op: Operation[ShutdownRequest]) -> Canvas:
    """Shut an instance down."""
    return steps.power_off.on(op)


@operation("virtfleet.reboot", RebootRequest)
def reboot(op: Operation[RebootRequest]) -> Canvas:
    """Reboot an instance."""
    return steps.reboot.on(op)


@operation("virtfleet.pause", PauseRequest)
def pause(op: Operation[PauseRequest]) -> Canvas:
    """Pause an instance."""
    return steps.pause.on(op)


@operation("virtfleet.resume", ResumeRequest)
def resume(op: Operation[ResumeRequest]) -> Canvas:
    """Resume a paused instance."""
    return steps.resume.on(op)
