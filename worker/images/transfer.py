"""Bring bytes here: downloads that continue where they broke off, and copies that keep holes; both hash on the way."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import httpx
import tenacity

from worker.context import Watcher
from worker.errors import ImageNotFound, ImageRejected, Stalled, TransferInterrupted
from worker.images.files import human_size, out_of_space_is_an_error, require_space

BLOCK = 256 * 1024
CONNECT_TIMEOUT = 10.0  # seconds
MAX_REDIRECTS = 5
MAX_FRUITLESS = 4  # attempts in a row that bring no byte
_CHECK_EVERY = 0.5  # seconds
_CANCEL_GRACE = 5.0  # seconds
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_ZEROS = bytes(BLOCK)
_TRY_LATER = {408, 425, 429}

T = TypeVar("T")


@dataclass(frozen=True)
class Downloaded:
    """A complete download: its digest, its size in bytes, and by what the server recognises this version."""

    sha256: str
    size: int
    etag: str | None
    last_modified: str | None


def copy(source: BinaryIO, target: Path, *, watch: Watcher) -> str:
    """Copy an open file to the new file `target` in one pass and return its sha256; zeros become holes.

    A failed or cancelled copy leaves no target. Progress in bytes. Raises NoSpace and what `watch` raises.
    """
    digest, done, total = hashlib.sha256(), 0, os.fstat(source.fileno()).st_size
    try:
        with out_of_space_is_an_error(target.parent), target.open("xb") as out:
            cloned = _clone(source, out)
            # Not to the end: a file that grows while it is read would be followed for ever.
            while done < total and (chunk := source.read(min(BLOCK, total - done))):
                digest.update(chunk)
                if not cloned:
                    _write_sparse(out, chunk)
                done += len(chunk)
                watch.progress(done, total, "copying")
            out.truncate(done)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _clone(source: BinaryIO, target: BinaryIO) -> bool:
    """Share the source's blocks where the filesystem can (XFS, Btrfs): then nothing has to be written."""
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True


def _write_sparse(out: BinaryIO, chunk: bytes) -> None:
    if chunk == _ZEROS[: len(chunk)]:
        out.seek(len(chunk), os.SEEK_CUR)
    else:
        out.write(chunk)


def download(
    url: str,
    target: Path,
    *,
    watch: Watcher,
    max_bytes: int,
    stall: float,
    reserve: int = 0,
    headers: Mapping[str, str] | None = None,
) -> Downloaded | None:
    """Download `url` to `target`, continuing what an earlier attempt left there; None if the server says 304.

    `headers` may make the request conditional. What has arrived stays in `target` for the next attempt when this one
    fails, until `discard`. Proxies are taken from the environment.
    Raises ImageNotFound, ImageRejected (too large), NoSpace, Stalled, TransferInterrupted, and what `watch` raises.
    """
    with out_of_space_is_an_error(target.parent), _Partial(target) as partial:
        # The login apart from the address: httpx logs addresses, and they are part of our messages.
        address = httpx.URL(url)
        login = (address.username, address.password) if address.userinfo else None
        work = _Download(shown_url(url), partial, watch, max_bytes, stall, reserve, headers or {}, login)
        return asyncio.run(_watched(work.run(), watch))


def discard(target: Path) -> None:
    """Remove what `copy` or `download` left at `target`."""
    target.unlink(missing_ok=True)
    _note_of(target).unlink(missing_ok=True)


async def _watched(work: Coroutine[Any, Any, T], watch: Watcher) -> T:
    """Await `work`, asking `watch` twice a second; what it raises cancels the work, also in a stalled read."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_CHECK_EVERY))[0]:
            watch.check()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_GRACE)


class _Broken(Exception):
    """This attempt is over; another one may continue."""


class _Partial:
    """What has arrived of a download, its digest, and the version of the resource it is a part of."""

    def __init__(self, path: Path) -> None:
        self._note = _note_of(path)
        self.file = path.open("a+b")
        self.path, self.size, self.digest = path, 0, hashlib.sha256()
        self.validator = self._noted_validator()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def resume(self, watch: Watcher) -> None:
        """Hash what an earlier process left, or drop it if nothing tells what it is a part of."""
        if not self.validator:
            self.restart("")
        self.file.seek(0)
        while chunk := self.file.read(BLOCK):
            self.digest.update(chunk)
            self.size += len(chunk)
            watch.check()

    def restart(self, validator: str) -> None:
        """Begin anew with another version. The old bytes go first: they must never be taken for the new version's."""
        self.file.truncate(0)
        self.size, self.digest, self.validator = 0, hashlib.sha256(), validator
        self._note.write_text(f"{_boot_id()}\n{validator}")

    def _noted_validator(self) -> str:
        """The version, unless the host has been started anew: what was not synced may have come back as zeros."""
        try:
            boot_id, _, validator = self._note.read_text().partition("\n")
        except FileNotFoundError:
            return ""
        return validator if boot_id == _boot_id() else ""

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)


