"""The digest of a file's content: the same for the same content however it is stored, and another for any other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.context import Alone
from worker.images.digest import BLOCK, content_digest


def digest_of(path: Path) -> str:
    return content_digest(path, Alone())


def test_a_hole_counts_as_the_zeros_it_reads_as(tmp_path: Path) -> None:
    sparse, written = tmp_path / "sparse", tmp_path / "written"
    data = os.urandom(BLOCK + 5000)
    with sparse.open("wb") as file:
        file.seek(3 * BLOCK + 4096)
        file.write(data)
        file.truncate(9 * BLOCK + 77)
    written.write_bytes(sparse.read_bytes())
    assert sparse.stat().st_blocks < written.stat().st_blocks
    assert digest_of(sparse) == digest_of(written)


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
    assert digest_of(path) != digest_of(changed)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_the_length_counts_even_if_all_is_zeros(tmp_path: Path, size: int) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    for path, length in ((short, size), (long, size + 1)):
        path.touch()
        os.truncate(path, length)
    assert digest_of(short) != digest_of(long)
