"""What a file contains, as one number that two hosts can compare without sending it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from worker.context import Watcher

BLOCK = 1024**2
_ZEROS = bytes(BLOCK)
ZERO_BLOCK = b"\0" * 32
"""What stands for a block of zeros, written or not."""


def content_digest(path: Path, watch: Watcher) -> str:
    """A digest of a file's content, in which a hole counts as the zeros it reads as.

    BLAKE2b over the BLAKE2b of each MiB, so that holes cost nothing. Progress in bytes.
    """
    blocks = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = 0
        for start in range(0, size, BLOCK):
            if data < start + BLOCK and data <= start:
                data = _next_data(file.fileno(), start, size)
            block = b"" if data >= start + BLOCK else os.pread(file.fileno(), BLOCK, start)
            blocks.append(digest_of_block(block))
            watch.progress(min(start + BLOCK, size), size, f"checking {path.name.strip('.')}")
    return digest_of_blocks(blocks, size)


def digest_of_blocks(blocks: Iterable[bytes], size: int) -> str:
    """The digest of a file of `size` bytes from those of its blocks."""
    whole = hashlib.blake2b(digest_size=32)
    for block in blocks:
        whole.update(block)
    whole.update(str(size).encode())
    return whole.hexdigest()


def digest_of_block(block: bytes) -> bytes:
    """The digest of one block, the last of a file being shorter; an empty one stands for a hole."""
    if not block or block == _ZEROS[: len(block)]:
        return ZERO_BLOCK
    return hashlib.blake2b(block, digest_size=32).digest()


def _next_data(descriptor: int, start: int, size: int) -> int:
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return size
        raise
