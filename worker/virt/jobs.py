"""Block jobs of a running guest: the backup of several disks at one instant, and mirrors of single disks.

They live in QEMU: they outlast the worker and libvirtd, and end with the guest. That a job is gone says nothing of how
it ended, so success is only what libvirt's statistics of the last job call so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import libvirt
from lxml import etree
from lxml.builder import ElementMaker  # type: ignore[import-not-found]  # lxml-stubs lacks it
from tenacity import Retrying, retry_if_exception, stop_after_attempt

from worker.context import Watcher
from worker.errors import HypervisorError, InvalidState, JobLost, NoSpace, UnsupportedByHost
from worker.models import DiskFormat
from worker.stall import StallDeadline
from worker.virt.domain_xml import parse
from worker.virt.faults import translated
from worker.virt.guest import Guest

if TYPE_CHECKING:
    from lxml.etree import _Element

NEEDS_BACKUP = (7, 2, 0)
"""libvirt's news: backups are on by default since then; before, QEMU's part of them was experimental."""

KNOWS_BACKUP = (6, 0, 0)
"""libvirt's news: one can ask for backups since then. An older one has none, and does not know the calls."""

NEEDS_LASTING_MIRROR = (3, 5, 0)
"""libvirt's news: a guest that stays defined can be mirrored since then (VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)."""

NEEDS_SYNCHRONOUS_WRITES = (8, 0, 0)
"""libvirt's news: mirrors can have a guest's writes wait for the copy since then."""

NEEDS_SECTORS = (5, 2)
"""QEMU's change log: an image can be allocated by the sector since then (qcow2's extended L2 entries)."""

NEEDS_NO_LOCKS = (9, 0)
"""QEMU's change log: block jobs and their iothreads do without the AioContext lock since then."""

UNLIMITED = 0
"""A job's speed that is none, in QEMU's words."""

MAY_REST = 60.0
"""Seconds in which a backup that is to end may move nothing: what is on its way to the disk must arrive first."""

_POLL = 0.1  # seconds

_ROUNDED = 0.001  # seconds: libvirt counts whole milliseconds

_LEFTOVERS = 20
"""Nodes that a libvirtd which was killed as it began a job may have left in QEMU; it counts on past one each time."""

_TAKEN = re.compile(r"Duplicate nodes with node-name|Job ID '.*' already in use")

_BACKUP = libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
# Files that libvirt makes itself are made one after the other while a frozen guest waits (two disks: 0.7 s, not 0.3 s).
_BEGIN_FLAGS = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
_MIRROR_FLAGS = (
    libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
    | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    # Without it libvirt asks that the guest be undefined first, and a guest that then powers off is lost.
    | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
)


class _Maker(Protocol):
    def __call__(self, tag: str, *children: object, **attributes: str) -> _Element: ...


E: _Maker = ElementMaker()


@dataclass(frozen=True)
class BlockTarget:
    """A disk of the guest and the file its content goes to."""

    disk: str
    path: Path
    format: DiskFormat


@dataclass(frozen=True)
class JobProgress:
    """How far a job is, in bytes."""

    done: int
    total: int


