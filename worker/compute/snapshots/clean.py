"""Unmaking snapshots: what an attempt left behind, and published ones that are not wanted any more."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots import chain, holding
from worker.compute.snapshots.jobs import end_jobs, give_way
from worker.compute.snapshots.taking import intent_of
from worker.context import Context
from worker.errors import HypervisorError, InvalidState
from worker.images import snapshots
from worker.images.files import remove_tree
from worker.images.layout import SnapshotDir
from worker.images.reserve import Ledger
from worker.virt import checkpoints
from worker.virt.guest import Guest


def abandon(guest: Guest, folder: SnapshotDir, ctx: Context) -> None:
    """End the jobs that write into the folder, and remove what they wrote and the checkpoint. The guest runs on."""
    if guest.is_active():
        end_jobs(guest, folder, ctx)
        checkpoints.delete(guest, chain.checkpoint_of(ctx.operation))
    if folder.path.exists():
        for path in folder.path.iterdir():
            path.unlink()


def discard(instance: LocalInstance, ctx: Context) -> None:
    """Undo: whatever this operation's snapshot has become, nothing of it stays, and the guest runs as before."""
    data = instance.local.data
    folder = data.unfinished_snapshot(ctx.operation)
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None:
            holding.let_go(instance, folder)
            abandon(guest, folder, ctx)
            give_way(guest, folder)
        snapshots.remove(data, ctx.operation)
    Ledger(data.root).release(ctx.operation)


def sweep(local: LocalHost, live_operations: Collection[str]) -> list[Path]:
    """Remove what operations that are over left unfinished; what was removed.

    Not one that still holds its guest: that is let go of first, by the `HoldWatch`.
    """
    over = [path for path, one in local.data.unfinished_snapshots().items() if one not in live_operations]
    swept = [path for path in over if not _holds(SnapshotDir(path))]
    for path in swept:
        remove_tree(path, local.data.snapshots)
    return swept


def _holds(folder: SnapshotDir) -> bool:
    intent = intent_of(folder)
    return intent is not None and not intent.released


def forget(local: LocalHost, path: Path) -> None:
    """Remove a snapshot that nobody finishes any more; a guest that it still holds is let go of first."""
    folder = SnapshotDir(path)
    intent = intent_of(folder)
    if intent is not None and intent.host not in {"", local.name}:
        raise InvalidState(
            f"it holds {intent.name} on host {intent.host}, which has this folder, too", hint="Do it there."
        )
    if intent is not None:
        holding.let_go(LocalInstance(local, intent.name, intent.uuid), folder)
    remove_tree(path, local.data.snapshots)


def delete(instance: LocalInstance, snapshot: str, ctx: Context) -> bool:
    """Delete a published snapshot with its checkpoint; False when it was gone. Raises SnapshotInUse.

    A guest that is off keeps the checkpoint until it runs and the next incremental snapshot is taken.
    """
    with instance.owned(ctx), instance.local.libvirt() as host:
        snapshots.require_unused(instance.local.data, snapshot)
        ctx.make_irrevocable()
        removed = snapshots.remove(instance.local.data, snapshot)
        guest = host.find_uuid(instance.uuid)
        if guest is not None and guest.is_active():
            try:
                checkpoints.delete(guest, chain.checkpoint_of(snapshot))
            except (InvalidState, HypervisorError):
                if not guest.goes_off():
                    raise
        return removed
