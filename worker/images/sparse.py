"""Giving back space that is allocated to a file and was never written."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# fallocate(2), which Python does not offer with a mode; fallocate(1) --dig-holes passes over what was never written.
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_holes(path: Path) -> None:
    """Make every part of a file that reads as zeros because nothing was written there a hole; its content stays.

    File systems that know no holes keep the file as it is.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in list(_unwritten(descriptor)):
            if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, end - start) != 0:
                number = ctypes.get_errno()
                if number == errno.EOPNOTSUPP:
                    return
                raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


def _unwritten(descriptor: int) -> Iterator[tuple[int, int]]:
    """The ranges that lseek(2) calls holes: also those that are allocated."""
    size, at = os.fstat(descriptor).st_size, 0
    while at < size:
        start = os.lseek(descriptor, at, os.SEEK_HOLE)
        if start >= size:
            return
        try:
            at = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data follows
                raise
            at = size
        yield start, at
