"""A qcow2 file's header, read without qemu-img: what qemu-img finds there, too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from worker.errors import InvalidState
from worker.images import qemu_img
from worker.images.qcow2 import read_header
from worker.models import GIB, MIB


@pytest.mark.parametrize("options", [[], ["-o", "compat=0.10"], ["-o", "cluster_size=2M"]])
def test_it_says_what_qemu_img_says(tmp_path: Path, options: list[str]) -> None:
    base, overlay = tmp_path / "base, with a comma.raw", tmp_path / "overlay.qcow2"
    base.touch()
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *options]
    subprocess.run([*create, "-b", str(base), "-F", "raw", str(overlay), str(3 * GIB + MIB)], check=True)
    found, told = read_header(overlay), qemu_img.info(overlay, "qcow2")
    assert (
        (found.virtual_size, found.backing_file) == (told.virtual_size, told.backing_file) == (3 * GIB + MIB, str(base))
    )
    subprocess.run(["qemu-img", "resize", "-q", str(overlay), str(4 * GIB)], check=True)
    assert read_header(overlay).virtual_size == 4 * GIB


def test_a_standalone_one_has_no_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "alone.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    assert read_header(path).backing_file is None


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", bytes(4096), b"QFI\xfb" + bytes(4) + b"\xff" * 64])
def test_what_is_none_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(content)
    with pytest.raises(InvalidState, match="damaged"):
        read_header(path)
