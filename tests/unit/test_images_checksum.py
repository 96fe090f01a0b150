"""Checksums: what coreutils make of the same file, holes or not; and the work ends when it is to."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import Cancelled
from worker.images.checksum import BLOCK, checksum_of, seal, sha256_of
from worker.models import MIB


def coreutils(path: Path) -> str:
    command = ["split", "-b", "4M", "--filter=sha256sum", str(path)]
    return hashlib.sha256(subprocess.check_output(command)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 9 * MIB + 17])
def test_a_checksum_is_what_coreutils_compute(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert checksum_of(path) == coreutils(path)


def test_holes_count_as_the_zeros_that_they_read_as(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with sparse.open("wb") as file:
        os.pwrite(file.fileno(), b"data", 9 * MIB)
        file.truncate(30 * MIB + 5)
    full.write_bytes(sparse.read_bytes())
    assert checksum_of(sparse) == checksum_of(full) == coreutils(full)


def test_several_files_are_sealed_at_once_and_each_has_its_own_sum(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(os.urandom(6 * MIB))
    watch = Alone()
    assert seal(paths, watch) == {path: coreutils(path) for path in paths}
    assert seal([], watch) == {}
    assert sha256_of(paths[0], watch) == hashlib.sha256(paths[0].read_bytes()).hexdigest()


def test_one_changed_byte_is_another_sum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MIB))
    before = checksum_of(path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 5 * MIB)
    assert checksum_of(path) != before


def test_it_ends_when_the_operation_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        for _ in range(256):
            file.write(os.urandom(MIB))

    class Impatient(Alone):
        def progress(self, done: int, total: int | None = None, note: str = "") -> None:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        seal([path], Impatient())
