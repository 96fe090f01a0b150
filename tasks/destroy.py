"""Destroy: an instance with all that belongs to it."""

from __future__ import annotations

from tasks.steps.destroy import destroy_instance
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import ExistingInstance, Target, require_settled
from worker.errors import InvalidSpec
from worker.models import Name


class DestroyRequest(ExistingInstance):
    """Remove an instance's domain and files.

    `host` says where to look when the registry does not know the instance; `foreign` also takes a domain that does
    not carry the fleet's mark.
    """

    host: Name | None = None
    foreign: bool = False

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """The instance where it is known to be, or to have been: destroying twice is no mistake."""
        known = fleet.find(self.instance)
        if known and self.host and known.host != self.host:
            raise InvalidSpec(
                f"host: instance {self.instance!r} is on host {known.host}; allowed: {known.host}, or none "
                f"(given: {self.host!r})",
                field="host",
                given=self.host,
                allowed=known.host,
            )
        if known is not None:
            require_settled(known)
        if known is None and self.host:
            fleet.require_host(self.host)
            return Target(self.instance, "", self.host)
        gone = fleet.destroyed(self.instance)
        if known is None and gone:
            return Target(self.instance, gone["uuid"], gone["host"])
        return super().target(fleet, operation_id)


@operation("virtfleet.destroy", DestroyRequest)
def destroy(op: Operation[DestroyRequest]) -> Canvas:
    """Destroy an instance."""
    return destroy_instance.on(op)
