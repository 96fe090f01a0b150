"""The host's own memory of operations in progress, in case Redis loses its.

A worker that executes a step keeps a copy of the operation's record on its host. When Redis was emptied, the record
is put back from there, and the operation goes on. Copies are not synced to disk: they outlive Redis and workers, and
a host that lost its power comes back with a Redis that kept its file.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from worker.engine.connection import shared
from worker.engine.journal import Journal
from worker.engine.record import State
from worker.errors import BrokerUnavailable, OperationNotFound, RecordUnreadable
from worker.settings import get_settings

log = structlog.get_logger(__name__)

LOOK_EVERY = 2.0
"""Seconds between two looks, and that a record must be missing: a worker that runs one of its steps puts it back
sooner, together with its lease."""

ASIDE = ".set-aside"

UNFINISHED = 5.0
"""Seconds after which a copy that is still being written is taken for one that its writer has left."""


@dataclass(frozen=True)
class Copy:
    """A record as Redis held it: its fields, and its undo entries."""

    operation: str
    fields: dict[str, str]
    undo: list[str]
    age: float = 0.0
    """Seconds since it was written."""

    @property
    def submitted_at(self) -> float:
        """When it was admitted."""
        return float(self.fields.get("submitted_at", 0))

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts that its plan names."""
        return frozenset(step["host"] for stage in json.loads(self.fields.get("plan", "[]")) for step in stage)

    @property
    def fence(self) -> int:
        """The highest fence that any of its steps has had."""
        return max((int(value) for name, value in self.fields.items() if name.endswith(":fence")), default=0)


@dataclass(frozen=True)
class End:
    """How an operation has ended; an id that was turned away may be used again, so also when it was submitted."""

    state: State
    submitted_at: float


class Mirror:
    """The copies on this host."""

    def __init__(self, data_dir: Path | None = None) -> None:
        root = data_dir or get_settings().data_dir
        self.folder = root / "operations"
        self.ends = root / "ended"

    def keep(self, copy: Copy) -> None:
        """Keep or renew a copy; a host whose disk is full keeps none and goes on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self._path(copy.operation), json.dumps({"fields": copy.fields, "undo": copy.undo}))
        except OSError as error:
            log.warning("cannot keep a copy of the record", operation=copy.operation, error=str(error))

    def _write(self, path: Path, content: str) -> None:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            unfinished.touch(mode=0o600)  # requests may hold secrets
            unfinished.write_text(content)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what workers that died had begun to write; who writes that slowly keeps no copy, and goes on.

        And what is noted of operations so old that no host would take them up any more.
        """
        _sweep(self.folder, "*.tmp", UNFINISHED)
        _sweep(self.ends, "*", get_settings().keep_records)

    def close(self, operation_id: str, state: State, hosts: Set[str], submitted_at: float) -> None:
        """Forget an operation that has ended; of one of several hosts note how: another one may have an older copy.

        One that is stuck is not forgotten: its undo may be tried again.
        """
        if state is State.STUCK:
            return
        with contextlib.suppress(OSError):  # as in `drop`
            if len(hosts) > 1 and self.folder.exists():
                self.ends.mkdir(exist_ok=True)
                self._write(self.ends / operation_id, json.dumps({"state": state, "submitted_at": submitted_at}))
        self.drop(operation_id)

    def drop(self, operation_id: str) -> None:
        """Forget an operation. A client that ends one has no copies, or may not touch the host's."""
        with contextlib.suppress(OSError):
            self._path(operation_id).unlink(missing_ok=True)

    def ended(self, operation_id: str) -> End | None:
        """How an operation of that id and of several hosts has ended, if that is known here."""
        try:
            note = json.loads((self.ends / operation_id).read_text())
            return End(State(note["state"]), float(note["submitted_at"]))
        except (OSError, ValueError, KeyError):
            return None

    def copies(self) -> Iterator[Copy]:
        """All copies; one that cannot be read is set aside."""
        for path in sorted(self.folder.glob("*.json")):
            if copy := self.find(path.stem):
                yield copy

    def find(self, operation_id: str) -> Copy | None:
        """The copy of one record; None where there is none, or none that can be read."""
        path = self._path(operation_id)
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            age = time.time() - path.stat().st_mtime
            return Copy(operation_id, content["fields"], content["undo"], age)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            log.error("cannot read a copy of a record: set aside", path=str(path), error=str(error))  # noqa: TRY400
            self.set_aside(operation_id)
            return None

    def set_aside(self, operation_id: str) -> None:
        """Keep a copy that nothing can be done with for people to look at."""
        with contextlib.suppress(OSError):
            self._path(operation_id).rename(self.folder / f"{operation_id}{ASIDE}")

    def aside(self) -> list[Path]:
        """The copies that were set aside."""
        return sorted(self.folder.glob(f"*{ASIDE}"))

    def _path(self, operation_id: str) -> Path:
        return self.folder / f"{operation_id}.json"


