"""The places images come from: files below the allowed folders, http(s) addresses, and snapshots."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from worker.context import Watcher
from worker.errors import ImageNotFound, ImageRejected, InvalidSpec, SnapshotNotFound, TransferInterrupted
from worker.images import qemu_img, snapshots, transfer
from worker.images.checksum import sha256_of
from worker.images.files import require_space
from worker.images.layout import DataDir
from worker.models import Frozen, Snapshot

SNAPSHOT = "snapshot:"


class SourceRecord(Frozen):
    """What a source led to when it was last fetched, and by what to see whether it still does."""

    source: str
    sha256: str
    fetched_at: float
    identity: tuple[int, ...] = ()
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class Limits:
    """What fetching an image may use up: bytes, and seconds without progress."""

    max_bytes: int
    reserve_bytes: int
    stall: float


class Source(ABC):
    """A place an image comes from; `name` is for people, `key` for file names."""

    # Whether what has arrived can be continued by another operation.
    resumable = False

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.key = hashlib.sha256(address.encode()).hexdigest()

    @abstractmethod
    def is_current(self, record: SourceRecord) -> bool:
        """Whether `record` tells what the source holds now, as far as can be seen without reading it."""

    @abstractmethod
    def retrieve(self, target: Path, known: SourceRecord | None, limits: Limits, watch: Watcher) -> SourceRecord:
        """Bring the image to `target`, unless the source says that it is the `known` one still."""


class LocalFile(Source):
    """A file of this host, below one of the allowed folders whatever links lead to it."""

    def __init__(self, image: str, roots: Sequence[Path]) -> None:
        super().__init__(image, image)
        self._roots = [root.resolve() for root in roots]
        try:
            self.path = Path(image).resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
            raise self._unreadable(error) from error
        if not self._is_allowed(self.path):
            raise self._forbidden(self.path)

    def is_current(self, record: SourceRecord) -> bool:
        """Whether the file is untouched. Raises ImageNotFound."""
        try:
            return record.identity == _identity(self.path.stat())
        except OSError as error:
            raise self._unreadable(error) from error

    def retrieve(
        self,
        target: Path,
        known: SourceRecord | None,  # noqa: ARG002 - a file is not asked whether it changed: it has been looked at
        limits: Limits,
        watch: Watcher,
    ) -> SourceRecord:
        """Copy the file. Raises ImageNotFound, ImageRejected, InvalidSpec, NoSpace, TransferInterrupted."""
        with self._open(limits.max_bytes) as file:
            before = os.fstat(file.fileno())
            require_space(target.parent, before.st_blocks * 512, limits.reserve_bytes)
            target.unlink(missing_ok=True)
            sha256 = transfer.copy(file, target, watch=watch)
            if _identity(os.fstat(file.fileno())) != _identity(before):
                raise TransferInterrupted(f"{self.name} was changed while it was copied.", source=self.name)
        return SourceRecord(source=self.name, sha256=sha256, fetched_at=time.time(), identity=_identity(before))

    def _open(self, max_bytes: int) -> BinaryIO:
        try:
            # O_NONBLOCK: opening a named pipe would wait for a writer.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._accept(descriptor, max_bytes)
            return os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise

    def _accept(self, descriptor: int, max_bytes: int) -> None:
        # A link may have been put in the path since it was looked at; the kernel knows what was really opened.
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not self._is_allowed(opened):
            raise self._forbidden(opened)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ImageRejected(
                f"image: {self.name} is refused: found no regular file; allowed: an image file",
                field="image",
                given=self.name,
                allowed="an image file",
            )
        if found.st_size > max_bytes:
            raise transfer.too_large(self.name, found.st_size, max_bytes)

    def _is_allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _forbidden(self, path: Path) -> InvalidSpec:
        led = f", which leads to {path}" if str(path) != self.name else ""
        allowed = ", ".join(map(str, self._roots)) or "none"
        return InvalidSpec(
            f"image: given {self.name}{led}; allowed: a file below {allowed}, or an http(s) address.",
            hint="Put the image there, or name its folder in VIRTFLEET_IMAGE_ROOTS.",
            field="image",
            given=self.name,
            allowed=[str(root) for root in self._roots],
        )

    def _unreadable(self, error: OSError | RuntimeError) -> ImageNotFound:
        why = error.strerror if isinstance(error, OSError) else "its links lead in a circle"
        return ImageNotFound(
            f"image: {self.name} cannot be read: {why}; allowed: a file that is there, or an http(s) address",
            source=self.name,
            field="image",
            given=self.name,
            allowed="a file that is there, or an http(s) address",
        )


class WebAddress(Source):
    """An http(s) address; asked again whether it has changed each time it is wanted."""

    resumable = True

    def __init__(self, url: str) -> None:
        super().__init__(transfer.shown_url(url), url)
        self.url = url
        self._asked_at = time.time()

    def is_current(self, record: SourceRecord) -> bool:
        """Whether it was fetched since we asked: by somebody we waited for."""
        return record.fetched_at >= self._asked_at

    def retrieve(self, target: Path, known: SourceRecord | None, limits: Limits, watch: Watcher) -> SourceRecord:
        """Download it, as `transfer.download` does."""
        got = transfer.download(
            self.url,
            target,
            watch=watch,
            max_bytes=limits.max_bytes,
            stall=limits.stall,
            reserve=limits.reserve_bytes,
            headers=_condition(known),
        )
        if got is None:
            if known is None:
                raise TransferInterrupted(f"{self.name}: the server says 304 though nothing was known of the image.")
            return known.model_copy(update={"fetched_at": time.time()})
        return SourceRecord(
            source=self.name,
            sha256=got.sha256,
            fetched_at=time.time(),
            etag=got.etag,
            last_modified=got.last_modified,
        )


class SnapshotRoot(Source):
    """The root disk of a published snapshot, with all that it builds on."""

    def __init__(self, snapshot: Snapshot, data: DataDir) -> None:
        super().__init__(f"{SNAPSHOT}{snapshot.id}", f"{SNAPSHOT}{snapshot.id}")
        self._data, self._snapshot, self._folder = data, snapshot, data.snapshot(snapshot.id)
        self._disk = snapshots.root_disk(snapshot)

    def is_current(self, record: SourceRecord) -> bool:
        """Whether it is the same snapshot still: a published one never changes. Raises SnapshotNotFound."""
        return record.identity == self._identity()

    def retrieve(
        self,
        target: Path,
        known: SourceRecord | None,  # noqa: ARG002 - a snapshot is not asked: it has been looked at
        limits: Limits,
        watch: Watcher,
    ) -> SourceRecord:
        """Make one standalone image of it. Raises NoSpace, SnapshotDamaged, SnapshotNotFound."""
        snapshots.prove(self._data, self._snapshot, self._disk, watch)
        path, identity = self._folder.path / self._disk.file, self._identity()
        require_space(target.parent, qemu_img.measure(path, self._disk.format, "qcow2"), limits.reserve_bytes)
        target.unlink(missing_ok=True)
        qemu_img.convert(path, self._disk.format, target, self._disk.format, watch=watch, stall=limits.stall)
        return SourceRecord(
            source=self.name, sha256=sha256_of(target, watch), fetched_at=time.time(), identity=identity
        )

    def _identity(self) -> tuple[int, ...]:
        try:
            return _identity(self._folder.manifest.stat())
        except OSError as error:
            raise SnapshotNotFound(f"{self.name} is not there any more", given=self.name) from error


def source_of(image: str, roots: Sequence[Path], data: DataDir) -> Source:
    """The source an image's path, address or `snapshot:ID` stands for. Raises InvalidSpec, SnapshotNotFound."""
    if image.startswith(SNAPSHOT):
        found = snapshots.require(data, image.removeprefix(SNAPSHOT))
        return SnapshotRoot(found, data)
    if image.startswith("/") and "\0" not in image:
        return LocalFile(image, roots)
    if image.lower().startswith(("http://", "https://")):
        try:
            if httpx.URL(image).host:
                return WebAddress(image)
        except httpx.InvalidURL as error:
            raise _not_an_image(image) from error
    raise _not_an_image(image)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Changes whenever the content does: no write leaves all of these as they were."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _condition(known: SourceRecord | None) -> dict[str, str]:
    if known is None:
        return {}
    headers = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
    return {name: value for name, value in headers.items() if value}


def _not_an_image(image: str) -> InvalidSpec:
    return InvalidSpec(
        f"image: given {image}; allowed: an absolute path, an http(s) address, or snapshot:ID.",
        field="image",
        given=image,
        allowed="an absolute path, an http(s) address, or snapshot:ID",
    )
