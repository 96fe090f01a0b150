"""Where files lie, who may reach them, and which leftovers are swept."""

from __future__ import annotations

import os
import time
from pathlib import Path
from uuid import uuid4

import pytest

from worker.images.layout import DataDir


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data").create()


def test_user_of_qemu_can_reach_disks_but_not_list_them(data: DataDir) -> None:
    folder = data.instance(uuid4()).create()
    for path in (data.root, data.instances, data.images, folder.path):
        assert path.stat().st_mode & 0o777 == 0o711


def test_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    DataDir(tmp_path / "data").create().create()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o755


def test_disks_have_the_names_an_operator_looks_for(data: DataDir) -> None:
    folder = data.instance(uuid4())
    names = [folder.root("qcow2"), folder.root("raw"), folder.ephemeral(0), folder.swap, folder.seed]
    assert [path.name for path in names] == ["root.qcow2", "root.raw", "ephemeral0.qcow2", "swap.raw", "seed.iso"]
    assert [path.name for path in (folder.console_log, folder.spec, folder.lock)] == [
        "console.log",
        "instance.json",
        ".lock",
    ]


@pytest.mark.parametrize("name", ["", "..", "../../etc", "not-a-uuid"])
def test_instance_is_found_by_uuid_only(data: DataDir, name: str) -> None:
    with pytest.raises(ValueError, match="badly formed"):
        data.instance(name)


def test_sweep_removes_what_no_live_operation_owns(data: DataDir) -> None:
    live, dead = data.temporary("op-1", "disk.part"), data.temporary("op-12", "disk.part")
    hostile = data.temporary("../../etc/passwd", "x")
    for path in (live, dead, hostile):
        path.write_text("x")
    assert hostile.parent == data.tmp
    assert sorted(data.sweep_tmp({"op-1"})) == sorted([dead, hostile])
    assert list(data.tmp.iterdir()) == [live]


def test_sweep_keeps_a_download_for_a_day_for_others_to_continue(data: DataDir) -> None:
    download = data.partial_download("abc")
    torn_record = data.images / ".x.json.1.2.tmp"
    for path in (download, torn_record):
        path.write_text("x")
    assert data.sweep_tmp(set()) == []
    yesterday = time.time() - 90000
    for path in (download, torn_record):
        os.utime(path, (yesterday, yesterday))
    assert sorted(data.sweep_tmp(set())) == sorted([download, torn_record])
