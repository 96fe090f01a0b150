"""qemu-img, always told the format: a format it guesses is a format the guest chose."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.context import Watcher
from worker.errors import CommandFailed, InternalError, InvalidState
from worker.images.command import Command, Progress, run
from worker.models import GIB, Compression, DiskFormat

# Nova's bounds for a look at an untrusted image. Not for convert: with `-m 16` it aborts under 1 GiB.
_CPU_SECONDS = 30
_MEMORY_BYTES = 2 * GIB
_SHORT = 60.0  # seconds a command that touches only headers may take
_PERCENT = re.compile(r"\((\d+(?:\.\d+)?)/100%\)")


@dataclass(frozen=True)
class ImageInfo:
    """What `qemu-img info` says of an image. Sizes in bytes."""

    path: Path
    format: str
    virtual_size: int
    actual_size: int
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    snapshots: int
    encrypted: bool
    corrupt: bool


@dataclass(frozen=True)
class CheckResult:
    """What `qemu-img check` found: corruptions damage data, leaks only waste space."""

    corruptions: int
    leaks: int


def info(path: Path, fmt: DiskFormat) -> ImageInfo:
    """Read an image's header as `fmt`, also while a guest has it open. Raises CommandFailed."""
    return _parse_info(path, _look(path, "-f", fmt))


def probe(path: Path) -> str:
    """The format QEMU itself takes the file for.

    The one call without a format: only for a file the inspector has passed, and only to compare the answer.
    """
    return str(_look(path)["format"])


def create(path: Path, fmt: DiskFormat, size: int) -> None:
    """Create an empty image of `size` bytes. Raises InvalidState if the file exists, NoSpace, CommandFailed."""
    with _making(path):
        _run("create", "-q", "-f", fmt, _safe(path), str(size), output=path)


def create_overlay(path: Path, backing: Path, backing_format: DiskFormat, size: int) -> None:
    """Create a qcow2 overlay of `size` bytes over `backing`. Raises InvalidState if the file exists, NoSpace."""
    _create_on(path, backing, backing_format, size)


def create_delta(path: Path, backing: Path, backing_format: DiskFormat, size: int) -> None:
    """As `create_overlay`, for a file that is written to while nobody can see what it builds on.

    It is allocated by the sector (QEMU 5.2's extended L2 entries: 32 parts of a cluster), so that no write has to be
    filled up from below. Raises InvalidState if the file exists, NoSpace.
    """
    _create_on(path, backing, backing_format, size, "-o", "cluster_size=16k,extended_l2=on")


def _create_on(path: Path, backing: Path, backing_format: DiskFormat, size: int, *options: str) -> None:
    with _making(path):
        base = ("-b", _safe(backing), "-F", backing_format)
        _run("create", "-q", "-f", "qcow2", *options, *base, _safe(path), str(size), output=path)


def resize(path: Path, fmt: DiskFormat, size: int) -> None:
    """Grow an image that no guest has open to `size` bytes; never shrinks. Raises CommandFailed, NoSpace."""
    _resize(path, fmt, size)


def shrink(path: Path, fmt: DiskFormat, size: int) -> None:
    """Cut an image to `size` bytes, and what lies beyond is gone. Raises CommandFailed."""
    _resize(path, fmt, size, "--shrink")


def _resize(path: Path, fmt: DiskFormat, size: int, *options: str) -> None:
    def resize() -> None:
        _run("resize", "-q", *options, "-f", fmt, _safe(path), str(size), output=path)

    try:
        resize()
    except CommandFailed as error:
        if "is inconsistent" not in error.message:
            raise
        _remove_broken_bitmaps(path)
        resize()


def _remove_broken_bitmaps(path: Path) -> None:
    """Remove the bitmaps that a QEMU that was killed has left in use: they are of no use, and keep the size as it is.

    What changed since a snapshot is not known any more, so the next incremental one is full, and says so.
    """
    specific = _look(path, "-f", "qcow2").get("format-specific", {}).get("data", {})
    for bitmap in specific.get("bitmaps", ()):
        if "in-use" in bitmap["flags"]:
            _run("bitmap", "--remove", "-f", "qcow2", _safe(path), bitmap["name"])


def convert(
    source: Path,
    source_format: DiskFormat,
    target: Path,
    target_format: DiskFormat,
    *,
    compress: Compression | None = None,
    bytes_per_second: int | None = None,
    watch: Watcher | None = None,
    stall: float | None = None,
    pass_fds: tuple[int, ...] = (),
) -> None:
    """Write `source`, its backing chain included, as one standalone image; `publish` makes it durable.

    Progress in bytes of the virtual size. A failed or cancelled convert leaves no target. Dirty bitmaps stay behind:
    what they note is of use to the guest's own disk only.
    Raises InvalidState if the target exists, NoSpace, Stalled, CommandFailed, and what `watch` raises.
    """
    total = info(source, source_format).virtual_size
    with _making(target):
        # 8 coroutines, written out of order: the fastest of what was measured, compressed or not.
        argv = ["qemu-img", "convert", "-p", "-W", "-m", "8", "-f", source_format, "-O", target_format]
        argv += ["-c", "-o", f"compression_type={compress}"] if compress else []
        argv += ["-r", str(bytes_per_second)] if bytes_per_second else []
        command = Command([*argv, _safe(source), _safe(target)], "qemu-utils", parse=percent_of(total), output=target)
        run(command, watch=watch, stall=stall, pass_fds=pass_fds)


