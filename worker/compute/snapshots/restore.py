"""A new instance from a snapshot: all its disks, its definition's sizes, a new identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.provision import DISK_MODE, require_free
from worker.compute.snapshots.share import shares
from worker.context import Context, Watcher
from worker.errors import InvalidSpec
from worker.images import qemu_img, snapshots
from worker.images.files import copy_durably, publish, replace_json, require_space
from worker.images.layout import InstanceDir
from worker.images.reserve import Ledger
from worker.models import Disk, DiskSet, InstanceSpec, Snapshot, SnapshotDisk


def spec_from(local: LocalHost, snapshot: str) -> InstanceSpec:
    """What an instance from that snapshot is made of. Raises SnapshotNotFound, InvalidSpec."""
    found = snapshots.require(local.data, snapshot)
    if found.spec is None:
        raise InvalidSpec(
            f"snapshot: {snapshot} does not say what its instance was made of",
            hint=f"Use it as an image: virtfleet spawn NAME --image snapshot:{snapshot}",
            field="snapshot",
            given=snapshot,
        )
    return found.spec.model_copy(update={"image": f"snapshot:{snapshot}", "sha256": None})


def restore_disks(instance: LocalInstance, snapshot: str, ctx: Context) -> DiskSet:
    """Make the new instance's disks from the snapshot's, and its UEFI variables; what is finished already is kept.

    Raises SnapshotNotFound, InvalidSpec when it holds no root disk, NoSpace.
    """
    local = instance.local
    with local.libvirt() as host:
        require_free(instance, host)
    spec = spec_from(local, snapshot)
    found = snapshots.require(local.data, snapshot)
    snapshots.root_disk(found)
    kept_free = local.settings.reserve_bytes + Ledger(local.data.root).outstanding(besides=ctx.operation)
    require_space(local.data.create().root, sum(_bytes(local, found, disk) for disk in found.disks), kept_free)
    ctx.undo("remove_files", uuid=instance.uuid)
    with instance.owned(ctx) as folder:
        replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})
        if found.nvram and spec.firmware == "efi" and not folder.nvram.exists():
            copy_durably(local.data.snapshot(snapshot).path / found.nvram, folder.nvram, DISK_MODE)
        watches = shares(ctx, [disk.virtual_size for disk in found.disks], "restoring")
        copies = [
            _Copy(instance, found, disk, _place(folder, found, disk), watch)
            for disk, watch in zip(found.disks, watches, strict=True)
        ]
        return DiskSet(disks=tuple(copy.make(ctx.operation) for copy in copies))


@dataclass(frozen=True)
class _Copy:
    """One disk on its way from a snapshot, and all that it builds on, to an instance."""

    instance: LocalInstance
    snapshot: Snapshot
    disk: SnapshotDisk
    path: Path
    watch: Watcher

    def make(self, operation: str) -> Disk:
        data, disk = self.instance.local.data, self.disk
        if not self.path.exists():
            # Made under another name, so that a file with the final name is always a finished disk.
            unfinished = data.temporary(operation, f"{self.instance.uuid}-{self.path.name}")
            unfinished.unlink(missing_ok=True)
            source = data.snapshot(self.snapshot.id).path / disk.file
            stall = self.instance.local.settings.stall_timeout
            qemu_img.convert(source, disk.format, unfinished, disk.format, watch=self.watch, stall=stall)
            unfinished.chmod(DISK_MODE)
            publish(unfinished, self.path, self.watch)
        fields = {"role": disk.role, "target": disk.target, "path": self.path, "format": disk.format}
        return Disk.model_validate({**fields, "virtual_size": disk.virtual_size})


def _place(folder: InstanceDir, snapshot: Snapshot, disk: SnapshotDisk) -> Path:
    if disk.role == "root":
        return folder.root(disk.format)
    same = [other.target for other in snapshot.disks if other.role == disk.role]
    return folder.path / f"{disk.role}{same.index(disk.target)}.{disk.format}"


def _bytes(local: LocalHost, snapshot: Snapshot, disk: SnapshotDisk) -> int:
    path = local.data.snapshot(snapshot.id).path / disk.file
    return qemu_img.measure(path, disk.format, "qcow2")
