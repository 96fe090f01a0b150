"""What a file contains, as one number that two hosts can compare without sending it."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from worker.context import Watcher

BLOCK = 1024**2
_ZEROS = bytes(BLOCK)
_ZERO_BLOCK = b"\0" * 32


def content_digest(path: Path, watch: Watcher) -> str:
    """A digest of a file's content, in which a hole counts as the zeros it reads as.

    BLAKE2b over the BLAKE2b of each MiB, so that holes cost nothing. Progress in bytes.
    """
    whole = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = 0
        for start in range(0, size, BLOCK):
            if data < start + BLOCK and data <= start:
                data = _next_data(file.fileno(), start, size)
            block = b"" if data >= start + BLOCK else os.pread(file.fileno(), BLOCK, start)
            whole.update(_digest_of(block))
            watch.progress(start + len(block), size, f"checking {path.name.strip('.')}")
    whole.update(str(size).encode())
    return whole.hexdigest()


def _digest_of(block: bytes) -> bytes:
    if not block or block == _ZEROS[: len(block)]:
        return _ZERO_BLOCK
    return hashlib.blake2b(block, digest_size=32).digest()


def _next_data(descriptor: int, start: int, size: int) -> int:
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return size
        raise
