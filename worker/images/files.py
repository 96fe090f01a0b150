"""Files that are either complete and durable or not there, locks between processes, and room on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from worker.context import Alone, Watcher
from worker.errors import InstanceLocked, InternalError, NoSpace

_LOOK_EVERY = 0.25  # seconds
_LOCK_POLL = 0.1  # seconds


def publish(temporary: Path, final: Path, watch: Watcher | None = None) -> None:
    """Make a finished file durable under its final name, in place of what had that name; same filesystem.

    Writing back gigabytes takes a while: `watch` is asked meanwhile and may end it. Raises NoSpace.
    """
    with out_of_space_is_an_error(final.parent):
        _sync(temporary, watch)
        temporary.rename(final)
        _sync(final.parent)


def publish_folder(unfinished: Path, final: Path) -> None:
    """Make a folder, whose files are durable, appear under its final name; same filesystem. Raises NoSpace."""
    with out_of_space_is_an_error(final.parent):
        _sync(unfinished)
        unfinished.rename(final)
        _sync(final.parent)


def rename_folder(folder: Path, name: Path) -> None:
    """Give a folder another name in the same place, durably; a name that is taken is an error."""
    if name.exists():
        raise InternalError(f"{folder} cannot become {name}, which is there already.", path=str(name))
    folder.rename(name)
    _sync(name.parent)


def write_text_durably(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a small file as a whole. Raises NoSpace."""
    with out_of_space_is_an_error(path.parent), temporary_beside(path) as temporary:
        temporary.write_text(text)
        temporary.chmod(mode)
        publish(temporary, path)


def write_text_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a small file as a whole, for as long as the host is not switched off. Raises NoSpace.

    Beside a copy at full speed, to make a file durable has taken 0.2 s.
    """
    with out_of_space_is_an_error(path.parent), temporary_beside(path) as temporary:
        temporary.touch(mode=mode)
        temporary.write_text(text)
        temporary.rename(path)


def copy_durably(source: Path, path: Path, mode: int) -> None:
    """Put a copy of a small file in a place, as a whole. Raises NoSpace."""
    with out_of_space_is_an_error(path.parent), temporary_beside(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(source.read_bytes())
        temporary.chmod(mode)
        publish(temporary, path)


def keep_former(path: Path) -> None:
    """Keep what a file is now, so that to take its replacement back needs no space: the disk may be full by then.

    Raises NoSpace.
    """
    former = _former(path)
    former.unlink(missing_ok=True)
    with out_of_space_is_an_error(path.parent), contextlib.suppress(FileNotFoundError):
        os.link(path, former)


def bring_back_former(path: Path) -> bool:
    """Make the file again what `keep_former` kept; False when nothing was kept, or it is back already."""
    try:
        _former(path).rename(path)
    except FileNotFoundError:
        return False
    forget_former(path)  # rename(2) leaves both names of one and the same file
    _sync(path.parent)
    return True


def forget_former(path: Path) -> None:
    """The replacement of the file stays."""
    _former(path).unlink(missing_ok=True)


def _former(path: Path) -> Path:
    return path.with_name(f"{path.name}.former")


def replace_json(path: Path, content: Any) -> None:
    """Replace a small JSON file as a whole; for our eyes only, as specs hold user-data. Raises NoSpace."""
    write_text_durably(path, json.dumps(content, indent=1, sort_keys=True) + "\n", mode=0o600)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name of one's own in the same folder; whatever still has it afterwards is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what had names of `temporary_beside` in a folder to which nobody else writes now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def removed_unless_renamed(path: Path) -> Iterator[Path]:
    """A file that is made under this name and gets its final one in the block; whatever happens, none is left here."""
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def require_space(path: Path, needed: int, reserve: int = 0) -> None:
    """Raise NoSpace unless `needed` bytes fit into the filesystem of `path` and `reserve` bytes stay free."""
    available = available_space(path)
    if needed + reserve > available:
        raise NoSpace(
            f"{path} has {human_size(available)} available, but {human_size(needed)} are needed"
            f" and {human_size(reserve)} are kept in reserve.",
            needed=needed,
            available=available,
            reserve=reserve,
            path=str(path),
        )


def available_space(path: Path) -> int:
    """Bytes QEMU, which is not root, could still write into the filesystem of `path`."""
    filesystem = os.statvfs(path)
    return filesystem.f_bavail * filesystem.f_frsize


@contextlib.contextmanager
def out_of_space_is_an_error(folder: Path) -> Iterator[None]:
    """Translate a write that found the disk (or the quota) full into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        available = available_space(folder)
        raise NoSpace(
            f"{folder} is full: {human_size(available)} are available.",
            needed=None,
            available=available,
            path=str(folder),
        ) from error


