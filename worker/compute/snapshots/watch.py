"""Lets go of guests that are held too long: a second pair of hands, beside the worker that takes the snapshot.

A worker that is killed while a guest is frozen is replaced only once its lease has run out, and one that is stopped
keeps the instance locked. A frozen guest cannot wait for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots import holding
from worker.compute.snapshots.taking import Intent, intent_of, note_intent
from worker.compute.watching import HostWatch
from worker.errors import FleetError
from worker.images.layout import SnapshotDir

log = structlog.get_logger(__name__)

HELD_TOO_LONG = 20.0
"""Seconds. A guest is held for a fraction of one; a busy guest's agent may take up to ten to flush its caches."""


Hold = tuple[Path, int]
"""A snapshot's folder, and when it was put down there that its guest is held."""


class HoldWatch(HostWatch):
    """One per control worker."""

    def __init__(self, hosts: Sequence[LocalHost]) -> None:
        super().__init__("held guests", hosts)
        self._since: dict[str, dict[Hold, float]] = {}
        self._at_work: dict[Hold, threading.Thread] = {}

    def look(self, host: LocalHost) -> None:
        """Begin to let go of every guest that is held for too long: one that cannot be must not hold up the others."""
        held, now, known = dict(_held(host)), time.monotonic(), self._since.get(host.name, {})
        self._since[host.name] = {hold: known.get(hold, now) for hold in held}
        self._at_work = {hold: thread for hold, thread in self._at_work.items() if thread.is_alive()}
        for hold, since in self._since[host.name].items():
            if now - since > HELD_TOO_LONG and hold not in self._at_work:
                thread = threading.Thread(target=_let_go, args=(host, SnapshotDir(hold[0]), held[hold]), daemon=True)
                self._at_work[hold] = thread
                thread.start()


def _held(host: LocalHost) -> Iterator[tuple[Hold, Intent]]:
    for path in host.data.unfinished_snapshots():
        folder = SnapshotDir(path)
        intent = intent_of(folder)
        if intent is not None and intent.host in {"", host.name} and not intent.released:
            with suppress(FileNotFoundError):  # let go of just now
                yield (path, folder.intent.stat().st_mtime_ns), intent


def _let_go(host: LocalHost, folder: SnapshotDir, intent: Intent) -> None:
    log.warning("a guest is held too long: letting go of it", instance=intent.name, snapshot=str(folder.path))
    instance = LocalInstance(host, intent.name, intent.uuid)
    try:
        holding.release(instance, folder, intent)
        # Afterwards: should this fail, it is tried again. The holder learns from it that it does not hold any more.
        note_intent(folder, intent.model_copy(update={"released": True}))
    except (FleetError, OSError) as error:
        log.warning("cannot let go of a guest yet", instance=intent.name, host=host.name, error=str(error))
