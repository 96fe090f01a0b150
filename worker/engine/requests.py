"""What every request has in common, and how it is tied to an instance and a host as it is admitted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any
from uuid import UUID, uuid5

from pydantic import AfterValidator

from worker.engine.registry import Registry
from worker.errors import InstanceExists, InvalidState
from worker.models import Frozen, Instance, Name

NAMESPACE = UUID("6f1d2a34-63c5-4d8e-9a0b-76697274666c")
"""A spawn's instance gets the uuid5 of its operation's id: the same operation makes the same instance, even if
Redis has forgotten everything in between."""


def is_operation_id(value: str) -> bool:
    """Whether operations, and so snapshots, may be called that."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value))


def _checked_id(value: str) -> str:
    if not is_operation_id(value):
        raise ValueError("allowed: 1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit")
    return value


OperationId = Annotated[str, AfterValidator(_checked_id)]


@dataclass(frozen=True)
class Target:
    """The instance an operation owns while it runs, the host it begins on, and what else its canvas is made of.

    `details` is JSON-able and kept as it was at admission, since the canvas is built again and again.
    """

    instance: str
    uuid: str
    host: str
    details: dict[str, Any] = field(default_factory=dict)


class Request(Frozen):
    """Base of all requests.

    `operation_id` is the caller's idempotency key: the same id again attaches to the same operation.
    `wait_if_busy` queues behind the operation that owns the instance, instead of being refused.
    """

    operation_id: OperationId | None = None
    wait_if_busy: bool = False

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """What this request is about. Raises errors of the kind `BadInput`."""
        raise NotImplementedError

    def can_wait(self, fleet: Registry) -> bool:  # noqa: ARG002
        """Whether, asked for by the fleet itself, it had better be submitted later."""
        return False


def require_settled(found: Instance) -> Instance:
    """An instance that is in one place. Raises `InvalidState` while its former copy waits for confirm or revert."""
    if found.move:
        raise InvalidState(
            f"{found.name} has moved from host {found.move.leftover}, where its former copy is kept aside",
            hint=f"Decide on that first: virtfleet migration confirm {found.name}, or: virtfleet migration revert",
        )
    return found


class NewInstance(Request):
    """Base of requests that make an instance."""

    name: Name
    host: Name

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """The host must be known and the name free, also on hosts that Redis has just forgotten."""
        fleet.require_host(self.host)
        taken = fleet.find(self.name)
        if taken is None:
            fleet.require_settled(f"an instance {self.name!r}")
        else:
            raise InstanceExists(
                f"name: {self.name!r} is taken by instance {taken.uuid} on host {taken.host}",
                field="name",
                given=self.name,
                allowed="a name that is free",
            )
        return Target(self.name, str(uuid5(NAMESPACE, operation_id)), self.host)


class ExistingInstance(Request):
    """Base of requests about an instance that is there; `instance` is its name or uuid."""

    instance: Name

    def target(self, fleet: Registry, operation_id: str) -> Target:  # noqa: ARG002
        """The instance must be known."""
        found = fleet.require(self.instance)
        return Target(found.name, str(found.uuid), found.host)
