"""What a libvirtd that was killed as it began a backup has left in QEMU, and no libvirtd knows of any more.

Its jobs go on, or stay when they are done, and keep every later backup from beginning (`Job ID ... already in use`);
its nodes keep the memory from being saved (`bdrv_inactivate_all() failed`), and the space of files that were removed.
Seen with libvirt 9.0 and QEMU 7.2.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import structlog

from worker.context import Watcher
from worker.errors import HypervisorError, InvalidState, Stalled
from worker.virt import checkpoints
from worker.virt.guest import Guest
from worker.virt.jobs import KNOWS_BACKUP, MAY_REST, BackupJob

log = structlog.get_logger(__name__)

_POLL = 0.05  # seconds


def end(guest: Guest, folder: Path, prefix: str, watch: Watcher) -> None:
    """End them: backups' jobs, nodes on files in hidden folders of `folder`, and bitmaps named with `prefix`.

    Only while libvirt runs no backup of the guest: else they may be its own. A guest that goes off takes them along.
    Raises Stalled, and what `watch` raises.
    """
    try:
        _end(guest, folder, prefix, watch)
    except InvalidState:
        if guest.is_active():
            raise


def _end(guest: Guest, folder: Path, prefix: str, watch: Watcher) -> None:
    if guest.libvirt_version < KNOWS_BACKUP:
        return
    if not guest.has_lost_job() and BackupJob(guest).progress() is not None:
        return
    _end_jobs(guest, watch)
    nodes = guest.ask_qemu("query-named-block-nodes")
    left = [node for node in nodes if _is_unfinished(Path(node["file"]), folder)]
    for node in sorted(left, key=lambda node: bool(node["drv"] == "file")):  # what stands on a file goes first
        _ask_to(guest, "blockdev-del", **{"node-name": node["node-name"]})
    known = set(checkpoints.names(guest))
    for node in nodes:
        for bitmap in node.get("dirty-bitmaps", []):
            if bitmap["name"].startswith(prefix) and bitmap["name"] not in known:
                _ask_to(guest, "block-dirty-bitmap-remove", node=node["node-name"], name=bitmap["name"])


def _end_jobs(guest: Guest, watch: Watcher) -> None:
    began = time.monotonic()
    while jobs := [job for job in guest.ask_qemu("query-jobs") if job["id"].startswith("backup-")]:
        for job in jobs:
            if job["status"] == "concluded":
                _ask_to(guest, "job-dismiss", id=job["id"])
            elif BackupJob(guest).survives_abort([one["id"] for one in jobs]):
                _ask_to(guest, "job-cancel", id=job["id"])
        watch.progress(0, None, "waiting for the end of a backup that libvirt has lost sight of")
        if time.monotonic() - began > MAY_REST:
            raise Stalled(f"a lost backup of {guest.name} does not end", seconds=MAY_REST)
        time.sleep(_POLL)


def _ask_to(guest: Guest, command: str, **arguments: Any) -> None:
    """What QEMU refuses is in use after all, or gone."""
    try:
        guest.ask_qemu(command, **arguments)
        log.info("ended what a lost backup had left in QEMU", instance=guest.name, command=command, **arguments)
    except HypervisorError as error:
        log.warning("left in QEMU", instance=guest.name, command=command, error=error.message, **arguments)


def _is_unfinished(path: Path, folder: Path) -> bool:
    return path.parent.parent == folder and path.parent.name.startswith(".")