def flatten(layers: Sequence[Path], target: Path, *, watch: Watcher | None = None, stall: float | None = None) -> None:
    """Write qcow2 files, each of which builds on the next, as one standalone qcow2 image; otherwise as `convert`.

    What their headers name as their backing files is not looked at: these may lie elsewhere.
    """
    total = info(layers[0], "qcow2").virtual_size
    with _making(target):
        argv = ["qemu-img", "convert", "-p", "-W", "-m", "8", "--image-opts", _chain(layers), "-O", "qcow2"]
        command = Command([*argv, _safe(target)], "qemu-utils", parse=percent_of(total), output=target)
        run(command, watch=watch, stall=stall)


def _chain(layers: Sequence[Path]) -> str:
    """The layers as an option of QEMU's, where a comma would end a name."""
    options = []
    for depth, path in enumerate(layers):
        node, name = "backing." * depth, _safe(path).replace(",", ",,")
        options += [f"{node}driver=qcow2", f"{node}file.driver=file", f"{node}file.filename={name}"]
    return ",".join(options)


def rebase_unsafely(path: Path, backing: str, backing_format: DiskFormat) -> None:
    """Name another file as the backing of a qcow2 file, which the caller knows to have the same content.

    `backing` is written as it is given: a relative name counts from the folder of `path`. Raises CommandFailed.
    """
    _run("rebase", "-u", "-q", "-f", "qcow2", "-b", backing, "-F", backing_format, _safe(path))


def measure(path: Path, fmt: DiskFormat, target_format: DiskFormat) -> int:
    """Bytes a standalone copy in `target_format` needs at most; for raw that is the whole virtual size."""
    answer = _run("measure", "--output=json", "-U", "-f", fmt, "-O", target_format, _safe(path))
    return int(json.loads(answer)["required"])


def check(path: Path, fmt: DiskFormat, *, watch: Watcher | None = None, stall: float | None = None) -> CheckResult:
    """Check the metadata of an image that no guest has open; a format without any is always sound."""
    if fmt == "raw":
        return CheckResult(0, 0)
    # 2: corruptions, 3: leaks only (qemu-img's manual); 1 is a check that could not be done.
    argv = ["qemu-img", "check", "--output=json", "-f", fmt, _safe(path)]
    command = Command(argv, "qemu-utils", success=(0, 2, 3), memory_bytes=_MEMORY_BYTES)
    answer = json.loads(run(command, watch=watch, stall=stall or _SHORT))
    return CheckResult(answer.get("corruptions", 0) + answer.get("check-errors", 0), answer.get("leaks", 0))


def percent_of(total: int) -> Callable[[str], Progress | None]:
    """A parser that makes (bytes done, `total`) of qemu-img's `(12.34/100%)`."""

    def parse(line: str) -> Progress | None:
        found = _PERCENT.search(line)
        return (int(float(found[1]) * total / 100), total) if found else None

    return parse


def _run(*arguments: str, output: Path | None = None) -> str:
    return run(Command(["qemu-img", *arguments], "qemu-utils", output=output), stall=_SHORT)


def _look(path: Path, *arguments: str) -> dict[str, Any]:
    argv = ["qemu-img", "info", "--output=json", "--force-share", *arguments, _safe(path)]
    command = Command(argv, "qemu-utils", cpu_seconds=_CPU_SECONDS, memory_bytes=_MEMORY_BYTES)
    answer: dict[str, Any] = json.loads(run(command, stall=_SHORT))
    return answer


def _parse_info(path: Path, answer: dict[str, Any]) -> ImageInfo:
    specific = answer.get("format-specific", {}).get("data", {})
    return ImageInfo(
        path=path,
        format=answer["format"],
        virtual_size=answer["virtual-size"],
        actual_size=answer.get("actual-size", 0),
        backing_file=answer.get("full-backing-filename") or answer.get("backing-filename"),
        backing_format=answer.get("backing-filename-format"),
        data_file=specific.get("data-file"),
        snapshots=len(answer.get("snapshots", ())),
        encrypted=bool(answer.get("encrypted")),
        corrupt=bool(specific.get("corrupt")),
    )


def _safe(path: Path) -> str:
    """The path as an argument: absolute, hence neither an option nor a `json:` or `nbd:` address (qemu(1))."""
    if not path.is_absolute():
        raise InternalError(f"qemu-img would not take {str(path)!r} for a file: the path is not absolute.")
    return str(path)


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    """A file that is there already is somebody's data: refuse it. One that was not finished is removed."""
    if path.exists():
        raise InvalidState(f"{path} is there already and is not overwritten.", path=str(path))
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