def size_of(path: Path) -> int:
    """The file's size in bytes, 0 if it is not there (any more)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def allocated_size(path: Path) -> int:
    """Bytes that the file really takes on the disk, 0 if it is not there."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def human_size(size: int) -> str:
    """A size in bytes as people read it: `1.5 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@contextlib.contextmanager
def locked(path: Path, *, operation: str = "", wait: float = 0.0, watch: Watcher | None = None) -> Iterator[int]:
    """Hold the lock file `path`, waiting at most `wait` seconds for it; yields the descriptor.

    A child given the descriptor (`pass_fds`) holds the lock for as long as it lives, whatever becomes of us.
    Raises InstanceLocked, which names the holder; FileNotFoundError if the folder is not there (any more).
    """
    descriptor = _acquire(path, time.monotonic() + wait, watch or Alone())
    try:
        holder = json.dumps({"pid": os.getpid(), "operation": operation})
        with contextlib.suppress(OSError):  # only for messages: a full disk must not keep anybody from undoing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield descriptor
    finally:
        # Not LOCK_UN: that would take the lock from a child that inherited it.
        os.close(descriptor)


def _acquire(path: Path, deadline: float, watch: Watcher) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever removed the instance removed the file too: a lock on a file without a name excludes nobody.
            if _is_same_file(descriptor, path):
                return descriptor
            os.close(descriptor)
            continue
        except BlockingIOError:
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        watch.check()
        if time.monotonic() >= deadline:
            raise _held_by_another(path)
        time.sleep(_LOCK_POLL)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _held_by_another(path: Path) -> InstanceLocked:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        holder = {}
    pid, operation = holder.get("pid"), holder.get("operation")
    return InstanceLocked(
        f"{path} is locked by process {pid or 'unknown'} (operation {operation or 'unknown'}).",
        path=str(path),
        pid=pid,
        operation=operation,
    )


def remove_tree(path: Path, root: Path) -> None:
    """Remove `path`, which must lie below `root`, with all it holds; nothing there is fine. Links are not followed."""
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(root.resolve()) or place == root.resolve() or path.name in ("", ".."):
        raise InternalError(f"{path} does not lie below {root}: it is not removed.", path=str(path), root=str(root))
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
        _sync(place.parent)
    except FileNotFoundError:
        return


def supports_direct_io(folder: Path) -> bool:
    """Whether files in `folder` can be opened with O_DIRECT, which `cache=none` needs (tmpfs before 6.6 cannot)."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".direct-io.") as file, mmap.mmap(-1, 4096) as block:
        try:
            descriptor = os.open(file.name, os.O_WRONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            return os.write(descriptor, block) == len(block)
        except OSError:
            return False
        finally:
            os.close(descriptor)


def _sync(path: Path, watch: Watcher | None = None) -> None:
    if watch is None:
        return _fsync(path)
    pool = ThreadPoolExecutor(1)
    try:
        written = pool.submit(_fsync, path)
        while wait([written], _LOOK_EVERY).not_done:
            watch.check()
        written.result()
    finally:
        pool.shutdown(wait=False)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
