"""Downloads from a real HTTP server that breaks, stalls and lies: they continue, and bring exactly what is there."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import (
    Cancelled,
    ChecksumMismatch,
    FencedOff,
    ImageNotFound,
    ImageRejected,
    NoSpace,
    Stalled,
    TransferInterrupted,
)
from worker.images import qemu_img
from worker.images.layout import DataDir
from worker.images.store import ImageCache
from worker.images.transfer import Downloaded, download
from worker.models import GIB, MIB

BLOCK = 65536


@dataclass
class Page:
    """What the server has at an address, and how it misbehaves."""

    body: bytes
    etag: str | None = '"one"'
    takes_ranges: bool = True
    heeds_if_range: bool = True
    statuses: list[int] = field(default_factory=list)  # answers before it behaves
    breaks: list[int] = field(default_factory=list)  # the next answers end after so many bytes
    stalls_after: int | None = None
    location: str = ""
    pause: float = 0.0  # seconds before each block
    asked: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        page = self.server.pages[self.path]
        page.asked.append(dict(self.headers))
        if page.statuses:
            return self._head(page.statuses.pop(0), 0)
        if page.etag and self.headers.get("If-None-Match") == page.etag:
            return self._head(304, 0)
        start = self._start(page)
        if start and start >= len(page.body):
            return self._head(416, 0, {"Content-Range": f"bytes */{len(page.body)}"})
        span = {"Content-Range": f"bytes {start}-{len(page.body) - 1}/{len(page.body)}"} if start else {}
        self._head(206 if start else 200, len(page.body) - start, span)
        return self._send(page, start)

    def _start(self, page: Page) -> int:
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        if not wanted or not page.takes_ranges or (page.heeds_if_range and version != page.etag):
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def _head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
        page = self.server.pages[self.path]
        self.send_response(status)
        headers = {"Content-Length": str(length), **(more or {})}
        headers |= {"ETag": page.etag} if page.etag else {}
        headers |= {"Location": page.location} if page.location else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, page: Page, start: int) -> None:
        end = start + page.breaks.pop(0) if page.breaks else len(page.body)
        for at in range(start, min(end, len(page.body)), BLOCK):
            if page.stalls_after is not None and at >= page.stalls_after:
                self.server.closing.wait(60)
            time.sleep(page.pause)
            self.wfile.write(page.body[at : min(at + BLOCK, end)])
        self.close_connection = end < len(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Tests read `asked`."""


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""

    def put(self, path: str, page: Page) -> str:
        self.pages[path] = page
        return f"http://127.0.0.1:{self.server_port}{path}"


class Watching(Alone):
    def __init__(self, then: Callable[[int], None] = lambda _: None, *, cancelled_after: float = 3600) -> None:
        super().__init__()
        self.then, self.due, self.notes = then, time.monotonic() + cancelled_after, set[str]()

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        super().progress(done, total, note)
        self.notes.add(note)
        self.then(done)

    def check(self) -> None:
        if time.monotonic() >= self.due:
            raise Cancelled("stop")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield site
        finally:
            site.closing.set()
            site.shutdown()
            thread.join(10)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "download.part"


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


@pytest.fixture
def cache(data: DataDir) -> ImageCache:
    return ImageCache(data, [], max_bytes=GIB, max_virtual_bytes=GIB, stall=10)


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    """A qcow2 image of some hundred KiB."""
    path = tmp_path / "image.qcow2"
    qemu_img.create(path, "qcow2", 64 * MIB)
    return path.read_bytes() + bytes(512 * 1024)


def get(url: str, target: Path, **options: object) -> Downloaded | None:
    defaults: dict[str, object] = {"watch": Alone(), "max_bytes": GIB, "stall": 10.0}
    return download(url, target, **{**defaults, **options})  # type: ignore[arg-type]


def ranges(page: Page) -> list[str | None]:
    return [asked.get("Range") for asked in page.asked]


def images(data: DataDir) -> list[str]:
    found = [*data.images.iterdir(), *data.tmp.iterdir()]
    return sorted(path.name for path in found if path.is_file() and path.suffix != ".json")


def test_download_brings_all_bytes_and_their_digest(site: Site, target: Path) -> None:
    body, watch = os.urandom(MIB), Watching()
    got = get(site.put("/a", Page(body)), target, watch=watch)
    assert got == Downloaded(hashlib.sha256(body).hexdigest(), MIB, '"one"', None)
    assert target.read_bytes() == body
    assert watch.last_progress == (MIB, MIB, "downloading")


def test_broken_connection_is_continued_at_the_byte(site: Site, target: Path) -> None:
    body = os.urandom(MIB)
    page = Page(body, breaks=[300_000, 100_000])
    got = get(site.put("/a", page), target)
    assert got is not None
    assert got.sha256 == hashlib.sha256(body).hexdigest()
    assert target.read_bytes() == body
    assert ranges(page) == [None, "bytes=300000-", "bytes=400000-"]