class BackupJob:
    """The backup job of a guest; there is at most one at a time.

    What this object has seen running it knows again when it has ended: by how long it ran, at least.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._first_seen: float | None = None
        self._seen_for = 0.0  # seconds

    def _trying_to(self, verb: str) -> AbstractContextManager[None]:
        return translated(f"{verb} {self._guest.name}", self._guest.host)

    def begin(self, targets: Sequence[BlockTarget], *, since: str | None = None, checkpoint: str | None = None) -> None:
        """Begin to copy disks as they are at this instant, each to an empty image of its size; returns at once.

        `since` names a checkpoint: only what changed after it is copied. `checkpoint` makes one of this instant.
        Raises CheckpointMissing, StateLockBusy while another job runs, UnsupportedByHost.
        """
        self._guest.require_sight_of_job()
        self.forget_outcome()
        chosen = {target.disk: target for target in targets}
        every = [disk.target for disk in self._guest.disks()]
        backup = _text(_backup_xml(every, chosen, since))
        marked = _text(_checkpoint_xml(every, chosen, checkpoint)) if checkpoint else None
        with self._trying_to("back up"):
            _past_leftovers(self._guest.domain.backupBegin, backup, marked, _BEGIN_FLAGS)
        self._first_seen, self._seen_for = time.monotonic(), 0.0

    def targets(self) -> dict[str, Path]:
        """Disk and file of each disk that the running job copies; empty when no backup runs."""
        if self._guest.libvirt_version < KNOWS_BACKUP:
            return {}
        try:
            with self._trying_to("look at the backup of"):
                xml = str(self._guest.domain.backupGetXMLDesc(0))
        except InvalidState:  # no backup runs, or the guest is off
            return {}
        found = parse(xml).iterfind("./disks/disk[@backup='yes']")
        return {str(disk.get("name")): Path(_file_of(disk, "target")) for disk in found}

    def progress(self) -> JobProgress | None:
        """How far the backup is; None when none runs."""
        asked_at = time.monotonic()
        job = self._guest.job_stats()
        if not job.get("type") or job.get("operation") != _BACKUP:
            return None
        self._first_seen = self._first_seen or time.monotonic()
        self._seen_for = max(self._seen_for, asked_at - self._first_seen)
        return JobProgress(int(job.get("disk_processed", 0)), int(job.get("disk_total", 0)))

    def require_success(self) -> None:
        """Raise unless the last job of the guest was a backup that ended well; asking again gives the same answer.

        One that ran for less time than a backup was seen running here is another one, of somebody else.
        Raises NoSpace, InvalidState when the guest stopped, JobLost when libvirtd forgot it as it restarted,
        HypervisorError.
        """
        ended = self._ended()
        doing = f"the backup of {self._guest.name} on host {self._guest.host}"
        if "time_elapsed" in ended and ended["time_elapsed"] / 1000 + _ROUNDED < self._seen_for:
            raise JobLost(f"{doing} has ended, and another job after it: libvirt does not know how the first one did")
        if ended.get("operation") == _BACKUP and ended.get("success") is True:
            return
        if reason := ended.get("errmsg"):
            raise (NoSpace if "No space left" in reason else HypervisorError)(f"{doing} failed: {reason}")
        if not self._guest.is_active():
            raise InvalidState(f"{doing} was cut off: the guest is {self._guest.power()}")
        raise JobLost(f"{doing} has ended, and libvirt does not know how")

    def ran_for(self) -> float:
        """Seconds that the guest's last job ran, if it was a backup that ended well, whoever began it; else 0."""
        ended = self._ended()
        went_well = ended.get("operation") == _BACKUP and ended.get("success") is True
        return float(ended.get("time_elapsed", 0)) / 1000 if went_well else 0.0

    def _ended(self) -> dict[str, Any]:
        flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
        with self._trying_to("learn how the backup ended of"):
            return dict(self._guest.domain.jobStats(flags))

    def forget_outcome(self) -> None:
        """Forget how earlier jobs ended, so that no success of theirs is taken for one of ours."""
        with self._trying_to("forget the last job of"):
            self._guest.domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)

    def end(self, watch: Watcher) -> None:
        """End the backup before its time, and wait until it has; what it wrote is good for nothing. None is success.

        Where an abort could take the guest with it, the backup runs to its end instead, as fast as it can.
        Raises Stalled, and what `watch` raises.
        """
        disks = self.targets()
        if self.survives_abort(disks):
            self._guest.abort_job()
        else:
            self.limit(dict.fromkeys(disks, UNLIMITED))
        deadline = StallDeadline(f"the backup of {self._guest.name}, which is to end,", MAY_REST)
        while (seen := self.progress()) is not None:
            watch.progress(seen.done, seen.total, "waiting for the backup to end")
            deadline.see(seen)
            time.sleep(_POLL)

    def survives_abort(self, disks: Iterable[str]) -> bool:
        """Whether QEMU is known to come through it.

        QEMU 7.2 has died of it (`qemu_mutex_unlock_impl: Operation not permitted`), twice in some hundred aborts, with
        several disks in an iothread: never with one disk, nor without iothreads. QEMU 9.0 has no such lock any more.
        """
        threads = parse(self._guest.xml()).iterfind("./devices/*/driver[@iothread]")
        return len(list(disks)) < 2 or next(threads, None) is None or self._guest.qemu_version() >= NEEDS_NO_LOCKS

    def limit(self, bytes_per_second: Mapping[str, int]) -> None:
        """Bound how fast each disk is copied; empty parts count, too. A disk that is done already is passed over."""
        for disk, speed in bytes_per_second.items():
            _set_speed(self._guest, disk, speed)


def _past_leftovers(call: Callable[..., Any], *arguments: Any) -> None:
    """Make a call again while its new nodes' or jobs' names are taken in QEMU: libvirt gives others the next time."""
    attempts = Retrying(
        retry=retry_if_exception(lambda error: bool(_TAKEN.search(str(error)))),
        stop=stop_after_attempt(_LEFTOVERS),
        reraise=True,
    )
    attempts(call, *arguments)


