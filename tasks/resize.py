"""Resize: other sizes for an instance, on the host where it is."""

from __future__ import annotations

from celery import chain
from pydantic import model_validator

from tasks.steps.power import Shutdown
from tasks.steps.resize import finish_resize, plan_resize, redefine, resize_disks, shut_down
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import ExistingInstance, Target, require_settled
from worker.models import NewSizes


class ResizeRequest(ExistingInstance, NewSizes, Shutdown):
    """An instance and its new sizes: what is not given stays. It is shut down first, as in `ShutdownRequest`."""

    @model_validator(mode="after")
    def _something_changes(self) -> ResizeRequest:
        if all(getattr(self, name) is None for name in NewSizes.model_fields):
            raise ValueError(f"allowed: at least one of {', '.join(NewSizes.model_fields)}")
        return self

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """An instance in one place."""
        require_settled(fleet.require(self.instance))
        return super().target(fleet, operation_id)

    def sizes(self) -> NewSizes:
        """What is to change."""
        return NewSizes.model_validate(self.model_dump(include=set(NewSizes.model_fields)))


@operation("virtfleet.resize", ResizeRequest)
def resize(op: Operation[ResizeRequest]) -> Canvas:
    """Give an instance other sizes."""
    return chain(
        plan_resize.on(op),
        shut_down.on(op),
        resize_disks.on(op),
        redefine.on(op),
        finish_resize.on(op),
    )
