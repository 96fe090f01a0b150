"""Lets go of guests that are held too long: a second pair of hands, beside the worker that takes the snapshot.

A worker that is killed while a guest is frozen is replaced only once its lease has run out, and one that is stopped
keeps the instance locked. A frozen guest cannot wait for that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots import holding
from worker.compute.snapshots.taking import Intent, intent_of, note_intent
from worker.compute.watching import HostWatch
from worker.images.layout import SnapshotDir

log = structlog.get_logger(__name__)

HELD_TOO_LONG = 20.0
"""Seconds. A guest is held for a fraction of one; a busy guest's agent may take up to ten to flush its caches."""


class HoldWatch(HostWatch):
    """One per control worker."""

    def __init__(self, hosts: Sequence[LocalHost]) -> None:
        super().__init__("held guests", hosts)
        self._since: dict[tuple[Path, int], float] = {}

    def look(self, host: LocalHost) -> None:
        """Let go of every guest that has been held for too long."""
        seen: dict[tuple[Path, int], float] = {}
        for path in host.data.unfinished_snapshots():
            folder = SnapshotDir(path)
            intent = intent_of(folder)
            if intent is not None and intent.host in {"", host.name} and not intent.released:
                key = path, folder.intent.stat().st_mtime_ns
                seen[key] = self._since.get(key, time.monotonic())
                if time.monotonic() - seen[key] > HELD_TOO_LONG:
                    _let_go(host, folder, intent)
        self._since = seen


def _let_go(host: LocalHost, folder: SnapshotDir, intent: Intent) -> None:
    log.warning("a guest is held too long: letting go of it", instance=intent.name, snapshot=str(folder.path))
    instance = LocalInstance(host, intent.name, intent.uuid)
    holding.release(instance, folder, intent)
    # Afterwards: should this fail, it is tried again. The holder learns from it that it does not hold any more.
    note_intent(folder, intent.model_copy(update={"released": True}))