def test_another_process_continues_what_arrived(site: Site, target: Path) -> None:
    """Whoever ran before was killed: bytes and version on disk are all that is left."""
    body = os.urandom(MIB)
    page = Page(body, breaks=[300_000])
    url = site.put("/a", page)

    def die(done: int) -> None:
        if done >= 300_000:
            raise FencedOff("killed")

    with pytest.raises(FencedOff):
        get(url, target, watch=Watching(die))
    got = get(url, target)
    assert got is not None
    assert got.sha256 == hashlib.sha256(body).hexdigest()
    assert ranges(page) == [None, "bytes=300000-"]


def test_complete_download_is_not_fetched_again(site: Site, target: Path) -> None:
    """The worker died between the last byte and its use."""
    page = Page(os.urandom(MIB))
    url = site.put("/a", page)
    first, second = get(url, target), get(url, target)
    assert first == second
    assert ranges(page) == [None, f"bytes={MIB}-"]
    assert target.read_bytes() == page.body


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_new_version_is_never_mixed_with_the_old(site: Site, target: Path, heeds_if_range: bool) -> None:
    old = Page(os.urandom(MIB), breaks=[300_000] * 9)
    new = Page(os.urandom(MIB), etag='"two"', heeds_if_range=heeds_if_range)
    url = site.put("/a", old)

    def replace(done: int) -> None:
        if done >= 300_000:
            site.put("/a", new)

    got = get(url, target, watch=Watching(replace))
    assert got is not None
    assert target.read_bytes() == new.body
    assert got.sha256 == hashlib.sha256(new.body).hexdigest()


def test_version_nobody_can_tell_apart_is_fetched_from_the_start(site: Site, target: Path) -> None:
    page = Page(os.urandom(MIB), etag=None, breaks=[300_000])
    got = get(site.put("/a", page), target)
    assert got is not None
    assert target.read_bytes() == page.body
    assert ranges(page) == [None, None]


def test_server_that_ignores_ranges_starts_over(site: Site, target: Path) -> None:
    page = Page(os.urandom(MIB), takes_ranges=False, breaks=[300_000])
    got = get(site.put("/a", page), target)
    assert got is not None
    assert got.sha256 == hashlib.sha256(page.body).hexdigest()
    assert target.read_bytes() == page.body


def test_connection_that_keeps_breaking_is_given_up_and_can_be_continued(site: Site, target: Path) -> None:
    page = Page(os.urandom(MIB), breaks=[300_000, *[0] * 20])
    url = site.put("/a", page)
    with pytest.raises(TransferInterrupted, match=r"broke off after 293\.0 KiB of 1\.0 MiB") as caught:
        get(url, target)
    assert caught.value.retryable
    assert (caught.value.details["done"], caught.value.details["total"]) == (300_000, MIB)
    page.breaks = []
    assert get(url, target) is not None
    assert target.read_bytes() == page.body


@pytest.mark.parametrize("status", [404, 403, 410])
def test_address_that_leads_to_nothing_is_not_tried_again(site: Site, target: Path, status: int) -> None:
    page = Page(b"", statuses=[status] * 9)
    with pytest.raises(ImageNotFound, match=f"the server answers {status}"):
        get(site.put("/a", page), target)
    assert len(page.asked) == 1


def test_server_in_trouble_is_tried_again(site: Site, target: Path) -> None:
    page = Page(os.urandom(1000), statuses=[500, 503])
    assert get(site.put("/a", page), target) is not None
    page.statuses = [500] * 9
    with pytest.raises(TransferInterrupted, match="the server answers 500"):
        get(site.put("/b", page), target.with_name("other"))


def test_nobody_listening_is_an_interruption(target: Path) -> None:
    with pytest.raises(TransferInterrupted, match=r"1:1/a broke off after 0 B"):
        get("http://127.0.0.1:1/a", target)


