"""Migrate: an instance to another host, and the decision about the copy it leaves behind."""

from __future__ import annotations

from typing import Annotated, Any

from celery import chain, group
from pydantic import Field, model_validator

from tasks.steps import migrate as steps
from tasks.steps.power import Shutdown
from worker.compute.provision import Readiness
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import ExistingInstance, OperationId, Target, require_settled
from worker.errors import InvalidSpec, InvalidState
from worker.models import Frozen, Move, Name, NewSizes, WaitFor
from worker.settings import Transport, get_settings


class Ready(Frozen):
    """When a guest counts as ready after its move, if it ran before."""

    wait_for: WaitFor = "running"
    console_line: Annotated[str, Field(max_length=1000)] = ""
    ready_timeout: Annotated[float, Field(gt=0, le=86400)] = 300.0

    @model_validator(mode="after")
    def _console_needs_a_line(self) -> Ready:
        if self.wait_for == "console" and not self.console_line:
            raise ValueError("console_line: allowed: some text to wait for, when wait_for is 'console'")
        return self

    def readiness(self) -> Readiness:
        """When the guest counts as ready."""
        return Readiness(wait_for=self.wait_for, console_line=self.console_line, timeout=self.ready_timeout)


class MigrateRequest(ExistingInstance, NewSizes, Shutdown, Ready):
    """Move an instance to host `to`, where it may get new sizes. It is shut down for that, as in `ShutdownRequest`.

    Its former copy is kept aside until the move is confirmed: by hand, or by itself with `auto_confirm`. Each of its
    disks is copied with at most `bandwidth_mib` MiB per second, over `transport` if not by the fleet's setting. With
    `flatten` the root disk stands alone there, without the image that it was made from.
    """

    to: Name
    auto_confirm: bool = False
    bandwidth_mib: Annotated[int, Field(ge=1)] | None = None
    transport: Transport | None = None
    flatten: bool = False

    def sizes(self) -> NewSizes:
        """What of it is to change."""
        return NewSizes.model_validate(self.model_dump(include=set(NewSizes.model_fields)))

    def target(self, fleet: Registry, operation_id: str) -> Target:  # noqa: ARG002
        """Another host that is known, and an instance in one place."""
        found = require_settled(fleet.require(self.instance))
        fleet.require_host(self.to)
        if found.host == self.to:
            raise InvalidSpec(f"to: {found.name} is on host {self.to} already", field="to", given=self.to)
        transport = self.transport or get_settings().copy_transport
        return Target(found.name, str(found.uuid), found.host, {"files": list(found.files), "transport": transport})


class Decision(ExistingInstance):
    """What to do about the copy that a move left behind; `migration` names the move, if it must be a certain one."""

    migration: OperationId | None = None

    def pending(self, fleet: Registry) -> Move:
        """The move to decide on. Raises `InvalidState` when there is none."""
        move = fleet.require(self.instance).move
        if move is None or self.migration not in (None, move.operation):
            raise InvalidState(f"no migration of {self.instance} waits to be confirmed or reverted")
        return move

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """The instance where it is now, and the host that it left."""
        move, found = self.pending(fleet), super().target(fleet, operation_id)
        details = {"migration": move.operation, "leftover": move.leftover}
        return Target(found.instance, found.uuid, move.authoritative, details)


class ConfirmRequest(Decision):
    """Keep the instance where it is, and remove the copy it left behind.

    With `source_gone` that copy is not removed: the host that has it does not come back.
    """

    source_gone: bool = False

    def can_wait(self, fleet: Registry) -> bool:
        """While the host that was left is away, the instance would be busy until it comes back."""
        found = fleet.find(self.instance)
        move = found.move if found else None
        return move is not None and not self.source_gone and "disk" not in fleet.alive(move.leftover)


class RevertRequest(Decision, Shutdown, Ready):
    """Go back to the copy that was left behind, as it was then; what the guest wrote since the move is lost."""


@operation("virtfleet.migrate", MigrateRequest)
def migrate(op: Operation[MigrateRequest]) -> Canvas:
    """Move an instance to another host."""
    to, files = op.request.to, op.details["files"]
    return chain(
        steps.describe_source.on(op),
        steps.preflight.on(op, host=to),
        group(steps.prepare_destination.on(op, host=to), *_lent(op, "base")),
        steps.shut_down_source.on(op),
        steps.set_aside.on(op),
        steps.prepare_source.on(op),
        group(
            *_lent(op, "disks"),
            *(steps.copy_disk.on(op, host=to, key=f"copy_disk:{name}") for name in files),
            *(steps.fingerprint.on(op, key=f"fingerprint:{name}") for name in files),
        ),
        steps.verify_disks.on(op, host=to),
        steps.hand_over.on(op),
        steps.define_destination.on(op, host=to),
        steps.start_destination.on(op, host=to),
        steps.release.on(op),
        steps.take_over.on(op, host=to),
    )


def _lent(op: Operation[MigrateRequest], what: str) -> list[Any]:
    """Over ssh the destination takes what it needs; over NBD the source has to lend it meanwhile."""
    return [steps.lend.on(op, key=f"lend:{what}")] if op.details.get("transport") == "nbd" else []


@operation("virtfleet.confirm", ConfirmRequest)
def confirm(op: Operation[ConfirmRequest]) -> Canvas:
    """Confirm a move: remove the copy that was left behind."""
    removed = [] if op.request.source_gone else [steps.remove_leftover.on(op, host=op.details["leftover"])]
    return chain(steps.prove_here.on(op), *removed, steps.settle.on(op))


@operation("virtfleet.revert", RevertRequest)
def revert(op: Operation[RevertRequest]) -> Canvas:
    """Revert a move: the instance runs again where it came from."""
    home = op.details["leftover"]
    return chain(
        steps.prove_source.on(op, host=home),
        steps.describe_destination.on(op),
        steps.shut_down_destination.on(op),
        steps.leave_destination.on(op),
        steps.return_source.on(op, host=home),
        steps.start_source.on(op, host=home),
        steps.release_destination.on(op),
        steps.take_back.on(op, host=home),
    )
