"""Checksums, and how files that are to become durable get theirs while the disk still writes.

The checksum of a *sealed* file is made of its blocks' sha256, so that several processors share the work and holes cost
nothing: a disk of 100 GiB would take a single one minutes. It is what coreutils make of a file by

    split -b 4M --filter=sha256sum FILE | sha256sum
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from worker.context import Alone, Watcher
from worker.images.files import out_of_space_is_an_error

BLOCK = 4 * 1024**2
_READ = 256 * 1024  # bytes; what is hashed is still in the processor's cache then
_LOOK_EVERY = 0.05  # seconds
_PROCESSORS = 4  # at the most: one of them computes 1 to 2 GB/s


def seal(paths: Iterable[Path], watch: Watcher) -> dict[Path, str]:
    """Make files durable and return the checksum of each; progress in bytes. Raises NoSpace and what `watch` raises."""
    with ExitStack() as stack:
        files = [stack.enter_context(_File(path)) for path in paths]
        work, processors = _Work(files), min(_PROCESSORS, os.cpu_count() or 1)
        writers = ThreadPoolExecutor(max(1, len(files)))
        stack.callback(writers.shutdown, wait=False)  # nothing ends an fsync before its time
        readers = stack.enter_context(ThreadPoolExecutor(processors))  # waited for before the files are closed
        stack.callback(work.stop)
        jobs: list[Future[Any]] = [readers.submit(work.run) for _ in range(processors)]
        jobs += [writers.submit(_write_out, file.path) for file in files]
        total = sum(file.size for file in files)
        while wait(jobs, _LOOK_EVERY).not_done:
            watch.progress(min(work.done, total), total, "verifying")
        for job in jobs:
            job.result()
        return {file.path: file.checksum() for file in files}


def checksum_of(path: Path) -> str:
    """The checksum of one sealed file."""
    return seal([path], Alone())[path]


def sha256_of(path: Path, watch: Watcher) -> str:
    """The sha256 of one file; progress in bytes."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
            done += len(chunk)
            watch.progress(done, total, "verifying")
    return digest.hexdigest()


class _File:
    """A file, and the sums of its blocks as far as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[int, str] = {}

    def __enter__(self) -> _File:
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def sum_up(self, start: int) -> int:
        """Compute the sum of the block at `start`; its bytes."""
        length = min(BLOCK, self.size - start)
        self.sums[start] = _sum_of_zeros(length) if self._is_hole(start, length) else self._sum(start, length)
        return length

    def checksum(self) -> str:
        """What the blocks' sums make together."""
        lines = "".join(f"{self.sums[start]}  -\n" for start in range(0, self.size, BLOCK))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _sum(self, start: int, length: int) -> str:
        digest = hashlib.sha256()
        for offset in range(start, start + length, _READ):
            digest.update(os.pread(self.descriptor, min(_READ, start + length - offset), offset))
        return digest.hexdigest()

    def _is_hole(self, start: int, length: int) -> bool:
        try:
            return os.lseek(self.descriptor, start, os.SEEK_DATA) >= start + length
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return True
            raise


class _Work:
    """The blocks of all files, for several threads to take."""

    def __init__(self, files: Iterable[_File]) -> None:
        self.done = 0
        self._blocks = ((file, start) for file in files for start in range(0, file.size, BLOCK))
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Sum blocks up until none is left."""
        for file, start in iter(self._next, None):
            length = file.sum_up(start)
            with self._lock:
                self.done += length

    def stop(self) -> None:
        """Have everybody end after the block they are at."""
        self._stopped = True

    def _next(self) -> tuple[_File, int] | None:
        with self._lock:
            return None if self._stopped else next(self._blocks, None)


@cache
def _sum_of_zeros(length: int) -> str:
    return hashlib.sha256(bytes(length)).hexdigest()


def _write_out(path: Path) -> None:
    with out_of_space_is_an_error(path.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
