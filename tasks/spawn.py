"""Spawn: a new instance from an image, running."""

from __future__ import annotations

from typing import Annotated

from celery import chain
from pydantic import Field, model_validator

from tasks.steps.provision import build_seed, create_disks, fetch_image, spawn_instance, wait_ready
from worker.compute.provision import Readiness
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.requests import NewInstance
from worker.models import InstanceSpec, WaitFor


class SpawnRequest(NewInstance, InstanceSpec):
    """What to spawn, where, and when it counts as ready."""

    wait_for: WaitFor = "running"
    console_line: Annotated[str, Field(max_length=1000)] = ""
    ready_timeout: Annotated[float, Field(gt=0, le=86400)] = 300.0

    @model_validator(mode="after")
    def _console_needs_a_line(self) -> SpawnRequest:
        if self.wait_for == "console" and not self.console_line:
            raise ValueError("console_line: allowed: some text to wait for, when wait_for is 'console'")
        return self

    def readiness(self) -> Readiness:
        """When the guest counts as ready."""
        return Readiness(wait_for=self.wait_for, console_line=self.console_line, timeout=self.ready_timeout)

    def spec(self) -> InstanceSpec:
        """What the instance is made of, without where and when."""
        return InstanceSpec.model_validate(self.model_dump(include=set(InstanceSpec.model_fields)))


@operation("virtfleet.spawn", SpawnRequest)
def spawn(op: Operation[SpawnRequest]) -> Canvas:
    """Make an instance and start it."""
    return chain(
        fetch_image.on(op),
        create_disks.on(op),
        build_seed.on(op),
        spawn_instance.on(op),
        wait_ready.on(op),
    )
