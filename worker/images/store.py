"""The host's image cache: each image is fetched, hashed and inspected once, then only ever read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from worker.context import Watcher
from worker.errors import ChecksumMismatch, FencedOff, FleetError, ImageNotFound, InstanceLocked, Stalled
from worker.images import transfer
from worker.images.checksum import sha256_of
from worker.images.files import allocated_size, locked, publish, size_of, write_text_durably
from worker.images.inspect import inspect
from worker.images.layout import DataDir
from worker.images.reserve import Ledger
from worker.images.sources import Limits, LocalFile, Source, SourceRecord, source_of
from worker.models import BaseImage, DiskFormat, Frozen

_WAIT_ROUND = 0.5  # seconds between two looks at somebody else's fetch

Model = TypeVar("Model", bound=Frozen)


class StoredImage(Frozen):
    """Lies beside each image: what it was when it was put there. Sizes in bytes."""

    format: DiskFormat
    virtual_size: int
    actual_size: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ImageCache:
    """The images of one host. Limits in bytes; `stall` in seconds."""

    data: DataDir
    roots: Sequence[Path]
    max_bytes: int
    max_virtual_bytes: int
    reserve_bytes: int = 0
    stall: float = 120.0

    def fetch(self, image: str, sha256: str | None, operation: str, watch: Watcher) -> BaseImage:
        """The image at a path below one of `roots`, at an http(s) address or of a snapshot; cached ones at once.

        With `sha256` given, a cached image is returned without asking its source. Two fetches of one image at once
        fetch it once. Raises InvalidSpec, ImageNotFound, ImageRejected, ChecksumMismatch, NoSpace,
        TransferInterrupted, Stalled, and what `watch` raises; what remains then is at most a download to continue.
        """
        return self.bring(source_of(image, self.roots, self.data), sha256, operation, watch)

    def bring(self, source: Source, sha256: str | None, operation: str, watch: Watcher) -> BaseImage:
        """The image of any source, as `fetch`."""
        found = self._find(source, sha256)
        if found is not None:
            return found
        self.data.create()
        with self._alone(source, operation, watch):
            return self._find(source, sha256) or self._retrieve(source, sha256, operation, watch)

    def find(self, sha256: str) -> BaseImage | None:
        """The image of that content, if it is in the cache."""
        return self._cached(sha256)

    def require(self, sha256: str) -> BaseImage:
        """The image of that content. Raises ImageNotFound."""
        found = self._cached(sha256)
        if found is None:
            raise ImageNotFound(f"The image {sha256} is not in the cache {self.data.images} (any more).", sha256=sha256)
        return found

    def adopt(self, temporary: Path, sha256: str, watch: Watcher) -> BaseImage:
        """Take in a file that another host's cache had as `sha256`. Raises ChecksumMismatch, ImageRejected, NoSpace."""
        source = LocalFile(str(temporary), [temporary.parent])
        found = sha256_of(temporary, watch)
        if found != sha256:
            temporary.unlink()
        _require_digest(source, sha256, found)
        with locked(self.data.sources / f"{sha256}.lock", wait=self.stall, watch=watch):
            image = self._cached(sha256) or self._admit(temporary, source, sha256, watch)
        temporary.unlink(missing_ok=True)
        return image

    def _find(self, source: Source, sha256: str | None) -> BaseImage | None:
        if sha256 is None:
            record = self._record_of(source)
            if record is None or not source.is_current(record):
                return None
            sha256 = record.sha256
        return self._cached(sha256)

    def _cached(self, sha256: str) -> BaseImage | None:
        """The image of that content, unless it is not there or is not what was put there."""
        stored = _read(self.data.images / f"{sha256}.json", StoredImage)
        if stored is None:
            return None
        path = self.data.images / f"{sha256}.{stored.format}"
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        # The time too: a commit into the base would leave its size as it was.
        if (found.st_size, found.st_mtime_ns) != (stored.size, stored.mtime_ns):
            return None
        return BaseImage(
            path=path,
            sha256=sha256,
            format=stored.format,
            virtual_size=stored.virtual_size,
            actual_size=stored.actual_size,
        )

    @contextlib.contextmanager
    def _alone(self, source: Source, operation: str, watch: Watcher) -> Iterator[None]:
        """Hold the source's lock; wait for another's fetch for as long as it moves."""
        lock = self.data.sources / f"{source.key}.lock"
        arrived, moved_at = -1, time.monotonic()
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(lock, operation=operation, wait=_WAIT_ROUND, watch=watch))
                    # While it is held: whoever waits for it notices that it has no name any more, and begins anew.
                    stack.callback(lock.unlink, missing_ok=True)
                    break
                except InstanceLocked as busy:
                    if (now_arrived := self._arrived(source)) != arrived:
                        arrived, moved_at = now_arrived, time.monotonic()
                    elif time.monotonic() - moved_at > self.stall:
                        raise Stalled(f"{source.name} is being fetched, but nothing arrives. {busy.message}") from busy
                    watch.progress(arrived, None, "waiting for another fetch")
            yield

    def _arrived(self, source: Source) -> int:
        # What is allocated: a copy over NBD has its full length from the beginning.
        return sum(map(allocated_size, self.data.tmp.glob(f"*@{source.key}.*part")))

    def _retrieve(self, source: Source, sha256: str | None, operation: str, watch: Watcher) -> BaseImage:
        known = self._record_of(source)
        if known is not None and self._cached(known.sha256) is None:
            known = None
        if source.resumable:
            temporary = self.data.partial_download(source.key)
        else:
            temporary = self.data.temporary(operation, f"{source.key}.part")
        with _cleared(temporary, keep_what_can_be_continued=source.resumable):
            promised = Ledger(self.data.root).outstanding(besides=operation)
            limits = Limits(self.max_bytes, self.reserve_bytes + promised, self.stall)
            record = source.retrieve(temporary, known, limits, watch)
            _require_digest(source, sha256, record.sha256)
            image = self._cached(record.sha256) or self._admit(temporary, source, record.sha256, watch)
            write_text_durably(self._record_path(source), record.model_dump_json())
        return image

    def _admit(self, temporary: Path, source: Source, sha256: str, watch: Watcher) -> BaseImage:
        facts = inspect(temporary, max_virtual_bytes=self.max_virtual_bytes, source=source.name, watch=watch)
        path = self.data.images / f"{sha256}.{facts.format}"
        publish(temporary, path, watch)
        path.chmod(0o444)
        found = path.stat()
        actual_size = found.st_blocks * 512
        stored = StoredImage(
            format=facts.format,
            virtual_size=facts.virtual_size,
            actual_size=actual_size,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
        )
        # Last: an image without this is not in the cache.
        write_text_durably(self.data.images / f"{sha256}.json", stored.model_dump_json())
        return BaseImage(
            path=path,
            sha256=sha256,
            format=facts.format,
            virtual_size=facts.virtual_size,
            actual_size=actual_size,
        )

    def _record_path(self, source: Source) -> Path:
        return self.data.sources / f"{source.key}.json"

    def _record_of(self, source: Source) -> SourceRecord | None:
        return _read(self._record_path(source), SourceRecord)


def _read(path: Path, model: type[Model]) -> Model | None:
    """What the file says; None if it is not there or is no such thing: it can always be made again."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _require_digest(source: Source, wanted: str | None, found: str) -> None:
    if wanted is not None and wanted != found:
        raise ChecksumMismatch(
            f"sha256: {source.name} has {found}, but {wanted} was given; allowed: the sum of what is there",
            hint="Check the sum its publisher gives; if the image has been replaced there, give the new sum.",
            source=source.name,
            field="sha256",
            given=wanted,
            allowed=found,
            found=found,
        )


@contextlib.contextmanager
def _cleared(temporary: Path, *, keep_what_can_be_continued: bool) -> Iterator[None]:
    """Leave nothing behind but what this or another operation will continue."""
    try:
        yield
    except FleetError as error:
        goes_on = (error.retryable and size_of(temporary) > 0) or isinstance(error, FencedOff)
        if not (goes_on and keep_what_can_be_continued):
            transfer.discard(temporary)
        raise
    transfer.discard(temporary)
