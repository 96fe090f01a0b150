"""From what was caught to files that stand for themselves, verified, and published as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from worker.compute.local import LocalInstance
from worker.compute.provision import spec_of
from worker.compute.snapshots import cold
from worker.compute.snapshots.share import shares
from worker.compute.snapshots.taking import published, taking
from worker.context import Context, Watcher
from worker.errors import InvalidState, SnapshotDamaged
from worker.images import qemu_img, snapshots
from worker.images.checksum import seal
from worker.images.files import allocated_size
from worker.images.layout import SnapshotDir, boot
from worker.images.qcow2 import virtual_size
from worker.images.reserve import Ledger
from worker.images.sparse import punch_holes
from worker.models import PowerState, Snapshot, SnapshotDisk, SnapshotSpec, Taken, TakenDisk


def extract(instance: LocalInstance, spec: SnapshotSpec, taken: Taken, ctx: Context) -> Taken:
    """Give every disk its final form, in the snapshot's folder; disks that are there already are kept.

    Raises NoSpace, Stalled, CommandFailed, and SnapshotDamaged where the host was started anew since, and the disks may
    have changed.
    """
    if published(instance, ctx):
        return taken
    if not _is_of_this_boot(taken):
        taken = _caught_again(instance, spec, taken, ctx)
    work = _Extraction(instance, spec, taken, instance.local.data.unfinished_snapshot(ctx.operation))
    watches = shares(ctx, [disk.virtual_size for disk in taken.disks])
    # The disks of a guest that is off are read right here: nobody else of the fleet may touch them meanwhile.
    with instance.owned(ctx), _holding_still(instance) if taken.method == "cold" else nullcontext():
        disks = tuple(work.finish(disk, watch) for disk, watch in zip(taken.disks, watches, strict=True))
    return taken.model_copy(update={"disks": disks})


@contextmanager
def _holding_still(instance: LocalInstance) -> Iterator[None]:
    """Raise InvalidState where somebody past the fleet has started the guest, whose disks the block reads."""
    _require_still(instance)
    yield
    _require_still(instance)


def _require_still(instance: LocalInstance) -> None:
    with instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None and guest.is_active():
            raise InvalidState(
                f"{instance.name} was started while its disks were read: what was copied is of no instant",
                hint=f"Take it again: virtfleet snapshot {instance.name}",
            )


def _caught_again(instance: LocalInstance, spec: SnapshotSpec, taken: Taken, ctx: Context) -> Taken:
    """The same of this boot, where the guest's disks have held still: what was made of them need not be on the disk."""
    with taking(instance, spec, ctx) as this:
        left_as = PowerState.SAVED if taken.power in cold.ON else taken.power
        if taken.method != "cold" or this.guest.power() is not left_as:
            raise _started_anew(instance)
        if (known := this.recall()) is not None:  # an earlier attempt was here
            return known
        this.folder.create_empty()
        this.keep_definition()
        return this.caught(**taken.model_dump(exclude={"boot"}))


@dataclass(frozen=True)
class _Extraction:
    """What was caught, on its way to its final form."""

    instance: LocalInstance
    spec: SnapshotSpec
    taken: Taken
    folder: SnapshotDir

    def finish(self, disk: TakenDisk, watch: Watcher) -> TakenDisk:
        """One disk in its final form."""
        final = self.folder.disk(disk.target, self.spec.format)
        if disk.path != final:
            self._convert(disk, final, watch)
        elif self.taken.parent:
            self._rebase(final, self.taken.parent, disk.target)
        elif disk.format == "raw":
            punch_holes(final)  # a backup allocates all of a raw file, and leaves most of it unwritten
        return disk.model_copy(update={"path": final, "format": self.spec.format})

    def _rebase(self, increment: Path, parent: str, target: str) -> None:
        """Build on the snapshot before; libvirt named the guest's own disk, which goes on changing."""
        backing = self.instance.local.data.snapshot(parent).disk(target, "qcow2")
        # Relative: the folder of all snapshots may be moved or mounted elsewhere.
        qemu_img.rebase_unsafely(increment, f"../{backing.parent.name}/{backing.name}", "qcow2")

    def _convert(self, disk: TakenDisk, final: Path, watch: Watcher) -> None:
        if not final.exists():
            unfinished = self.folder.converting(disk.target)
            unfinished.unlink(missing_ok=True)
            qemu_img.convert(
                disk.path,
                disk.format,
                unfinished,
                self.spec.format,
                compress=self.spec.compress,
                bytes_per_second=self.spec.bytes_per_second,
                watch=watch,
                stall=self.instance.local.settings.stall_timeout,
            )
            unfinished.rename(final)
        if disk.path.parent == self.folder.path:
            disk.path.unlink(missing_ok=True)


