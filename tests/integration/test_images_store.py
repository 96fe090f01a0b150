"""The cache of local images: fetched once, never trusted blindly, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import (
    Cancelled,
    ChecksumMismatch,
    ImageNotFound,
    ImageRejected,
    InvalidSpec,
    NoSpace,
    TransferInterrupted,
)
from worker.images import qemu_img
from worker.images.layout import DataDir
from worker.images.store import ImageCache
from worker.models import GIB, MIB

FETCH_ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from worker.context import Alone
from worker.errors import FleetError
from worker.images.layout import DataDir
from worker.images.store import ImageCache
disk, source = Path(sys.argv[1]), Path(sys.argv[2])
cache = ImageCache(DataDir(disk), [source.parent], 10**9, 10**12)
try:
    cache.fetch(str(source), None, "op", Alone())
except FleetError as error:
    left = [path.name for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock"]
    print(json.dumps({"error": error.as_dict(), "left": left}))
"""


class Watching(Alone):
    """Calls `then` with each report of progress, and keeps the notes."""

    def __init__(self, then: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.then, self.notes = then, set[str]()

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        super().progress(done, total, note)
        self.notes.add(note)
        self.then(done)


def cancel(_: int) -> None:
    raise Cancelled("stop")


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    folder = tmp_path / "import"
    folder.mkdir()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


@pytest.fixture
def cache(data: DataDir, roots: Path) -> ImageCache:
    return ImageCache(data, [roots], max_bytes=GIB, max_virtual_bytes=100 * GIB, stall=10)


@pytest.fixture
def image(roots: Path) -> Path:
    path = roots / "image.qcow2"
    qemu_img.create(path, "qcow2", 64 * MIB)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8M", path], check=True, stdout=subprocess.DEVNULL)
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(data: DataDir) -> list[str]:
    """Images and temporary files, without records and locks."""
    found = [*data.images.iterdir(), *data.tmp.iterdir()]
    return sorted(path.name for path in found if path.is_file() and path.suffix != ".json")


def test_image_is_kept_by_its_content_and_cannot_be_written(cache: ImageCache, data: DataDir, image: Path) -> None:
    watch = Watching()
    base = cache.fetch(str(image), None, "op", watch)
    assert base.path == data.images / f"{sha256_of(image)}.qcow2"
    assert base.path.read_bytes() == image.read_bytes()
    assert base.path.stat().st_mode & 0o777 == 0o444
    assert (base.sha256, base.format, base.virtual_size) == (sha256_of(image), "qcow2", 64 * MIB)
    assert watch.last_progress[:2] == (image.stat().st_size, image.stat().st_size)
    assert leftovers(data) == [base.path.name]


def test_cached_image_is_found_in_milliseconds_without_reading_it(cache: ImageCache, image: Path) -> None:
    base = cache.fetch(str(image), None, "op", Alone())
    watch = Watching(cancel)
    begun = time.perf_counter()
    for _ in range(20):
        assert cache.fetch(str(image), None, "op", watch) == base
        assert cache.fetch(str(image), base.sha256, "op", watch) == base
    assert (time.perf_counter() - begun) / 40 < 0.01


def test_overlay_over_a_cached_image_reads_its_data(cache: ImageCache, image: Path, tmp_path: Path) -> None:
    base = cache.fetch(str(image), None, "op", Alone())
    overlay = tmp_path / "root.qcow2"
    qemu_img.create_overlay(overlay, base.path, base.format, GIB)
    found = qemu_img.info(overlay, "qcow2")
    assert (found.backing_file, found.backing_format) == (str(base.path), "qcow2")
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", overlay, image], check=True)


def test_changed_file_is_fetched_again_and_the_old_image_stays(cache: ImageCache, image: Path) -> None:
    """Guests still have overlays over the old one."""
    old = cache.fetch(str(image), None, "op", Alone())
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 8 0 1M", image], check=True, stdout=subprocess.DEVNULL)
    new = cache.fetch(str(image), None, "op", Alone())
    assert new.sha256 == sha256_of(image) != old.sha256
    assert old.path.exists()


def test_same_content_from_two_places_is_kept_once(cache: ImageCache, image: Path, data: DataDir) -> None:
    (image.parent / "copy").write_bytes(image.read_bytes())
    first = cache.fetch(str(image), None, "op", Alone())
    assert cache.fetch(str(image.parent / "copy"), None, "op", Alone()) == first
    assert leftovers(data) == [first.path.name]


@pytest.mark.parametrize("harm", ["removed", "truncated", "written"])
def test_damaged_cached_image_is_fetched_again(cache: ImageCache, image: Path, harm: str) -> None:
    base = cache.fetch(str(image), None, "op", Alone())
    base.path.chmod(0o644)
    if harm == "removed":
        base.path.unlink()
    elif harm == "truncated":
        os.truncate(base.path, 100)
    else:
        with base.path.open("r+b") as file:
            file.write(b"x")
    again = cache.fetch(str(image), base.sha256, "op", Alone())
    assert again.path.read_bytes() == image.read_bytes()


def test_wrong_sha256_names_both_and_leaves_nothing(cache: ImageCache, image: Path, data: DataDir) -> None:
    with pytest.raises(ChecksumMismatch, match=f"{sha256_of(image)}, but {'0' * 64} was given"):
        cache.fetch(str(image), "0" * 64, "op", Alone())
    assert leftovers(data) == []
    assert list(data.sources.glob("*.json")) == []


def test_refused_image_leaves_nothing_and_is_refused_again(cache: ImageCache, roots: Path, data: DataDir) -> None:
    (roots / "text").write_text("no image\n" * 1000)
    for _ in range(2):
        with pytest.raises(ImageRejected, match=f"{roots}/text is refused: found no disk image"):
            cache.fetch(str(roots / "text"), None, "op", Alone())
        assert leftovers(data) == []


def test_cancelled_copy_leaves_nothing(cache: ImageCache, image: Path, data: DataDir) -> None:
    with pytest.raises(Cancelled):
        cache.fetch(str(image), None, "op", Watching(cancel))
    assert leftovers(data) == []


def test_leftover_of_a_killed_attempt_does_not_stand_in_the_way(
    cache: ImageCache, image: Path, data: DataDir, tmp_path: Path
) -> None:
    """A worker killed while it copies leaves a part; the next attempt of the operation begins anew."""
    script = FETCH_ON_A_SMALL_DISK.replace('"op", Alone()', '"op", Kill()').replace(
        "disk, source",
        "import os\nclass Kill(Alone):\n def progress(self, *_):\n  os.kill(os.getpid(), 9)\ndisk, source",
        1,
    )
    assert subprocess.run([sys.executable, "-c", script, data.root, image], check=False).returncode == -9
    assert len(leftovers(data)) == 1
    base = cache.fetch(str(image), None, "op", Alone())
    assert leftovers(data) == [base.path.name]
    assert base.path.read_bytes() == image.read_bytes()


def test_two_fetches_at_once_fetch_once(cache: ImageCache, image: Path) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def pause(_: int) -> None:
        copying.set()
        go_on.wait(10)

    first, second = Watching(pause), Watching(lambda _: go_on.set())
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.fetch, str(image), None, "op-1", first)
        copying.wait(10)
        two = pool.submit(cache.fetch, str(image), None, "op-2", second)
        assert one.result(20) == two.result(20)
    assert second.notes == {"waiting for another fetch"}


