"""How much room a snapshot needs, asked for before anything is done to the guest, and held against other operations."""

from __future__ import annotations

from worker.compute.local import LocalInstance
from worker.compute.snapshots import chain, cold
from worker.compute.snapshots.live import method
from worker.compute.snapshots.taking import Taking, format_of, require_new, taking
from worker.context import Context
from worker.errors import CheckpointMissing
from worker.images import qemu_img
from worker.images.files import allocated_size
from worker.images.reserve import Ledger
from worker.models import MIB, DiskFormat, GuestDisk, SnapshotSpec
from worker.virt import checkpoints

MARGIN = 4 * MIB
"""Bytes per disk for its metadata, and for what the guest writes until the instant."""


def reserve(instance: LocalInstance, spec: SnapshotSpec, ctx: Context) -> int:
    """Check that the host can take the snapshot, and hold the space for it; bytes held.

    Raises InvalidSpec, InvalidState, NoSpace, NotOurs, SnapshotExists, UnsupportedByHost.
    """
    require_new(instance, ctx)
    data = instance.local.data
    with taking(instance, spec, ctx) as this:
        _require_possible(this)
        needed = _needed(this)
        ctx.undo("discard_snapshot", name=instance.name, uuid=instance.uuid)
        this.folder.create_empty()
        Ledger(data.root).reserve(
            ctx.operation, needed, this.folder.path, instance.local.settings.reserve_bytes, watch=ctx
        )
        return needed


def _require_possible(this: Taking) -> None:
    for disk in this.disks:
        format_of(disk)
    if this.spec.method == "cold":
        return
    if this.guest.is_active():
        method(this)
        chain.continue_from(this)
    else:
        cold.require_off_will_do(this)


def _needed(this: Taking) -> int:
    """Bytes that all disks take at the most, what is removed again before the snapshot is published included."""
    link = chain.continue_from(this) if _by_backup(this) else chain.Link()
    changed = _changed(this, link.since) if link.since else None
    if changed is not None:
        return sum(changed.values()) + MARGIN * len(changed)
    return sum(_flat(disk, this.spec.format) + _caught(this, disk) for disk in this.disks)


def _changed(this: Taking, since: str) -> dict[str, int] | None:
    """Bytes of each disk that changed; None where that is not known any more, so that a full one has to be taken."""
    try:
        known = checkpoints.changed_bytes(this.guest, since)
    except CheckpointMissing:
        return None
    return {disk: known[disk] for disk in this.targets} if known.keys() >= set(this.targets) else None


def _caught(this: Taking, disk: GuestDisk) -> int:
    """Bytes of what lies beside a disk's final form until that is made."""
    if not this.guest.is_active() or this.spec.method == "cold":
        return 0
    if _by_backup(this):
        return _flat(disk, "qcow2") if this.spec.compress else 0
    top = allocated_size(disk.path)  # of which a mirror is; its delta, allocated by the sector, takes 0.1 % more
    return top + top // 256 + MARGIN


def _by_backup(this: Taking) -> bool:
    return this.guest.is_active() and this.spec.method != "cold" and method(this) == "backup"


def _flat(disk: GuestDisk, form: DiskFormat) -> int:
    return qemu_img.measure(disk.path, format_of(disk), form) + MARGIN
