"""Files appear whole, locks name their holder, and nothing outside the data directory is ever removed."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from worker.context import Alone
from worker.errors import Cancelled, InstanceLocked, InternalError, NoSpace
from worker.images import files


class Stopped(Alone):
    def check(self) -> None:
        raise Cancelled("stop")


def test_published_file_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("old")
    (tmp_path / "temporary").write_text("new")
    files.publish(tmp_path / "temporary", tmp_path / "final", Alone())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_text() == "new"


def test_json_is_replaced_and_no_temporary_file_stays(tmp_path: Path) -> None:
    for content in ({"a": 1}, {"b": [1, 2]}):
        files.replace_json(tmp_path / "record.json", content)
        assert json.loads((tmp_path / "record.json").read_text()) == content
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("replaced", [True, False])
def test_what_a_file_was_comes_back(tmp_path: Path, replaced: bool) -> None:
    note = tmp_path / "note"
    note.write_text("before")
    for _ in range(2):  # who was killed between the two begins again
        files.keep_former(note)
    if replaced:
        files.write_text_durably(note, "after")
    assert files.bring_back_former(note)
    assert (note.read_text(), [*tmp_path.iterdir()]) == ("before", [note])
    assert not files.bring_back_former(note), "it is back already"


def test_a_replacement_that_stays_leaves_nothing_of_what_was_before(tmp_path: Path) -> None:
    note = tmp_path / "note"
    files.keep_former(note)
    assert not files.bring_back_former(note), "there was nothing to keep"
    note.write_text("before")
    files.keep_former(note)
    files.write_text_durably(note, "after")
    files.forget_former(note)
    assert (note.read_text(), [*tmp_path.iterdir()]) == ("after", [note])


def test_missing_space_is_told_in_sizes_people_read(tmp_path: Path) -> None:
    files.require_space(tmp_path, 1, reserve=1)
    with pytest.raises(NoSpace, match=r"available, but 8388608\.0 TiB are needed") as caught:
        files.require_space(tmp_path, 2**63, reserve=0)
    assert caught.value.details["needed"] == 2**63
    assert 0 < caught.value.details["available"] < 2**63
    assert caught.value.details["path"] == str(tmp_path)


def test_reserve_is_never_used_up(tmp_path: Path) -> None:
    with pytest.raises(NoSpace):
        files.require_space(tmp_path, 0, reserve=2**63)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024**2, "1.5 GiB"), (60 * 1024**4, "60.0 TiB")],
)
def test_sizes_are_shown_in_binary_units(size: int, shown: str) -> None:
    assert files.human_size(size) == shown


def test_second_holder_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with files.locked(tmp_path / ".lock", operation="op-1"):
        held_by = rf"process {os.getpid()} \(operation op-1\)"
        second = files.locked(tmp_path / ".lock", operation="op-2", wait=0.2)
        with pytest.raises(InstanceLocked, match=held_by) as caught, second:
            pytest.fail("two hold one lock")
    assert caught.value.details["operation"] == "op-1"
    with files.locked(tmp_path / ".lock", operation="op-2"):
        pass


def test_waiting_for_a_lock_ends_when_it_is_released(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with files.locked(tmp_path / ".lock"):
            held.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    threading.Timer(0.2, release.set).start()
    with files.locked(tmp_path / ".lock", wait=10):
        assert release.is_set()
    holder.join(10)


def test_waiting_for_a_lock_can_be_cancelled(tmp_path: Path) -> None:
    second = files.locked(tmp_path / ".lock", wait=10, watch=Stopped())
    with files.locked(tmp_path / ".lock"), pytest.raises(Cancelled), second:
        pytest.fail("two hold one lock")


def test_lock_file_that_was_removed_excludes_nobody_so_it_is_taken_anew(tmp_path: Path) -> None:
    """The instance was removed and made again while its lock was held: the new lock is the one that counts."""
    path = tmp_path / ".lock"
    with files.locked(path):
        path.unlink()
        with files.locked(path, operation="new") as descriptor:
            assert os.path.samestat(os.fstat(descriptor), path.stat())


def test_lock_in_a_folder_that_is_gone_is_not_silently_held(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.locked(tmp_path / "gone" / ".lock"):
        pytest.fail("locked nothing")


def test_tree_is_removed_and_removing_it_again_is_fine(tmp_path: Path) -> None:
    tree = tmp_path / "root" / "uuid"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "disk").write_text("x")
    for _ in range(2):
        files.remove_tree(tree, tmp_path / "root")
        assert not tree.exists()
    assert (tmp_path / "root").is_dir()


@pytest.mark.parametrize("path", ["root", "root/..", "root/../other", "other", "root/link/inner"])
def test_nothing_outside_the_root_is_removed(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "other" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(InternalError, match="does not lie below"):
        files.remove_tree(tmp_path / path, tmp_path / "root")
    assert (tmp_path / "other" / "inner").is_dir()


def test_link_is_removed_but_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    files.remove_tree(tmp_path / "root" / "link", tmp_path / "root")
    assert (tmp_path / "other").is_dir()
    assert not (tmp_path / "root" / "link").is_symlink()


def test_probe_for_direct_io_leaves_nothing(tmp_path: Path) -> None:
    assert files.supports_direct_io(tmp_path) in (True, False)
    assert list(tmp_path.iterdir()) == []