def _sweep(folder: Path, pattern: str, age: float) -> None:
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > age:
                path.unlink()


class MirrorWatch(threading.Thread):
    """Puts back what Redis has lost, and drops the copies of what has ended. One per control worker."""

    def __init__(self, mirror: Mirror | None = None) -> None:
        super().__init__(name="mirror", daemon=True)
        self._mirror = mirror or Mirror()
        self._book = Journal(shared())
        self._lock = threading.Lock()
        self._missing: dict[str, float] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._ended.wait(LOOK_EVERY):
            try:
                self.look()
            except BrokerUnavailable as error:
                log.debug("cannot compare with Redis", error=str(error))
            except Exception:
                log.exception("comparing the host's copies with Redis failed")

    def stop(self) -> None:
        """End after the running look."""
        self._ended.set()

    def settle(self) -> None:
        """Have Redis know again what it lost, as far as that can be done in two looks.

        To be called before it hears of this host again, and with that of new wishes for its instances.
        """
        deadline = time.monotonic() + 2 * LOOK_EVERY
        while self.look() and time.monotonic() < deadline and not self._ended.wait(LOOK_EVERY / 4):
            pass

    def look(self) -> bool:
        """Compare every copy with Redis once, which may lack it or know less; whether records are missing there."""
        with self._lock:
            self._mirror.sweep()
            copies = list(self._mirror.copies())
            states = {copy.operation: self._book.state(copy.operation) for copy in copies}
            now = time.monotonic()
            self._missing = {one: self._missing.get(one, now) for one, state in states.items() if state is None}
            for copy in copies:
                state = states[copy.operation]
                if state is not None and state.final:
                    self._mirror.close(copy.operation, state, copy.hosts, copy.submitted_at)
                elif state is not None or now - self._missing[copy.operation] >= LOOK_EVERY:
                    self._put_back(copy)
            for operation in self._book.held():
                if end := self._mirror.ended(operation):
                    self._end(operation, end)
            return bool(self._missing)

    def _end(self, operation: str, end: End) -> None:
        """End what another host has put back from a copy older than the end that this one knows of."""
        with contextlib.suppress(OperationNotFound, RecordUnreadable):  # the reaper tells of one that cannot be read
            record = self._book.read(operation)
            if record.submitted_at == end.submitted_at:
                self._book.conclude(record, end.state)
                log.warning("put back by another host, but it had ended", operation=operation, state=end.state.value)

    def _put_back(self, copy: Copy) -> None:
        try:
            self._restore(copy)
        except BrokerUnavailable:
            raise
        except Exception:  # one copy that cannot be put back must not keep the others from it
            log.exception("cannot put a record back", operation=copy.operation)

    def _restore(self, copy: Copy) -> None:
        end = self._mirror.ended(copy.operation)
        if State(copy.fields["state"]).final or (end and end.submitted_at == copy.submitted_at):
            self._mirror.drop(copy.operation)
        elif copy.age > get_settings().keep_records:
            # It may have ended since, elsewhere, so long ago that its record has expired.
            log.error("too old to be taken up again: set aside", operation=copy.operation, days=copy.age // 86400)
            self._mirror.set_aside(copy.operation)
        elif done := self._book.revive(copy.operation, copy.fence, copy.fields, copy.undo):
            log.warning("Redis had lost this operation, and this host has a copy", operation=copy.operation, done=done)