def _note_of(target: Path) -> Path:
    return target.with_name(target.name + ".version")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class _Download:
    """One download: as many attempts as bring something."""

    url: str
    partial: _Partial
    watch: Watcher
    max_bytes: int
    stall: float
    reserve: int
    headers: Mapping[str, str]
    login: tuple[str, str] | None = None
    total: int | None = None
    furthest: int = 0
    fruitless: int = 0

    async def run(self) -> Downloaded | None:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Broken),
            wait=tenacity.wait_exponential(multiplier=0.2, max=10.0) + tenacity.wait_random(0.0, 0.5),
            stop=self._is_hopeless,
        )
        timeout = httpx.Timeout(self.stall, connect=min(CONNECT_TIMEOUT, self.stall))
        self.partial.resume(self.watch)
        self.furthest = self.partial.size
        try:
            async with httpx.AsyncClient(
                auth=self.login, timeout=timeout, follow_redirects=True, max_redirects=MAX_REDIRECTS
            ) as client:
                return await retrying(self._attempt, client)
        except tenacity.RetryError as error:
            raise self._interrupted(error.last_attempt.exception()) from error

    def _is_hopeless(self, _: tenacity.RetryCallState) -> bool:
        self.fruitless = 0 if self.partial.size > self.furthest else self.fruitless + 1
        self.furthest = max(self.furthest, self.partial.size)
        return self.fruitless >= MAX_FRUITLESS

    async def _attempt(self, client: httpx.AsyncClient) -> Downloaded | None:
        try:
            async with client.stream("GET", self.url, headers={**self.headers, **self._range()}) as response:
                return await self._receive(response)
        except httpx.ReadTimeout as error:
            raise Stalled(
                f"{self.url} has sent nothing for {self.stall:g} s.", url=self.url, seconds=self.stall
            ) from error
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise ImageNotFound(f"{self.url} leads nowhere: {error}", url=self.url) from error
        except httpx.TransportError as error:
            raise _Broken(str(error) or type(error).__name__) from error

    def _range(self) -> dict[str, str]:
        # Compressed on the way, lengths and ranges would count other bytes than those of the image.
        identity = {"Accept-Encoding": "identity"}
        if not self.partial.size or not self.partial.validator:
            return identity
        return {**identity, "Range": f"bytes={self.partial.size}-", "If-Range": self.partial.validator}

    async def _receive(self, response: httpx.Response) -> Downloaded | None:
        if response.status_code == 304:
            return None
        if not self._is_complete(response):
            self._begin(response)
            async for chunk in response.aiter_raw():
                self.partial.write(chunk)
                self._require_size(self.partial.size)
                self.watch.progress(self.partial.size, self.total, "downloading")
        if self.total is not None and self.partial.size != self.total:
            raise _Broken(f"{self.partial.size} of {self.total} bytes arrived")
        self.partial.file.flush()
        headers = response.headers
        return Downloaded(
            self.partial.digest.hexdigest(),
            self.partial.size,
            headers.get("etag"),
            headers.get("last-modified"),
        )

    def _is_complete(self, response: httpx.Response) -> bool:
        """Whether there is nothing beyond what has arrived. If-Range was checked first (RFC 9110, 13.2.2)."""
        return response.status_code == 416 and response.headers.get("content-range") == f"bytes */{self.partial.size}"

    def _begin(self, response: httpx.Response) -> None:
        """Accept the answer: the rest of what is here already, or all of it anew."""
        if response.status_code == 206 and self._continues(response):
            start = self.partial.size
        elif response.status_code == 200:
            self.partial.restart(_validator(response))
            start = 0
        else:
            self._refuse(response)
        length = response.headers.get("content-length", "")
        self.total = start + int(length) if length.isdigit() else None
        if self.total is not None:
            self._require_size(self.total)
            require_space(self.partial.path.parent, self.total - start, self.reserve)

    def _continues(self, response: httpx.Response) -> bool:
        """Whether this is the rest of what is here. A server may heed Range and ignore If-Range: compare again."""
        return _first_byte(response) == self.partial.size and _validator(response) in ("", self.partial.validator)

    def _refuse(self, response: httpx.Response) -> NoReturn:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        if response.status_code in (206, 416):
            self.partial.restart("")
            raise _Broken(f"the server sent another part than the one asked for ({status})")
        if response.status_code >= 500 or response.status_code in _TRY_LATER:
            raise _Broken(f"the server answers {status}")
        raise ImageNotFound(
            f"image: {self.url}: the server answers {status}; allowed: the address of an image",
            hint="Check the address, and whether it needs a login.",
            field="image",
            given=self.url,
            allowed="the address of an image",
            url=self.url,
            status=response.status_code,
        )

    def _require_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise too_large(self.url, size, self.max_bytes)

    def _interrupted(self, reason: BaseException | None) -> TransferInterrupted:
        of = f" of {human_size(self.total)}" if self.total is not None else ""
        return TransferInterrupted(
            f"The download of {self.url} broke off after {human_size(self.partial.size)}{of}: {reason}",
            hint="What has arrived is kept and continued." if self.partial.size else "",
            url=self.url,
            done=self.partial.size,
            total=self.total,
        )


def too_large(source: str, size: int, limit: int) -> ImageRejected:
    """The error for an image of more bytes than the fleet takes."""
    return ImageRejected(
        f"image: {source} is refused: found at least {human_size(size)}; allowed: at most {human_size(limit)}.",
        hint="The limit is the setting VIRTFLEET_IMAGE_MAX_BYTES.",
        source=source,
        field="image",
        given=size,
        allowed=limit,
    )


def shown_url(url: str) -> str:
    """The address without a login in it, for messages and records."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _validator(response: httpx.Response) -> str:
    """What If-Range may be asked with: a strong ETag, or a date (RFC 9110, 13.1.5)."""
    etag = response.headers.get("etag", "")
    return str(etag if etag.startswith('"') else response.headers.get("last-modified", ""))


def _first_byte(response: httpx.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    return int(found[1]) if found else None
