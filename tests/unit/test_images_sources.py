"""What names an image, and what the fleet will not open for anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.errors import InternalError, InvalidSpec
from worker.images import qemu_img, transfer
from worker.images.layout import DataDir
from worker.images.sources import LocalFile, WebAddress, source_of


@pytest.mark.parametrize(
    "image",
    ["debian12", "images/a.qcow2", "file:/etc/passwd", "json:{}", "nbd://x/y", "ftp://x/y", "http://", "-h", "/a\0b"],
)
def test_neither_path_nor_address_is_refused_with_what_is_allowed(tmp_path: Path, image: str) -> None:
    with pytest.raises(InvalidSpec, match="allowed: an absolute path, an http") as caught:
        source_of(image, [tmp_path], DataDir(tmp_path))
    assert caught.value.details["field"] == "image"
    assert caught.value.details["given"] == image


def test_path_below_an_allowed_folder_is_taken(tmp_path: Path) -> None:
    assert isinstance(source_of(f"{tmp_path}/deep/a.qcow2", [tmp_path], DataDir(tmp_path)), LocalFile)


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../a", "{root}/link/passwd", "{root}x/a"])
def test_path_that_leads_elsewhere_is_refused_and_names_the_allowed_folders(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(InvalidSpec, match="allowed: a file below") as caught:
        source_of(path.format(root=root), [root], DataDir(tmp_path))
    assert caught.value.details["allowed"] == [str(root)]


def test_login_in_an_address_is_not_shown() -> None:
    source = source_of("https://me:secret@example.org/a.qcow2", [], DataDir(Path("/nowhere")))
    assert isinstance(source, WebAddress)
    assert source.name == "https://example.org/a.qcow2" == transfer.shown_url(source.url)


@pytest.mark.parametrize("path", ["disk.qcow2", "json:{}", "nbd://x", "-h", "file:/x"])
def test_qemu_img_is_given_absolute_paths_only(path: str) -> None:
    with pytest.raises(InternalError, match="not absolute"):
        qemu_img.resize(Path(path), "raw", 1)


def test_progress_of_qemu_img_is_read_as_bytes() -> None:
    parse = qemu_img.percent_of(2000)
    assert parse("    (12.50/100%)") == (250, 2000)
    assert parse("    (100.00/100%)") == (2000, 2000)
    assert parse("anything else") is None
