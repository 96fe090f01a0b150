"""Checksums: what b3sum makes of the same file, holes or not; every byte counts; and the work ends when it is to."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.context import Alone
from worker.errors import Cancelled
from worker.images.checksum import BLOCK, KIND, checksum_of, combined, is_current, seal, sha256_of, sum_of_block
from worker.models import MIB


def sum_of(path: Path) -> str:
    return checksum_of(path, Alone())


def by_tools(path: Path, tool: str = "b3sum", block: str = "1M") -> str:
    lines = subprocess.check_output(["split", "-b", block, f"--filter={tool}", str(path)])
    return subprocess.check_output([tool], input=lines, text=False).decode().split()[0]


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 9 * BLOCK + 17])
def test_a_checksum_is_what_b3sum_computes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert sum_of(path) == KIND + by_tools(path)


@pytest.mark.parametrize("size", [0, 1, 9 * MIB + 17])
def test_those_of_earlier_snapshots_can_still_be_compared(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    before = by_tools(path, "sha256sum", "4M")
    assert not is_current(before)
    assert checksum_of(path, Alone(), like=before) == before
    assert seal([path], Alone(), like=before) == {path: before}


def test_a_file_whose_blocks_came_one_by_one_has_the_same_sum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = os.urandom(3 * BLOCK + 5)
    path.write_bytes(data)
    assert combined(sum_of_block(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)) == sum_of(path)


def test_holes_count_as_the_zeros_that_they_read_as(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with sparse.open("wb") as file:
        os.pwrite(file.fileno(), b"data", 9 * MIB)
        file.truncate(30 * MIB + 5)
    full.write_bytes(sparse.read_bytes())
    assert sparse.stat().st_blocks < full.stat().st_blocks
    assert sum_of(sparse) == sum_of(full) == KIND + by_tools(full)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(at=st.integers(0, 4 * BLOCK - 1), hole=st.integers(0, 3))
def test_every_byte_counts(tmp_path: Path, at: int, hole: int) -> None:
    path, changed = tmp_path / "file", tmp_path / "changed"
    for file in (path, changed):
        with file.open("wb") as out:
            for block in range(4):
                if block != hole:
                    out.seek(block * BLOCK)
                    out.write(b"x" * BLOCK)
            out.truncate(4 * BLOCK)
    with changed.open("r+b") as out:
        out.seek(at)
        out.write(b"y")
    assert sum_of(path) != sum_of(changed)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_the_length_counts_even_if_all_is_zeros(tmp_path: Path, size: int) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    for path, length in ((short, size), (long, size + 1)):
        path.touch()
        os.truncate(path, length)
    assert sum_of(short) != sum_of(long)


def test_several_files_are_sealed_at_once_and_each_has_its_own_sum(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(os.urandom(6 * MIB))
    watch = Alone()
    assert seal(paths, watch) == {path: KIND + by_tools(path) for path in paths}
    assert seal([], watch) == {}
    assert sha256_of(paths[0], watch) == hashlib.sha256(paths[0].read_bytes()).hexdigest()


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