def test_waiting_for_anothers_fetch_can_be_cancelled(cache: ImageCache, image: Path) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def pause(_: int) -> None:
        copying.set()
        go_on.wait(10)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.fetch, str(image), None, "op-1", Watching(pause))
        copying.wait(10)
        with pytest.raises(Cancelled):
            cache.fetch(str(image), None, "op-2", Watching(cancel))
        go_on.set()
        assert one.result(20).path.exists()


def test_raw_disk_stays_raw_and_its_holes_stay_holes(cache: ImageCache, roots: Path) -> None:
    disk = roots / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(510)
        file.write(b"\x55\xaa")
        file.seek(40 * MIB)
        file.write(os.urandom(MIB))
    base = cache.fetch(str(disk), None, "op", Alone())
    assert (base.format, base.virtual_size) == ("raw", 64 * MIB)
    assert base.path.read_bytes() == disk.read_bytes()
    assert base.actual_size < 4 * MIB


def test_file_changed_while_it_is_copied_is_not_accepted(cache: ImageCache, image: Path, data: DataDir) -> None:
    def touch(_: int) -> None:
        os.utime(image, (1, 1))

    with pytest.raises(TransferInterrupted, match="was changed while it was copied"):
        cache.fetch(str(image), None, "op", Watching(touch))
    assert leftovers(data) == []


