"""Ending what copies a guest's disks into a snapshot's folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import structlog

from worker.context import Alone, Watcher
from worker.errors import InvalidState
from worker.images.layout import SnapshotDir
from worker.virt import strays
from worker.virt.guest import Guest
from worker.virt.jobs import BackupJob, MirrorJob

PREFIX = "virtfleet."
"""What the names of the fleet's checkpoints begin with."""

log = structlog.get_logger(__name__)


def end_jobs(guest: Guest, folder: SnapshotDir, watch: Watcher) -> None:
    """End the jobs that write into the folder; the guest runs on."""
    job = BackupJob(guest)
    if _any_below(folder, job.targets().values()):
        job.end(watch)
    for disk in guest.disks():
        mirror = MirrorJob(guest, disk.target)
        target = mirror.target()
        if target is not None and _any_below(folder, [target]):
            _end_mirror(mirror)
    strays.end(guest, folder.path.parent, PREFIX, watch)


def give_way(guest: Guest, folder: SnapshotDir) -> None:
    """Let a guest go on that QEMU has stopped because a write of it failed, on a full disk as a rule.

    What is copied into the folder is given up: it may be what the guest has no room for.
    """
    if not guest.is_stopped_by_io_error():
        return
    log.warning("the guest's disk is full: its snapshot gives way", instance=guest.name, snapshot=str(folder.path))
    end_jobs(guest, folder, Alone())
    if folder.path.exists():
        for path in set(folder.path.iterdir()) - {folder.intent}:
            path.unlink(missing_ok=True)
    guest.resume()  # it tries the write again


def _end_mirror(mirror: MirrorJob) -> None:
    try:
        mirror.end()
    except InvalidState:
        if mirror.target() is not None:
            raise


def _any_below(folder: SnapshotDir, paths: Iterable[Path]) -> bool:
    return any(path.parent == folder.path for path in paths)
