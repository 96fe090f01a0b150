"""Incremental snapshots: from which earlier one to go on, and what is left in the guest's disks to do so.

Each snapshot of a chain leaves a checkpoint, named after it: from then on the guest's qcow2 disks note what changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from worker.compute.snapshots.jobs import PREFIX
from worker.compute.snapshots.taking import Taking
from worker.errors import UnsupportedByHost
from worker.images import snapshots
from worker.images.layout import DataDir
from worker.models import Snapshot
from worker.virt import checkpoints
from worker.virt.guest import Guest


@dataclass(frozen=True)
class Link:
    """How a snapshot is tied into its chain: the snapshot before it, and the checkpoints of both."""

    parent: str | None = None
    since: str | None = None
    checkpoint: str | None = None
    note: str = ""


def checkpoint_of(snapshot: str) -> str:
    """Name of the checkpoint that a snapshot leaves."""
    return f"{PREFIX}{snapshot}"


def continue_from(this: Taking) -> Link:
    """How to tie the snapshot in; with a note when a full one is taken though an increment was asked for.

    Raises UnsupportedByHost for raw disks, which cannot note what changes.
    """
    if not this.spec.incremental:
        return Link()
    raw = [disk.target for disk in this.disks if disk.format != "qcow2"]
    if raw:
        raise UnsupportedByHost(
            f"incremental snapshots need qcow2 disks; {', '.join(raw)} of {this.guest.name} cannot note what changes",
            hint="Choose the others with --disk, or take a full snapshot.",
        )
    link = Link(checkpoint=checkpoint_of(this.ctx.operation))
    if this.spec.full:
        return link
    parent = _last(this)
    if parent is None:
        return link
    if parent.checkpoint not in checkpoints.names(this.guest):
        return broken(link, f"the guest has no checkpoint {parent.checkpoint} any more")
    if [disk.target for disk in parent.disks] != this.targets:
        return broken(link, f"{parent.id} holds other disks: {', '.join(disk.target for disk in parent.disks)}")
    return replace(link, parent=parent.id, since=parent.checkpoint)


def broken(link: Link, reason: str) -> Link:
    """The same without the snapshot before it."""
    return replace(link, parent=None, since=None, note=f"full instead of incremental: {reason}")


def sweep(guest: Guest, data: DataDir) -> list[str]:
    """Delete the fleet's checkpoints that belong to no snapshot; those deleted. Only a running guest can do that."""
    known = {checkpoint_of(snapshot.id) for snapshot in snapshots.every(data)}
    stale = [name for name in checkpoints.names(guest) if name.startswith(PREFIX) and name not in known]
    return [name for name in stale if checkpoints.delete(guest, name)]


def _last(this: Taking) -> Snapshot | None:
    """The latest snapshot of this instance that left a checkpoint."""
    every = snapshots.every(this.instance.local.data)
    ours = [one for one in every if one.checkpoint and str(one.instance_uuid) == this.instance.uuid]
    return ours[-1] if ours else None
