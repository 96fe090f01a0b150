"""Checksums: the same for the same content however it is stored, found by as many processors as there are.

A file's is made of those of its blocks, so that processors share the work, holes cost nothing, and that of a copy is
known as soon as its last block is here. It is BLAKE3, several times as fast as SHA-256 even where the processor has
instructions for that, and what b3sum(1) makes of a file by

    split -b 1M --filter=b3sum FILE | b3sum
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from worker.context import Watcher
from worker.images.files import out_of_space_is_an_error

BLOCK = 1024**2
KIND = "blake3:"
"""What a checksum begins with."""

_READ = 256 * 1024  # bytes; what is hashed is still in the processor's cache then
_LOOK_EVERY = 0.05  # seconds
_PROCESSORS = 4  # at the most: one of them computes 2 to 5 GB/s


def checksum_of(path: Path, watch: Watcher, *, like: str = KIND) -> str:
    """The checksum of a file's content, of the kind that `like` is of; progress in bytes."""
    return _sums([path], watch, _kind_of(like), ())[path]


def seal(paths: Iterable[Path], watch: Watcher, *, like: str = KIND) -> dict[Path, str]:
    """Make files durable while the checksum of each is computed; progress in bytes.

    Raises NoSpace and what `watch` raises.
    """
    files = tuple(paths)
    return _sums(files, watch, _kind_of(like), files)


def sum_of_block(data: bytes | memoryview) -> bytes:
    """The checksum of one block, the last of a file being shorter."""
    return blake3(data).digest()


def sum_of_hole(length: int) -> bytes:
    """The checksum of a block that reads as zeros."""
    return _CURRENT.of_zeros(length)


def combined(sums: Iterable[bytes]) -> str:
    """The checksum of a file from those of its blocks."""
    return _CURRENT.combined(sums)


def is_current(checksum: str) -> bool:
    """Whether it is of the kind that `checksum_of` computes; earlier versions of the fleet noted others."""
    return checksum.startswith(KIND)


def sha256_of(path: Path, watch: Watcher) -> str:
    """The sha256 of one file; progress in bytes."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
            done += len(chunk)
            watch.progress(done, total, "verifying")
    return digest.hexdigest()


# --- kinds ------------------------------------------------------------------------------------------------------------


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class _Kind:
    """How a checksum is made: by which hash, of blocks of how many bytes."""

    prefix: str
    new: Callable[..., _Hash]
    block: int

    def of_zeros(self, length: int) -> bytes:
        return _zeros(self, length)

    def combined(self, sums: Iterable[bytes]) -> str:
        lines = "".join(f"{each.hex()}  -\n" for each in sums)
        return self.prefix + self.new(lines.encode()).hexdigest()


@cache
def _zeros(kind: _Kind, length: int) -> bytes:
    return kind.new(bytes(length)).digest()


_CURRENT = _Kind(KIND, blake3, BLOCK)
_BEFORE = _Kind("", hashlib.sha256, 4 * 1024**2)
"""That of snapshots published before there was `KIND`."""


def _kind_of(checksum: str) -> _Kind:
    return _CURRENT if is_current(checksum) else _BEFORE


# --- work -------------------------------------------------------------------------------------------------------------


def _sums(paths: Iterable[Path], watch: Watcher, kind: _Kind, durable: Iterable[Path]) -> dict[Path, str]:
    with ExitStack() as stack:
        files = [stack.enter_context(_File(path, kind)) for path in paths]
        written = list(durable)
        work, processors = _Work(files), min(_PROCESSORS, os.cpu_count() or 1)
        writers = ThreadPoolExecutor(max(1, len(written)))
        stack.callback(writers.shutdown, wait=False)  # nothing ends an fsync before its time
        readers = stack.enter_context(ThreadPoolExecutor(processors))  # waited for before the files are closed
        stack.callback(work.stop)
        jobs: list[Future[Any]] = [readers.submit(work.run) for _ in range(processors)]
        jobs += [writers.submit(_write_out, path) for path in written]
        total = sum(file.size for file in files)
        while wait(jobs, _LOOK_EVERY).not_done:
            watch.progress(min(work.done, total), total, "verifying")
        for job in jobs:
            job.result()
        return {file.path: file.checksum() for file in files}


class _File:
    """A file, and the sums of its blocks as far as they are known."""

    def __init__(self, path: Path, kind: _Kind) -> None:
        self.path, self.kind = path, kind
        self._sums: dict[int, bytes] = {}

    def __enter__(self) -> _File:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def blocks(self) -> Iterable[int]:
        """Where they begin."""
        return range(0, self.size, self.kind.block)

    def sum_up(self, start: int, buffer: memoryview) -> int:
        """Compute the sum of the block at `start`; its bytes."""
        length = min(self.kind.block, self.size - start)
        hole = self._is_hole(start, length)
        self._sums[start] = self.kind.of_zeros(length) if hole else self._sum(start, length, buffer)
        return length

    def checksum(self) -> str:
        """What the blocks' sums make together."""
        return self.kind.combined(self._sums[start] for start in self.blocks())

    def _sum(self, start: int, length: int, buffer: memoryview) -> bytes:
        digest, at = self.kind.new(), start
        while at < start + length:
            got = os.preadv(self._descriptor, [buffer[: start + length - at]], at)
            if not got:  # cut off meanwhile: the sum is another one
                break
            digest.update(buffer[:got])
            at += got
        return digest.digest()

    def _is_hole(self, start: int, length: int) -> bool:
        try:
            return os.lseek(self._descriptor, start, os.SEEK_DATA) >= start + length
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return True
            raise


class _Work:
    """The blocks of all files, for several threads to take."""

    def __init__(self, files: Iterable[_File]) -> None:
        self.done = 0
        self._blocks = ((file, start) for file in files for start in file.blocks())
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Sum blocks up until none is left."""
        buffer = memoryview(bytearray(_READ))
        for file, start in iter(self._next, None):
            length = file.sum_up(start, buffer)
            with self._lock:
                self.done += length

    def stop(self) -> None:
        """Have everybody end after the block they are at."""
        self._stopped = True

    def _next(self) -> tuple[_File, int] | None:
        with self._lock:
            return None if self._stopped else next(self._blocks, None)


def _write_out(path: Path) -> None:
    with out_of_space_is_an_error(path.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
