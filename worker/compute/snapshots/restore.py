"""A new instance from a snapshot: its disks, proven, its definition's sizes, a new swap disk, a new identity."""

from __future__ import annotations

from dataclasses import dataclass

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.provision import DISK_MODE, disk_target, plain_disk, require_free
from worker.compute.snapshots.share import shares
from worker.context import Context, Watcher
from worker.errors import InvalidSpec
from worker.images import qemu_img, snapshots
from worker.images.files import copy_durably, publish, replace_json, require_space
from worker.images.reserve import Ledger
from worker.images.swap import make_swap
from worker.models import GIB, MIB, Disk, DiskFormat, DiskSet, InstanceSpec, Snapshot, SnapshotDisk


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
    ephemeral = tuple(disk.virtual_size // GIB for disk in _ephemeral(found))  # perhaps not all that there were
    wanted = {"image": f"snapshot:{snapshot}", "sha256": None, "ephemeral_gib": ephemeral}
    return found.spec.model_copy(update=wanted)


def _ephemeral(snapshot: Snapshot) -> list[SnapshotDisk]:
    return [disk for disk in snapshot.disks if disk.role == "ephemeral"]


def restore_disks(instance: LocalInstance, snapshot: str, ctx: Context) -> DiskSet:
    """Make the new instance's disks from the snapshot's, and its UEFI variables; what is finished already is kept.

    Raises SnapshotNotFound, SnapshotDamaged, InvalidSpec when it holds no root disk, NoSpace.
    """
    local = instance.local
    with local.libvirt() as host:
        require_free(instance, host)
    spec = spec_from(local, snapshot)
    found = snapshots.require(local.data, snapshot)
    held = [snapshots.root_disk(found), *_ephemeral(found)]
    kept_free = local.settings.reserve_bytes + Ledger(local.data.root).outstanding(besides=ctx.operation)
    require_space(local.data.create().root, sum(_bytes(local, found, disk) for disk in held), kept_free)
    ctx.undo("remove_files", uuid=instance.uuid)
    with instance.owned(ctx) as folder:
        replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})
        if found.nvram and spec.firmware == "efi" and not folder.nvram.exists():
            copy_durably(local.data.snapshot(snapshot).path / found.nvram, folder.nvram, DISK_MODE)
        watches = shares(ctx, [disk.virtual_size for disk in held], "restoring")
        copies = [_Copy(instance, found, *one) for one in zip(held, range(len(held)), watches, strict=True)]
        disks = [copy.make(ctx.operation) for copy in copies]
        if spec.swap_mib:
            if not folder.swap.exists():
                make_swap(folder.swap, spec.swap_mib, ctx)
            disks.append(plain_disk("swap", disk_target(len(disks)), folder.swap, "raw", spec.swap_mib * MIB))
        return DiskSet(disks=tuple(disks))


@dataclass(frozen=True)
class _Copy:
    """One disk on its way from a snapshot, and all that it builds on, to an instance."""

    instance: LocalInstance
    snapshot: Snapshot
    disk: SnapshotDisk
    number: int
    watch: Watcher

    def make(self, operation: str) -> Disk:
        """The disk, with the name, target and format that one of its role has in instances that were spawned."""
        data, disk, folder = self.instance.local.data, self.disk, self.instance.folder
        form: DiskFormat = "qcow2" if self.number else disk.format
        path = folder.ephemeral(self.number - 1) if self.number else folder.root(form)
        if not path.exists():
            snapshots.prove(data, self.snapshot, disk, self.watch)
            # Made under another name, so that a file with the final name is always a finished disk.
            unfinished = data.temporary(operation, f"{self.instance.uuid}-{path.name}")
            unfinished.unlink(missing_ok=True)
            source = data.snapshot(self.snapshot.id).path / disk.file
            stall = self.instance.local.settings.stall_timeout
            qemu_img.convert(source, disk.format, unfinished, form, watch=self.watch, stall=stall)
            unfinished.chmod(DISK_MODE)
            publish(unfinished, path, self.watch)
        role = "ephemeral" if self.number else "root"
        return plain_disk(role, disk_target(self.number), path, form, disk.virtual_size)


def _bytes(local: LocalHost, snapshot: Snapshot, disk: SnapshotDisk) -> int:
    path = local.data.snapshot(snapshot.id).path / disk.file
    return qemu_img.measure(path, disk.format, "qcow2")
