"""Real qemu-img: formats are never guessed, data is never overwritten, nothing half-made stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import Cancelled, CommandFailed, InvalidState
from worker.images import qemu_img, swap
from worker.models import MIB

CONVERT_ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from worker.errors import FleetError
from worker.images import qemu_img
disk, source = Path(sys.argv[1]), Path(sys.argv[2])
try:
    qemu_img.convert(source, "raw", disk / "copy.qcow2", "qcow2")
except FleetError as error:
    print(json.dumps({"error": error.as_dict(), "left": [path.name for path in disk.iterdir()]}))
"""


class CancelledOnProgress(Alone):
    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        raise Cancelled("stop")


def write(path: Path, fmt: str, pattern: int, offset: str, length: str) -> None:
    """Have QEMU itself write into an image."""
    command = ["qemu-io", "-f", fmt, "-c", f"write -P {pattern} {offset} {length}", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def reads(path: Path, fmt: str, pattern: int, offset: str, length: str) -> bool:
    command = ["qemu-io", "-f", fmt, "-c", f"read -P {pattern} {offset} {length}", str(path)]
    return "failed" not in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    qemu_img.create(path, "qcow2", 64 * MIB)
    write(path, "qcow2", 7, "1M", "8M")
    return path


def test_overlay_names_its_base_and_the_format_of_its_base(base: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "root.qcow2"
    qemu_img.create_overlay(overlay, base, "qcow2", 128 * MIB)
    found = qemu_img.info(overlay, "qcow2")
    assert (found.backing_file, found.backing_format) == (str(base), "qcow2")
    assert found.virtual_size == 128 * MIB
    assert reads(overlay, "qcow2", 7, "1M", "8M")


def test_header_a_guest_wrote_into_a_raw_base_is_not_obeyed(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk must not reach a file of the host (CVE-2026-24708)."""
    secret, disk = tmp_path / "secret", tmp_path / "root.raw"
    secret.write_bytes(b"s" * MIB)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", disk, "8M"], check=True)
    with disk.open("r+b") as file:
        file.truncate(8 * MIB)
    qemu_img.resize(disk, "raw", 16 * MIB)
    qemu_img.convert(disk, "raw", tmp_path / "copy.raw", "raw")
    assert disk.stat().st_size == 16 * MIB
    assert b"s" * 512 not in (tmp_path / "copy.raw").read_bytes()
    assert qemu_img.info(disk, "raw").backing_file is None


@pytest.mark.parametrize("size", [32, 128])
def test_a_bitmap_that_a_killed_qemu_left_in_use_does_not_keep_the_size(base: Path, size: int) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(base), "used"], check=True)
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin
        assert qemu.stdout
        qemu.stdin.write(b"write -P 9 12M 64k\nflush\n")
        qemu.stdin.flush()
        assert b"wrote" in qemu.stdout.readline() + qemu.stdout.readline()
        qemu.kill()
    change = qemu_img.resize if size > 64 else qemu_img.shrink
    change(base, "qcow2", size * MIB)
    assert qemu_img.info(base, "qcow2").virtual_size == size * MIB
    assert reads(base, "qcow2", 9, "12M", "64k")
    assert reads(base, "qcow2", 7, "1M", "8M")


def test_convert_flattens_the_chain_and_reports_bytes(base: Path, tmp_path: Path) -> None:
    overlay, flat, watch = tmp_path / "root.qcow2", tmp_path / "flat.qcow2", Alone()
    qemu_img.create_overlay(overlay, base, "qcow2", 64 * MIB)
    write(overlay, "qcow2", 9, "2M", "1M")
    qemu_img.convert(overlay, "qcow2", flat, "qcow2", watch=watch, stall=30)
    assert qemu_img.info(flat, "qcow2").backing_file is None
    subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", overlay, flat], check=True)
    assert watch.last_progress[:2] == (64 * MIB, 64 * MIB)


def test_cancelled_convert_leaves_no_target_and_the_source_as_it_was(base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(Cancelled):
        qemu_img.convert(base, "qcow2", tmp_path / "copy.qcow2", "qcow2", watch=CancelledOnProgress())
    assert list(tmp_path.iterdir()) == [base]
    assert base.read_bytes() == before


def test_failed_convert_leaves_no_target(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image" * 100)
    with pytest.raises(CommandFailed, match="not in qcow2 format"):
        qemu_img.convert(tmp_path / "text", "qcow2", tmp_path / "copy.qcow2", "qcow2")
    assert not (tmp_path / "copy.qcow2").exists()


def test_nothing_that_exists_is_overwritten(base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("the last copy")
    with pytest.raises(InvalidState, match="is not overwritten"):
        qemu_img.create(disk, "qcow2", MIB)
    with pytest.raises(InvalidState):
        qemu_img.create_overlay(disk, base, "qcow2", 64 * MIB)
    with pytest.raises(InvalidState):
        qemu_img.convert(base, "qcow2", disk, "raw")
    assert disk.read_text() == "the last copy"


def test_full_disk_is_its_own_error_and_leaves_nothing(tmp_path: Path) -> None:
    """On a filesystem of 4 MiB, mounted where only the child sees it."""
    source, disk = tmp_path / "source.raw", tmp_path / "disk"
    source.write_bytes(os.urandom(8 * MIB))
    disk.mkdir()
    own_mounts = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    mount = 'mount -t tmpfs -o size=4M none "$1" && exec "$0" -c "$3" "$1" "$2"'
    command = [*own_mounts, "sh", "-c", mount, sys.executable, str(disk), str(source), CONVERT_ON_A_SMALL_DISK]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["error"]["code"] == "no_space"
    assert answer["error"]["retryable"] is False
    assert answer["error"]["details"]["path"] == str(disk)
    assert answer["left"] == []


def test_resize_grows_and_never_shrinks(base: Path) -> None:
    qemu_img.resize(base, "qcow2", 96 * MIB)
    assert qemu_img.info(base, "qcow2").virtual_size == 96 * MIB
    with pytest.raises(CommandFailed, match="shrink"):
        qemu_img.resize(base, "qcow2", 32 * MIB)
    assert qemu_img.info(base, "qcow2").virtual_size == 96 * MIB


def test_measured_size_is_enough_for_the_copy(base: Path, tmp_path: Path) -> None:
    needed = qemu_img.measure(base, "qcow2", "qcow2")
    qemu_img.convert(base, "qcow2", tmp_path / "copy.qcow2", "qcow2")
    assert 8 * MIB <= (tmp_path / "copy.qcow2").stat().st_size <= needed < 16 * MIB
    assert qemu_img.measure(base, "qcow2", "raw") == 64 * MIB


def test_check_tells_sound_images_from_damaged_ones(base: Path) -> None:
    assert qemu_img.check(base, "qcow2") == qemu_img.CheckResult(0, 0)
    with base.open("r+b") as file:
        file.seek(0x20000)  # the refcount block
        file.write(bytes(4096))
    assert qemu_img.check(base, "qcow2").corruptions > 0


def test_image_a_guest_has_open_can_be_looked_at(base: Path) -> None:
    """--force-share: a running guest holds the write lock."""
    writer = subprocess.Popen(["qemu-io", "-f", "qcow2", base], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        writer.stdout.readline()
        assert qemu_img.info(base, "qcow2").virtual_size == 64 * MIB
        assert qemu_img.measure(base, "qcow2", "qcow2") > 0
    finally:
        writer.communicate(b"quit\n", timeout=10)


def test_swap_disk_is_sparse_and_labelled(tmp_path: Path) -> None:
    path = tmp_path / "swap.raw"
    swap.make_swap(path, 64)
    found = subprocess.run(["/usr/sbin/blkid", "-o", "export", path], check=True, capture_output=True, text=True)
    assert {"TYPE=swap", "LABEL=swap"} <= set(found.stdout.splitlines())
    assert path.stat().st_size == 64 * MIB
    assert path.stat().st_blocks * 512 < MIB
    assert list(tmp_path.iterdir()) == [path]
