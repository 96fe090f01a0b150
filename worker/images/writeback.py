"""Having the kernel write files out while somebody still writes to them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_EVERY = 0.1  # seconds
# sync_file_range(2), which Python does not offer: begin to write out what is dirty, and wait for none of it.
_WRITE = 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


@contextmanager
def written_out(*paths: Path) -> Iterator[None]:
    """Have what is written to these files while the block runs go to the disk all along.

    Left to itself Linux begins after seconds, or when a tenth of the memory is full of it: who makes the files durable
    in the end would wait for gigabytes, and so would the guests on that disk. Nothing is durable because of this.
    """
    ended = threading.Event()

    def run() -> None:
        with ExitStack() as stack:
            opened: dict[Path, int] = {}
            while not ended.wait(_EVERY):
                for path in [one for one in paths if one not in opened]:
                    with suppress(FileNotFoundError):  # not there yet
                        opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        stack.callback(os.close, opened[path])
                for descriptor in opened.values():
                    _libc.sync_file_range(descriptor, 0, 0, _WRITE)  # what fails here is told by fsync later

    thread = threading.Thread(target=run, name="writes out", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(0.5)  # longer only on a disk that hangs, for which nobody waits here
