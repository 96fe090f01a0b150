"""An instance's disks as they lie in its directory: read, and grown to what its spec says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from worker.compute.provision import disk_target, ephemeral_disk, plain_disk
from worker.context import Context
from worker.errors import UnsupportedByHost
from worker.images import qemu_img
from worker.images.layout import InstanceDir
from worker.images.qcow2 import read_header
from worker.models import GIB, Disk, DiskSet, InstanceSpec
from worker.virt.guest import Guest


def present(folder: InstanceDir, spec: InstanceSpec) -> DiskSet:
    """The disks that are there, with the roles and targets that `spec` gives them. Raises `InvalidState`."""
    return _with_others(folder, spec, kept(folder, spec))


def require_no_others(guest: Guest, folder: InstanceDir, spec: InstanceSpec) -> None:
    """Raise `UnsupportedByHost` where the domain has a disk that is none of its instance's, now or when it starts next.

    A resize and a move give it those of its instance: what somebody has attached, or the overlay of a snapshot that
    libvirt was asked for, would be left behind with what the guest has written there.
    """
    known = {disk.target: disk.path.resolve() for disk in present(folder, spec).disks}
    for target, path in sorted(guest.disk_sources(), key=str):
        if path is None or known.get(target) != path.resolve():
            raise UnsupportedByHost(
                f"disk {target} of {guest.name} is {path or 'not in a file'}, which the fleet did not give it",
                hint=f"Detach it: virsh detach-disk {guest.name} {target}.{_merging(guest, path) if path else ''}",
            )


def _merging(guest: Guest, path: Path) -> str:
    commit = f"power off, qemu-img commit {path}, and name the disk below it again: virsh edit {guest.name}"
    return f" Merge the overlay of a snapshot: {commit}"


def _with_others(folder: InstanceDir, spec: InstanceSpec, data: list[Disk]) -> DiskSet:
    swap = [read(folder.swap, "swap", disk_target(len(data)))] if spec.swap_mib else []
    seed = [read(folder.seed, "seed", "vdz")] if folder.seed.exists() else []
    return DiskSet(disks=(*data, *swap, *seed))


def kept(folder: InstanceDir, spec: InstanceSpec) -> list[Disk]:
    """The disks that hold the guest's data: root and ephemeral ones, which cannot be made again."""
    numbers = range(len(spec.ephemeral_gib))
    return [root(folder), *(read(folder.ephemeral(index), "ephemeral", disk_target(index + 1)) for index in numbers)]


def root(folder: InstanceDir) -> Disk:
    """The root disk."""
    raw = folder.root("raw")
    return read(raw if raw.exists() else folder.root("qcow2"))


def read(path: Path, role: str = "root", target: str = "vda") -> Disk:
    """A disk from its file. The name tells the format: the guest could have written any header into a raw disk."""
    if path.suffix != ".qcow2":
        return plain_disk(role, target, path, "raw", path.stat().st_size)
    found = read_header(path)
    backing = Path(found.backing_file) if found.backing_file else None
    return plain_disk(role, target, path, "qcow2", found.virtual_size).model_copy(update={"backing": backing})


def grow(folder: InstanceDir, spec: InstanceSpec, found: Iterable[Disk], ctx: Context) -> DiskSet:
    """Make the disks `found` of a stopped guest as large as `spec` says, and those that it adds; all of them then.

    Never shrinks. The swap disk that `spec` wants must be there.
    """
    known = {disk.target: disk for disk in found if disk.role in ("root", "ephemeral")}
    grown = [_grown(known[disk_target(0)], (spec.disk_gib or 0) * GIB, ctx)]
    for index, gib in enumerate(spec.ephemeral_gib):
        target = disk_target(index + 1)
        ephemeral_disk(folder, index, gib * GIB, target)
        there = known.get(target) or read(folder.ephemeral(index), "ephemeral", target)
        grown.append(_grown(there, gib * GIB, ctx))
    return _with_others(folder, spec, grown)


def _grown(disk: Disk, size: int, ctx: Context) -> Disk:
    if size <= disk.virtual_size:
        return disk
    ctx.progress(0, None, f"growing {disk.path.name}")
    qemu_img.resize(disk.path, disk.format, size)
    return disk.model_copy(update={"virtual_size": size})
