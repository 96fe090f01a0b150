"""Steps that take, publish, delete and restore snapshots, and what undoes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.steps.local import local_host, local_instance, register
from worker.compute import provision
from worker.compute.local import LocalInstance
from worker.compute.snapshots import clean, cold, extract, holding, live, restore, space
from worker.engine.retries import FINISH_RETRIES
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.images.snapshots import entry_of
from worker.models import Disk, DiskSet, Frozen, Instance, PowerState, SnapshotEntry, Taken

if TYPE_CHECKING:
    from tasks.snapshot import SnapshotDeleteRequest, SnapshotRequest, SnapshotRestoreRequest


class Deleted(Frozen):
    """What became of a snapshot that was to be deleted."""

    snapshot: str
    note: str


# --- taking -----------------------------------------------------------------------------------------------------------


@step("reserve_space", queue="disk")
def reserve_space(ctx: StepContext, request: SnapshotRequest) -> int:
    """Check that the snapshot can be taken, and hold the space that it needs."""
    return space.reserve(local_instance(ctx), request.spec(), ctx)


@step("live_snapshot", queue="disk")
def live_snapshot(ctx: StepContext, request: SnapshotRequest) -> Taken:
    """Catch all disks of the running guest at one instant."""
    return live.take(local_instance(ctx), request.spec(), ctx)


@step("note_power", queue="control")
def note_power(ctx: StepContext, request: SnapshotRequest) -> PowerState:  # noqa: ARG001
    """See what the guest does, to bring it back to just that."""
    return cold.note_power(local_instance(ctx))


@step("managed_save", queue="disk")
def managed_save(ctx: StepContext, request: SnapshotRequest) -> Taken:
    """Save the guest's memory, which stops it."""
    return cold.save(local_instance(ctx), request.spec(), ctx.result(note_power), ctx)


@step("extract_snapshot", queue="disk")
def extract_snapshot(ctx: StepContext, request: SnapshotRequest) -> Taken:
    """Bring every disk into its final form."""
    taken = ctx.result(managed_save if request.method == "cold" else live_snapshot)
    return extract.extract(local_instance(ctx), request.spec(), taken, ctx)


@step("restore_power", queue="control")
def restore_power(ctx: StepContext, request: SnapshotRequest) -> PowerState:  # noqa: ARG001
    """Let the guest go on with the memory it had."""
    return register(ctx, cold.restore_power(local_instance(ctx), ctx.result(note_power), ctx)).power


@step("publish_snapshot", queue="disk")
def publish_snapshot(ctx: StepContext, request: SnapshotRequest) -> SnapshotEntry:  # noqa: ARG001
    """Verify the files and let the snapshot appear as a whole."""
    published = extract.publish(local_instance(ctx), ctx.result(extract_snapshot), ctx)
    entry = entry_of(local_host(ctx).data, published)
    ctx.registry.put_snapshot(entry)
    return entry


@undoes("discard_snapshot")
def undo_snapshot(ctx: StepContext, name: str, uuid: str) -> None:
    """Remove all that the operation made of its snapshot."""
    clean.discard(LocalInstance(local_host(ctx), name, uuid), ctx)
    ctx.registry.forget_snapshot(ctx.operation)


@undoes("thaw_guest")
def undo_freeze(ctx: StepContext, name: str, uuid: str) -> None:
    """Thaw the guest's file systems, unless that was done: a guest that was reset since has no agent to ask."""
    instance = LocalInstance(local_host(ctx), name, uuid)
    holding.let_go(instance, instance.local.data.unfinished_snapshot(ctx.operation))


@undoes("resume_guest")
def undo_pause(ctx: StepContext, name: str, uuid: str) -> None:
    """Let a guest run that the operation had paused."""
    instance = LocalInstance(local_host(ctx), name, uuid)
    holding.let_go(instance, instance.local.data.unfinished_snapshot(ctx.operation))


@undoes("restore_power")
def undo_save(ctx: StepContext, name: str, uuid: str, power: str) -> None:
    """Let a guest whose memory the operation had saved go on with it."""
    register(ctx, cold.restore_power(LocalInstance(local_host(ctx), name, uuid), PowerState(power), ctx))


# --- deleting and restoring -------------------------------------------------------------------------------------------


@step("delete_snapshot", queue="disk", retries=FINISH_RETRIES)
def delete_snapshot(ctx: StepContext, request: SnapshotDeleteRequest) -> Deleted:
    """Delete a published snapshot."""
    ctx.check()
    removed = clean.delete(local_instance(ctx), request.snapshot, ctx)
    ctx.registry.forget_snapshot(request.snapshot)
    return Deleted(snapshot=request.snapshot, note="deleted" if removed else "already gone")


@step("restore_disks", queue="disk")
def restore_disks(ctx: StepContext, request: SnapshotRestoreRequest) -> DiskSet:
    """Make the new instance's disks from the snapshot's."""
    spec = restore.spec_from(local_host(ctx), request.snapshot)
    if not ctx.record.undo:  # else an earlier attempt has begun, and what is there is its own
        provision.check_request(local_instance(ctx), spec)
    return restore.restore_disks(local_instance(ctx), request.snapshot, ctx)


@step("restore_seed", queue="disk")
def restore_seed(ctx: StepContext, request: SnapshotRestoreRequest) -> Disk:
    """Make the cloud-init seed that tells the guest its new identity."""
    return provision.build_seed(local_instance(ctx), restore.spec_from(local_host(ctx), request.snapshot), ctx)


@step("restore_instance", queue="disk")
def restore_instance(ctx: StepContext, request: SnapshotRestoreRequest) -> Instance:
    """Define the domain and start it."""
    spec = restore.spec_from(local_host(ctx), request.snapshot)
    disks = DiskSet(disks=(*ctx.result(restore_disks).disks, ctx.result(restore_seed)))
    return register(ctx, provision.spawn(local_instance(ctx), spec, disks, ctx), spec)
