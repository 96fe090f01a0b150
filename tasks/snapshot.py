"""Snapshots: take one of an instance, delete it, make a new instance from it."""

from __future__ import annotations

from celery import chain

from tasks.steps.snapshots import (
    delete_snapshot,
    extract_snapshot,
    live_snapshot,
    managed_save,
    note_power,
    publish_snapshot,
    reserve_space,
    restore_disks,
    restore_instance,
    restore_power,
    restore_seed,
)
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import ExistingInstance, NewInstance, OperationId, Request, Target
from worker.models import Name, SnapshotSpec


class SnapshotRequest(ExistingInstance, SnapshotSpec):
    """Take a snapshot of an instance; it is called like its operation."""

    def spec(self) -> SnapshotSpec:
        """How it is to be taken, without of what."""
        return SnapshotSpec.model_validate(self.model_dump(include=set(SnapshotSpec.model_fields)))


class SnapshotDeleteRequest(Request):
    """Delete a snapshot."""

    snapshot: OperationId

    def target(self, fleet: Registry, operation_id: str) -> Target:  # noqa: ARG002
        """The instance it was taken of, whose checkpoints go with it; it need not be there any more."""
        found = fleet.require_snapshot(self.snapshot)
        return Target(found.instance, str(found.instance_uuid), found.host)


class SnapshotRestoreRequest(Request):
    """Make a new instance from a snapshot; by default on the host where the snapshot lies."""

    snapshot: OperationId
    name: Name
    host: Name | None = None

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """The snapshot must be known, unless a host is named, and the name free."""
        host = self.host or fleet.require_snapshot(self.snapshot).host
        return NewInstance(name=self.name, host=host).target(fleet, operation_id)


@operation("virtfleet.snapshot", SnapshotRequest)
def snapshot(op: Operation[SnapshotRequest]) -> Canvas:
    """Take a snapshot."""
    if op.request.method == "cold":
        # The guest waits for the copy alone: what takes time but not its disks comes after it runs again.
        return chain(
            reserve_space.on(op),
            note_power.on(op),
            managed_save.on(op),
            extract_snapshot.on(op),
            restore_power.on(op),
            publish_snapshot.on(op),
        )
    return chain(reserve_space.on(op), live_snapshot.on(op), extract_snapshot.on(op), publish_snapshot.on(op))


@operation("virtfleet.snapshot_delete", SnapshotDeleteRequest)
def snapshot_delete(op: Operation[SnapshotDeleteRequest]) -> Canvas:
    """Delete a snapshot."""
    return delete_snapshot.on(op)


@operation("virtfleet.snapshot_restore", SnapshotRestoreRequest)
def snapshot_restore(op: Operation[SnapshotRestoreRequest]) -> Canvas:
    """Make an instance from a snapshot and start it."""
    return chain(restore_disks.on(op), restore_seed.on(op), restore_instance.on(op))