def test_server_that_stalls_is_left(site: Site, target: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(Stalled, match="has sent nothing for 1 s"):
        get(site.put("/a", Page(bytes(MIB), stalls_after=BLOCK)), target, stall=1.0)
    assert time.monotonic() - begun < 3


def test_cancel_takes_effect_within_a_second_while_the_server_stalls(site: Site, target: Path) -> None:
    watch = Watching(cancelled_after=0.5)
    with pytest.raises(Cancelled):
        get(site.put("/a", Page(bytes(MIB), stalls_after=BLOCK)), target, watch=watch)
    assert time.monotonic() - watch.due < 1


def test_redirect_is_followed(site: Site, target: Path) -> None:
    page = Page(os.urandom(1000))
    url = site.put("/old", Page(b"", statuses=[302], location=site.put("/new", page)))
    assert get(url, target) is not None
    assert target.read_bytes() == page.body


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/loop"])
def test_redirect_to_elsewhere_or_without_end_is_refused(site: Site, target: Path, location: str) -> None:
    with pytest.raises(ImageNotFound, match="leads nowhere"):
        get(site.put("/loop", Page(b"", statuses=[302] * 50, location=location)), target)


def test_download_larger_than_allowed_is_refused_before_it_begins(site: Site, target: Path) -> None:
    with pytest.raises(ImageRejected, match=r"allowed: at most 1\.0 KiB"):
        get(site.put("/a", Page(bytes(MIB))), target, max_bytes=1024)
    assert target.stat().st_size == 0


def test_missing_space_is_noticed_before_it_begins(site: Site, target: Path) -> None:
    with pytest.raises(NoSpace, match="are kept in reserve"):
        get(site.put("/a", Page(bytes(MIB))), target, reserve=2**60)
    assert target.stat().st_size == 0


def test_login_is_sent_but_not_shown(site: Site, target: Path) -> None:
    page = Page(b"", statuses=[404])
    url = site.put("/a", page).replace("//", "//me:secret@")
    with pytest.raises(ImageNotFound) as caught:
        get(url, target)
    assert page.asked[0]["Authorization"].startswith("Basic ")
    assert "secret" not in str(caught.value.as_dict())


def test_downloaded_image_is_cached_and_asked_for_by_version(
    site: Site, cache: ImageCache, data: DataDir, image: bytes
) -> None:
    page = Page(image)
    url = site.put("/image.qcow2", page)
    base = cache.fetch(url, None, "op-1", Alone())
    assert base.sha256 == hashlib.sha256(image).hexdigest()
    assert cache.fetch(url, None, "op-2", Alone()) == base
    assert [asked.get("If-None-Match") for asked in page.asked] == [None, '"one"']
    assert images(data) == [base.path.name]


def test_sha256_saves_asking_at_all(site: Site, cache: ImageCache, image: bytes) -> None:
    page = Page(image)
    url, sha256 = site.put("/image.qcow2", page), hashlib.sha256(image).hexdigest()
    base = cache.fetch(url, sha256, "op-1", Alone())
    assert cache.fetch(url, sha256, "op-2", Alone()) == base
    assert len(page.asked) == 1


def test_new_version_at_the_address_is_fetched(site: Site, cache: ImageCache, image: bytes) -> None:
    url = site.put("/image.qcow2", Page(image))
    old = cache.fetch(url, None, "op-1", Alone())
    site.put("/image.qcow2", Page(image + bytes(512), etag='"two"'))
    assert cache.fetch(url, None, "op-2", Alone()).sha256 != old.sha256
    assert old.path.exists()


@pytest.mark.parametrize("etag", ['"one"', None])
def test_two_fetches_at_once_download_once(site: Site, cache: ImageCache, image: bytes, etag: str | None) -> None:
    """Also from a server that cannot say whether anything changed."""
    page, second = Page(image, etag=etag, pause=0.1), Watching()
    url = site.put("/image.qcow2", page)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.fetch, url, None, "op-1", Alone())
        time.sleep(0.2)
        two = pool.submit(cache.fetch, url, None, "op-2", second)
        assert one.result(20) == two.result(20)
    assert len(page.asked) == 1
    assert "waiting for another fetch" in second.notes


def test_wrong_sha256_leaves_nothing(site: Site, cache: ImageCache, data: DataDir, image: bytes) -> None:
    with pytest.raises(ChecksumMismatch, match="but 0000"):
        cache.fetch(site.put("/image.qcow2", Page(image)), "0" * 64, "op", Alone())
    assert images(data) == []


def test_web_page_instead_of_an_image_is_refused_and_leaves_nothing(
    site: Site, cache: ImageCache, data: DataDir
) -> None:
    url = site.put("/image.qcow2", Page(b"<!DOCTYPE html><title>Not found</title>" + b" " * 9000))
    with pytest.raises(ImageRejected, match="found a web page"):
        cache.fetch(url, None, "op", Alone())
    assert images(data) == []


def test_cancelled_download_leaves_nothing(site: Site, cache: ImageCache, data: DataDir, image: bytes) -> None:
    url = site.put("/image.qcow2", Page(image, stalls_after=BLOCK))
    with pytest.raises(Cancelled):
        cache.fetch(url, None, "op", Watching(cancelled_after=0.3))
    assert images(data) == []


def test_interrupted_download_is_continued_by_another_operation(
    site: Site, cache: ImageCache, data: DataDir, image: bytes
) -> None:
    page = Page(image, breaks=[200_000, *[0] * 20])
    url = site.put("/image.qcow2", page)
    with pytest.raises(TransferInterrupted):
        cache.fetch(url, None, "op-1", Alone())
    page.breaks = []
    base = cache.fetch(url, None, "op-2", Alone())
    assert base.path.read_bytes() == image
    assert ranges(page)[-1] == "bytes=200000-"
    assert images(data) == [base.path.name]
