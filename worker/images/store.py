"""The host's image cache: each image is fetched, hashed and inspected once, then only ever read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpx
from pydantic import ValidationError

from worker.context import Watcher
from worker.errors import (
    ChecksumMismatch,
    FencedOff,
    FleetError,
    ImageNotFound,
    InstanceLocked,
    InvalidSpec,
    Stalled,
    TransferInterrupted,
)
from worker.images import transfer
from worker.images.files import locked, publish, require_space, write_text_durably
from worker.images.inspect import inspect
from worker.images.layout import DataDir
from worker.models import BaseImage, DiskFormat, Frozen

_WAIT_ROUND = 0.5  # seconds between two looks at somebody else's fetch


class StoredImage(Frozen):
    """Beside each image: what it was when it was put there. Sizes in bytes."""

    format: DiskFormat
    virtual_size: int
    actual_size: int
    size: int
    mtime_ns: int


class SourceRecord(Frozen):
    """What a path or an address led to when it was last fetched, and how to see whether it still does."""

    source: str
    sha256: str
    fetched_at: float
    identity: tuple[int, ...] = ()
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class ImageCache:
    """The images of one host. Bytes, and for `stall` seconds."""

    data: DataDir
    roots: Sequence[Path]
    max_bytes: int
    max_virtual_bytes: int
    reserve_bytes: int = 0
    stall: float = 120.0

    def fetch(self, image: str, sha256: str | None, operation: str, watch: Watcher) -> BaseImage:
        """The image at an absolute path under one of `roots`, or at an http(s) address, from the cache.

        With `sha256` given, a cached image is returned without a look at its source. Two fetches of one image at once
        fetch it once. Raises InvalidSpec, ImageNotFound, ImageRejected, ChecksumMismatch, NoSpace,
        TransferInterrupted, Stalled, and what `watch` raises; then nothing remains but a download to be continued.
        """
        raise NotImplementedError
