"""Space that was allocated and never written is given back; content stays."""

from __future__ import annotations

import os
from pathlib import Path

from worker.images.files import allocated_size
from worker.images.sparse import punch_holes
from worker.models import MIB


def test_unwritten_parts_become_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    written = os.urandom(MIB)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * MIB)
        os.pwrite(file.fileno(), written, 4 * MIB)
    # Not read before: zeros in the page cache count as data (lseek(2) of ext4 and XFS looks there, too).
    punch_holes(path)
    assert allocated_size(path) <= 2 * MIB
    assert path.read_bytes() == bytes(4 * MIB) + written + bytes(11 * MIB)
    punch_holes(path)
    assert path.stat().st_size == 16 * MIB


def test_empty_and_full_files_stay_as_they_are(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.touch()
    full.write_bytes(os.urandom(MIB))
    for path in (empty, full):
        before = path.read_bytes()
        punch_holes(path)
        assert path.read_bytes() == before
