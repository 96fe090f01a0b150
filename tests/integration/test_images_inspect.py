"""Only standalone qcow2 images and raw disks get in; whatever else is refused says what it is."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.errors import ImageRejected
from worker.images.inspect import ImageFacts, inspect
from worker.images.seed import build_seed
from worker.models import GIB, MIB


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def with_mbr(path: Path, size: int) -> None:
    """A sparse disk with one partition, as sfdisk would write it."""
    entry = struct.pack("<B3sB3sII", 0x80, b"\x20\x21\x00", 0x83, b"\xff\xff\xff", 2048, size // 512 - 2048)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(446)
        file.write(entry)
        file.seek(510)
        file.write(b"\x55\xaa")


def with_gpt(path: Path) -> None:
    path.write_bytes(bytes(4 * MIB))
    subprocess.run(["/usr/sbin/sfdisk", "-q", path], input=b"label: gpt\n,\n", check=True, capture_output=True)


def test_qcow2_is_accepted_with_its_virtual_size(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "image", "3G")
    assert inspect(tmp_path / "image", max_virtual_bytes=4 * GIB) == ImageFacts("qcow2", 3 * GIB)


def test_compressed_qcow2_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * MIB)
    options = ("-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2")
    qemu_img("convert", *options, tmp_path / "data", tmp_path / "image")
    assert inspect(tmp_path / "image", max_virtual_bytes=GIB) == ImageFacts("qcow2", MIB)


def test_raw_disk_with_an_mbr_is_accepted(tmp_path: Path) -> None:
    with_mbr(tmp_path / "image", 8 * MIB)
    assert inspect(tmp_path / "image", max_virtual_bytes=GIB) == ImageFacts("raw", 8 * MIB)


def test_raw_disk_with_a_gpt_is_accepted(tmp_path: Path) -> None:
    with_gpt(tmp_path / "image")
    assert inspect(tmp_path / "image", max_virtual_bytes=GIB) == ImageFacts("raw", 4 * MIB)


def test_large_raw_disk_is_judged_by_its_beginning(tmp_path: Path) -> None:
    with_mbr(tmp_path / "image", 50 * GIB)
    begun = time.monotonic()
    inspect(tmp_path / "image", max_virtual_bytes=100 * GIB)
    assert time.monotonic() - begun < 2


def text(path: Path) -> None:
    path.write_text("This is no disk image.\n" * 1000)


def web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><body>404</body></html>" + " " * 5000)


def empty(path: Path) -> None:
    path.touch()


def tiny(path: Path) -> None:
    path.write_bytes(b"x")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(MIB))


def half_a_sector(path: Path) -> None:
    with_mbr(path, 2 * MIB)
    with path.open("ab") as file:
        file.write(b"x" * 100)


def gzip(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + os.urandom(5000))


def iso(path: Path) -> None:
    build_seed(path, instance_id="i", hostname="h")


def bootable_iso(path: Path) -> None:
    """A hybrid: ISO 9660 with a boot sector, as install CDs are."""
    iso(path)
    with path.open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")


def vmdk(path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", path, "4M")


def vdi(path: Path) -> None:
    qemu_img("create", "-q", "-f", "vdi", path, "4M")


def qed(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", path, "4M")


def backing_file(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", path, "4M")


def json_backing(path: Path) -> None:
    address = "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "/etc/passwd"}})
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", address, "-F", "raw", path, "4M")


def nbd_backing(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw", path, "4M")


def data_file(path: Path) -> None:
    data = path.with_name("data.raw")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "4M")


def internal_snapshot(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_img("snapshot", "-c", "one", path)


def encrypted(path: Path) -> None:
    secret = ("--object", "secret,id=key,data=secret")
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10")
    qemu_img("create", "-q", *secret, "-f", "qcow2", *options, path, "4M")


def sixty_tebibytes(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "60T")


def damaged(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    with path.open("r+b") as file:
        file.seek(0x20000)
        file.write(bytes(4096))


def marked_corrupt(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    with path.open("r+b") as file:
        file.seek(79)  # incompatible features, last byte: bit 1 is "corrupt" (qcow2 specification)
        file.write(b"\x02")


def truncated_header(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    os.truncate(path, 600)


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (text, "no disk image"),
    (web_page, "a web page"),
    (empty, "an empty file"),
    (tiny, "no disk image"),
    (zeros, "no disk image"),
    (half_a_sector, "not a whole number of 512-byte sectors"),
    (gzip, "a gzip-compressed file"),
    (iso, "a CD image"),
    (bootable_iso, "a CD image"),
    (vmdk, "format vmdk"),
    (vdi, "format vdi"),
    (qed, "format qed"),
    (backing_file, "backing file"),
    (json_backing, "backing file"),
    (nbd_backing, "backing file"),
    (data_file, "data_file"),
    (internal_snapshot, "internal snapshots (1)"),
    (encrypted, "encryption"),
    (sixty_tebibytes, "virtual size of 60.0 TiB"),
    (damaged, "damaged"),
    (marked_corrupt, "corrupt"),
    (truncated_header, "qcow2"),
]


@pytest.mark.parametrize(("make", "found"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_dangerous_or_useless_file_is_refused(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "image")
    with pytest.raises(ImageRejected) as caught:
        inspect(tmp_path / "image", max_virtual_bytes=2048 * GIB, source="https://example.org/image")
    assert found in caught.value.details["found"]
    assert caught.value.message.startswith("image: https://example.org/image is refused: found ")
    assert "; allowed: " in caught.value.message


def test_cd_image_gets_a_hint(tmp_path: Path) -> None:
    iso(tmp_path / "image")
    with pytest.raises(ImageRejected) as caught:
        inspect(tmp_path / "image", max_virtual_bytes=GIB)
    assert "Install" in caught.value.hint
