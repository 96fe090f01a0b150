"""Checksums of files that must become durable anyway: one waits for the disk while the other computes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from worker.context import Watcher
from worker.images.files import out_of_space_is_an_error, size_of

BLOCK = 1024 * 1024
_LOOK_EVERY = 0.1  # seconds


def seal(paths: Iterable[Path], watch: Watcher) -> dict[Path, str]:
    """Make files durable and return the sha256 of each; progress in bytes. Raises NoSpace and what `watch` raises."""
    files = list(paths)
    work = _Work()
    pool = ThreadPoolExecutor(2 * max(1, len(files)))
    try:
        sums = {path: pool.submit(work.sha256, path) for path in files}
        written = [pool.submit(_write_out, path) for path in files]
        total = sum(size_of(path) for path in files)
        both: list[Future[Any]] = [*sums.values(), *written]
        while wait(both, _LOOK_EVERY).not_done:
            watch.progress(min(work.done, total), total, "verifying")
        for one in written:
            one.result()
        return {path: found.result() for path, found in sums.items()}
    finally:
        work.stop.set()
        pool.shutdown(wait=False)


def sha256_of(path: Path) -> str:
    """The sha256 of one file."""
    return _Work().sha256(path)


class _Work:
    """What the threads have read so far, and whether they are to end."""

    def __init__(self) -> None:
        self.done = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while not self.stop.is_set() and (chunk := file.read(BLOCK)):
                digest.update(chunk)
                with self._lock:
                    self.done += len(chunk)
        return digest.hexdigest()


def _write_out(path: Path) -> None:
    with out_of_space_is_an_error(path.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
