"""A host's copies of records: whole, and nothing beside them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from worker.engine import checkup
from worker.engine.mirror import UNFINISHED, Copy, End, Mirror
from worker.engine.record import State
from worker.settings import get_settings

COPY = Copy("op-1", {"state": "running"}, [])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "operations").iterdir())


def test_a_full_disk_costs_the_copy_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> int:  # a disk of one's own to fill needs root; the chaos suite has one
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    Mirror(tmp_path).keep(COPY)
    assert names(tmp_path) == []


def test_what_a_killed_worker_had_begun_is_swept(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    mirror.keep(COPY)
    begun, abandoned = mirror.folder / "op-2.1.1.tmp", mirror.folder / "op-3.1.1.tmp"
    begun.touch()
    abandoned.touch()
    long_ago = abandoned.stat().st_mtime - UNFINISHED - 1
    os.utime(abandoned, (long_ago, long_ago))
    mirror.sweep()
    assert names(tmp_path) == ["op-1.json", begun.name]


def test_a_damaged_copy_is_set_aside_and_the_doctor_tells_of_it(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    mirror.keep(COPY)
    (mirror.folder / "op-2.json").write_text('{"fields"')
    assert [copy.operation for copy in mirror.copies()] == ["op-1"]
    [suspect] = checkup.copies(mirror)
    assert suspect.finding.where == str(mirror.folder / "op-2.set-aside")
    assert "op-2" in suspect.finding.what


def test_how_an_operation_of_several_hosts_ended_is_kept_as_long_as_records_are(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    mirror.keep(COPY)
    mirror.close("op-1", State.SUCCEEDED, {"h1", "h2"}, 5.0)
    mirror.close("op-2", State.FAILED, {"h1"}, 5.0)
    assert names(tmp_path) == []
    mirror.sweep()
    assert (mirror.ended("op-1"), mirror.ended("op-2")) == (End(State.SUCCEEDED, 5.0), None)
    [note] = mirror.ends.iterdir()
    long_ago = note.stat().st_mtime - get_settings().keep_records - 1
    os.utime(note, (long_ago, long_ago))
    mirror.sweep()
    assert mirror.ended("op-1") is None