class MirrorJob:
    """The mirror of one disk: after a first copy, what the guest writes goes to both until the mirror is ended."""

    def __init__(self, guest: Guest, disk: str) -> None:
        self._guest, self._disk = guest, disk

    def _trying_to(self, verb: str) -> AbstractContextManager[None]:
        return translated(f"{verb} {self._disk} of {self._guest.name}", self._guest.host)

    def begin(self, target: Path, bytes_per_second: int | None = None, *, synchronous: bool = False) -> None:
        """Mirror the disk's top layer to a qcow2 file that was made for it, on the same backing file.

        A guest that writes faster than is copied keeps it from ever being ready, unless it is `synchronous`: the
        guest's writes go to both then, and are as slow as the slower one (VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES).
        libvirt opens the file without what it builds on: it must not have to be filled up from there.
        Raises UnsupportedByHost where libvirt would need the guest to be undefined for this.
        """
        if (version := self._guest.libvirt_version) < NEEDS_LASTING_MIRROR:
            raise UnsupportedByHost(
                f"host {self._guest.host} has libvirt {'.'.join(map(str, version))};"
                f" mirrors need {'.'.join(map(str, NEEDS_LASTING_MIRROR))}",
                hint="Use --method cold.",
            )
        flags = _MIRROR_FLAGS | (libvirt.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES if synchronous else 0)
        parameters = {} if bytes_per_second is None else {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: bytes_per_second}
        xml = _text(self._target_xml(target))
        with self._trying_to("mirror"):
            _past_leftovers(self._guest.domain.blockCopy, self._disk, xml, parameters, flags)

    def target(self) -> Path | None:
        """The file the disk is mirrored to, if it is."""
        mirror = self._mirror()
        return Path(_file_of(mirror, "source")) if mirror is not None else None

    def is_ready(self) -> bool:
        """Whether the file has become equal to the disk and stays so."""
        mirror = self._mirror()
        return mirror is not None and mirror.get("ready") == "yes"

    def progress(self) -> JobProgress | None:
        """How far the mirror is; None when there is none."""
        with self._trying_to("follow the mirror of"):
            job = self._guest.domain.blockJobInfo(self._disk)
        return JobProgress(int(job["cur"]), int(job["end"])) if job else None

    def end(self) -> None:
        """End the mirror: if it was ready, its file holds the disk as it is now. Raises InvalidState if there is none.

        A ready mirror is drained, which takes milliseconds; libvirt answers when the file is closed.
        """
        with self._trying_to("end the mirror of"):
            self._guest.domain.blockJobAbort(self._disk)

    def _mirror(self) -> _Element | None:
        disks = parse(self._guest.xml()).iterfind("./devices/disk")
        for disk in disks:
            target = disk.find("target")
            if target is not None and target.get("dev") == self._disk:
                return disk.find("mirror")
        return None

    def _target_xml(self, target: Path) -> _Element:
        disk = next(disk for disk in self._guest.disks() if disk.target == self._disk)
        backing = E("backingStore")
        if disk.backing:
            # The base is shared: a relabelled one would belong to QEMU's user.
            source = E("source", E("seclabel", model="dac", relabel="no"), file=str(disk.backing))
            form = E("format", type=disk.backing_format or "qcow2")
            backing = E("backingStore", form, source, E("backingStore"), type="file")
        return E("disk", E("driver", type="qcow2"), E("source", file=str(target)), backing, type="file")


def _backup_xml(every: Iterable[str], chosen: Mapping[str, BlockTarget], since: str | None) -> _Element:
    disks = E("disks", *(_backup_disk(disk, chosen.get(disk)) for disk in every))
    parts = [E("incremental", since), disks] if since else [disks]
    return E("domainbackup", *parts, mode="push")


def _backup_disk(disk: str, target: BlockTarget | None) -> _Element:
    if target is None:
        return E("disk", name=disk, backup="no")
    file = E("target", file=str(target.path))
    return E("disk", file, E("driver", type=target.format), name=disk, backup="yes", type="file")


def _checkpoint_xml(every: Iterable[str], chosen: Mapping[str, BlockTarget], name: str) -> _Element:
    marks = [E("disk", name=disk, checkpoint="bitmap" if disk in chosen else "no") for disk in every]
    return E("domaincheckpoint", E("name", name), E("disks", *marks))


def _set_speed(guest: Guest, disk: str, bytes_per_second: int) -> None:
    flags = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
    try:
        with translated(f"limit the copy of {disk} of {guest.name}", guest.host):
            guest.domain.blockJobSetSpeed(disk, bytes_per_second, flags)
    except InvalidState:
        return  # done already
    except HypervisorError as error:
        if error.details.get("libvirt_code") != libvirt.VIR_ERR_INVALID_ARG:  # no job on that disk
            raise


def _file_of(element: _Element, name: str) -> str:
    source = element.find(name)
    return str(source.get("file")) if source is not None else ""


def _text(element: _Element) -> str:
    return etree.tostring(element, encoding="unicode")
