"""Promised space: nobody is promised what another has not written yet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import NoSpace
from worker.images.files import available_space
from worker.images.reserve import Ledger
from worker.models import MIB


def reserve(ledger: Ledger, operation: str, needed: int, folder: Path) -> None:
    ledger.reserve(operation, needed, folder, 0, Alone(operation))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    return place


def test_what_is_promised_is_not_promised_again(ledger: Ledger, folder: Path) -> None:
    half = available_space(folder) * 6 // 10
    reserve(ledger, "op-1", half, folder)
    with pytest.raises(NoSpace) as caught:
        reserve(ledger, "op-2", half, folder)
    assert caught.value.details["needed"] == half
    reserve(ledger, "op-1", half, folder)  # again for the same operation: not twice
    ledger.release("op-1")
    reserve(ledger, "op-2", half, folder)


def test_what_is_written_counts_once(ledger: Ledger, folder: Path) -> None:
    reserve(ledger, "op/1", 4 * MIB, folder)
    (folder / "disk").write_bytes(os.urandom(3 * MIB))
    assert 0 < ledger.outstanding() <= MIB
    assert ledger.outstanding(besides="op/1") == 0
    (folder / "more").write_bytes(os.urandom(3 * MIB))
    assert ledger.outstanding() == 0


def test_promises_of_ended_operations_are_swept(ledger: Ledger, folder: Path) -> None:
    assert ledger.sweep(set()) == []
    reserve(ledger, "op/1", MIB, folder)
    reserve(ledger, "op-2", MIB, folder)
    assert len(ledger.sweep({"op/1"})) == 1
    assert ledger.outstanding() == MIB
    ledger.release("op/1")
    ledger.release("op/1")
    assert ledger.outstanding() == 0