def publish(instance: LocalInstance, taken: Taken, ctx: Context) -> Snapshot:
    """Verify the files, make them durable and immutable, and let the snapshot appear; published already is success.

    Raises SnapshotDamaged, NoSpace.
    """
    data = instance.local.data
    with instance.owned(ctx):  # one who stood still since it looked must not publish what another has begun to verify
        snapshot = published(instance, ctx)
        if snapshot is None:
            left = snapshots.about_to_appear(data, ctx.operation)
            snapshot = left if left and left.taken_at == taken.taken_at else _made_durable(instance, taken, ctx)
            ctx.check()
            snapshots.publish(data, snapshot)
    Ledger(data.root).release(ctx.operation)
    return snapshot


def _made_durable(instance: LocalInstance, taken: Taken, ctx: Context) -> Snapshot:
    if not _is_of_this_boot(taken):
        raise _started_anew(instance)
    sums = _verified(taken, ctx, instance.local.settings.stall_timeout)
    for disk in taken.disks:
        os.chown(disk.path, os.geteuid(), os.getegid())  # a backup's file belongs to QEMU's user
        disk.path.chmod(0o400)
    return _manifest(instance, taken, instance.local.data.unfinished_snapshot(ctx.operation), sums, ctx)


def _is_of_this_boot(taken: Taken) -> bool:
    """What was written before the host went down need not be on its disks, and looks as if it were."""
    return taken.boot in {"", boot()}


def _started_anew(instance: LocalInstance) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"host {instance.local.name} was started anew while the snapshot was taken, which was not on its disk yet",
        hint="Take it again.",
    )


def _verified(taken: Taken, ctx: Context, stall: float) -> dict[Path, str]:
    """The checksum of each file, once all are found sound: checks look at little, and sums are computed meanwhile."""
    with ThreadPoolExecutor(max(1, len(taken.disks))) as pool:
        checks = [pool.submit(_verify, disk, ctx, stall) for disk in taken.disks]
        sums = seal([disk.path for disk in taken.disks], ctx)
        for check in checks:
            check.result()
    return sums


def _verify(disk: TakenDisk, ctx: Context, stall: float) -> None:
    size = virtual_size(disk.path, disk.format)
    if size != disk.virtual_size:
        raise SnapshotDamaged(f"{disk.target} is {size} bytes large instead of {disk.virtual_size}", disk=disk.target)
    found = qemu_img.check(disk.path, disk.format, watch=ctx, stall=stall)
    if found.corruptions:
        raise SnapshotDamaged(f"qemu-img check found {found.corruptions} errors in {disk.target}", disk=disk.target)


def _manifest(
    instance: LocalInstance, taken: Taken, folder: SnapshotDir, sums: dict[Path, str], ctx: Context
) -> Snapshot:
    disks = tuple(
        SnapshotDisk(
            target=disk.target,
            role=disk.role,
            file=disk.path.name,
            format=disk.format,
            virtual_size=disk.virtual_size,
            actual_size=allocated_size(disk.path),
            checksum=sums[disk.path],
            backing=taken.parent,
        )
        for disk in taken.disks
    )
    return Snapshot(
        **taken.model_dump(exclude={"disks", "boot", "began"}),
        id=ctx.operation,
        instance=instance.name,
        instance_uuid=instance.uuid,
        host=instance.local.name,
        spec=spec_of(instance.local, instance.uuid),
        definition=folder.definition.read_text(),
        nvram=folder.nvram.name if folder.nvram.exists() else None,
        disks=disks,
    )
