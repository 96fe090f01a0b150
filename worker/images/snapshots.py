"""Published snapshots on a host: folders whose manifest.json says what they are. Nothing else is a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from pydantic import ValidationError

from worker.context import Watcher
from worker.errors import InvalidSpec, SnapshotDamaged, SnapshotInUse, SnapshotNotFound
from worker.images.checksum import checksum_of
from worker.images.files import publish_folder, remove_tree, size_of, write_text_durably
from worker.images.layout import DataDir, SnapshotDir
from worker.models import RootFile, Snapshot, SnapshotDisk, SnapshotEntry

log = structlog.get_logger(__name__)


def find(data: DataDir, snapshot: str) -> Snapshot | None:
    """The published snapshot of that id, if it is on this host."""
    return _read(data.snapshot(snapshot))


def require(data: DataDir, snapshot: str) -> Snapshot:
    """The published snapshot of that id. Raises SnapshotNotFound."""
    found = find(data, snapshot) if snapshot else None
    if found is None:
        raise SnapshotNotFound(
            f"snapshot: none with the id {snapshot!r} lies in {data.snapshots}",
            hint="Without shared storage it can be restored only on the host that has it (virtfleet snapshots);"
            f" on others it serves as an image: virtfleet spawn NAME --image snapshot:{snapshot}",
            field="snapshot",
            given=snapshot,
        )
    return found


def every(data: DataDir) -> list[Snapshot]:
    """All snapshots published on this host, oldest first."""
    found = [_read(SnapshotDir(path)) for path in data.snapshots.glob("[!.]*")]
    return sorted((one for one in found if one), key=lambda one: one.taken_at)


def entry_of(data: DataDir, snapshot: Snapshot) -> SnapshotEntry:
    """What the registry says of a snapshot that is published here."""
    fields = snapshot.model_dump(include=set(SnapshotEntry.model_fields) - {"disks"})
    return SnapshotEntry(
        **fields,
        disks=tuple(disk.target for disk in snapshot.disks),
        root=_root_file(data, snapshot),
        virtual_size=sum(disk.virtual_size for disk in snapshot.disks),
        actual_size=sum(disk.actual_size for disk in snapshot.disks),
    )


def root_disk(snapshot: Snapshot) -> SnapshotDisk:
    """The disk that the guest boots from. Raises InvalidSpec when the snapshot was taken without it."""
    found = _root_disk(snapshot)
    if found is None:
        raise no_root_disk(snapshot.id, [disk.target for disk in snapshot.disks])
    return found


def no_root_disk(snapshot: str, disks: Sequence[str]) -> InvalidSpec:
    """The error for a snapshot that no guest can boot from."""
    return InvalidSpec(
        f"snapshot: {snapshot} holds {', '.join(disks)}, and no root disk", field="snapshot", given=snapshot
    )


def used_by(data: DataDir, snapshot: str) -> list[str]:
    """Ids of the snapshots that hold only what changed since this one."""
    return [one.id for one in every(data) if any(disk.backing == snapshot for disk in one.disks)]


def require_unused(data: DataDir, snapshot: str) -> None:
    """Raise SnapshotInUse where others hold only what changed since this one."""
    users = used_by(data, snapshot)
    if users:
        raise SnapshotInUse(
            f"snapshot {snapshot} is needed by {', '.join(users)}, which hold only what changed since",
            hint="Delete those first, the newest one first.",
            used_by=users,
        )


def prove(data: DataDir, snapshot: Snapshot, disk: SnapshotDisk, watch: Watcher) -> None:
    """Make sure that a disk, and all that it builds on, is what it was when it was published. Progress in bytes.

    Raises SnapshotDamaged, SnapshotNotFound.
    """
    path = data.snapshot(snapshot.id).path / disk.file
    if not path.exists() or checksum_of(path, watch, like=disk.checksum) != disk.checksum:
        raise SnapshotDamaged(
            f"{path} is not what it was when snapshot {snapshot.id} was taken",
            hint="Look at the host's storage and log; use another snapshot.",
        )
    if disk.backing is not None:
        below = require(data, disk.backing)
        prove(data, below, next(one for one in below.disks if one.target == disk.target), watch)


def about_to_appear(data: DataDir, snapshot: str) -> Snapshot | None:
    """What `publish` was killed over, if it was: a manifest is written when all else of the snapshot is durable."""
    return _read(data.unfinished_snapshot(snapshot))


def publish(data: DataDir, snapshot: Snapshot) -> None:
    """Let a snapshot, whose files are durable, appear as a whole under its id. Raises NoSpace."""
    unfinished = data.unfinished_snapshot(snapshot.id)
    # The guest's definition may hold passwords, and its disks certainly do.
    write_text_durably(unfinished.manifest, snapshot.model_dump_json(indent=1) + "\n", mode=0o600)
    wanted = {unfinished.manifest.name, *(disk.file for disk in snapshot.disks), *filter(None, [snapshot.nvram])}
    for path in unfinished.path.iterdir():
        if path.name not in wanted:
            path.unlink()
    publish_folder(unfinished.path, data.snapshot(snapshot.id).path)


def remove(data: DataDir, snapshot: str) -> bool:
    """Remove a snapshot, published or not; False when there was none. Raises SnapshotInUse.

    It stops being a snapshot before its first file goes.
    """
    published, unfinished = data.snapshot(snapshot).path, data.unfinished_snapshot(snapshot).path
    require_unused(data, snapshot)
    there = published.exists() or unfinished.exists()
    remove_tree(unfinished, data.snapshots)
    if published.exists():
        published.rename(unfinished)
        remove_tree(unfinished, data.snapshots)
    return there


def _root_disk(snapshot: Snapshot) -> SnapshotDisk | None:
    # Guests that are not the fleet's do not say which it is: the first one is.
    return next((disk for disk in snapshot.disks if disk.role in {"root", ""}), None)


def _root_file(data: DataDir, snapshot: Snapshot) -> RootFile | None:
    disk = _root_disk(snapshot)
    if disk is None:
        return None
    path = data.snapshot(snapshot.id).path / disk.file
    return RootFile(
        path=path.relative_to(data.root),
        format=disk.format,
        size=size_of(path),
        allocated=disk.actual_size,
        checksum=disk.checksum,
        backing=disk.backing,
    )


def _read(folder: SnapshotDir) -> Snapshot | None:
    try:
        return Snapshot.model_validate_json(folder.manifest.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        log.warning("not a snapshot's manifest", path=str(folder.manifest), error=str(error))
        return None