def test_full_disk_is_noticed_before_it_is_written(data: DataDir, roots: Path, image: Path) -> None:
    cache = ImageCache(data, [roots], GIB, GIB, reserve_bytes=2**60)
    with pytest.raises(NoSpace, match="are kept in reserve") as caught:
        cache.fetch(str(image), None, "op", Alone())
    assert caught.value.details["needed"] > 8 * MIB
    assert leftovers(data) == []


def test_small_disk_gives_no_space_and_keeps_nothing(image: Path, tmp_path: Path) -> None:
    """On a filesystem of 4 MiB, mounted where only the child sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own_mounts = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    mount = 'mount -t tmpfs -o size=4M none "$1" && exec "$0" -c "$3" "$1" "$2"'
    command = [*own_mounts, "sh", "-c", mount, sys.executable, str(disk), str(image), FETCH_ON_A_SMALL_DISK]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["error"]["code"] == "no_space"
    assert answer["error"]["details"]["available"] <= 4 * MIB < answer["error"]["details"]["needed"]
    assert answer["left"] == []


def test_image_larger_than_allowed_is_refused_unread(data: DataDir, roots: Path, image: Path) -> None:
    cache = ImageCache(data, [roots], max_bytes=MIB, max_virtual_bytes=GIB)
    with pytest.raises(ImageRejected, match=r"allowed: at most 1\.0 MiB"):
        cache.fetch(str(image), None, "op", Watching(cancel))


def test_missing_image_is_not_found(cache: ImageCache, roots: Path) -> None:
    with pytest.raises(ImageNotFound, match=f"{roots}/none cannot be read: No such file"):
        cache.fetch(f"{roots}/none", None, "op", Alone())


def test_image_that_has_vanished_since_is_not_found(cache: ImageCache, image: Path) -> None:
    base = cache.fetch(str(image), None, "op", Alone())
    image.unlink()
    with pytest.raises(ImageNotFound):
        cache.fetch(str(image), None, "op", Alone())
    assert cache.fetch(str(image), base.sha256, "op", Alone()) == base


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(cache: ImageCache, roots: Path, kind: str) -> None:
    (roots / kind).mkdir() if kind == "folder" else os.mkfifo(roots / kind)
    with pytest.raises(ImageRejected, match="no regular file"):
        cache.fetch(str(roots / kind), None, "op", Alone())


def test_link_out_of_the_allowed_folders_is_refused(cache: ImageCache, roots: Path, data: DataDir) -> None:
    (roots / "innocent.qcow2").symlink_to("/etc/passwd")
    with pytest.raises(InvalidSpec, match="leads to /etc/passwd"):
        cache.fetch(str(roots / "innocent.qcow2"), None, "op", Alone())
    assert not data.tmp.exists()


def test_torn_record_is_made_again(cache: ImageCache, image: Path, data: DataDir) -> None:
    base = cache.fetch(str(image), None, "op", Alone())
    for record in [*data.sources.glob("*.json"), *data.images.glob("*.json")]:
        record.write_text("{")
    assert cache.fetch(str(image), None, "op", Alone()) == base
