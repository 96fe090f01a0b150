"""Catching a running guest: by a backup of all disks at one instant, or by mirrors that end together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from worker.compute.local import LocalInstance
from worker.compute.snapshots import chain, cold
from worker.compute.snapshots.clean import abandon
from worker.compute.snapshots.holding import Hold, held, let_go
from worker.compute.snapshots.jobs import give_way
from worker.compute.snapshots.taking import Taking, format_of, now, taking
from worker.context import Context
from worker.errors import (
    CheckpointMissing,
    FleetError,
    HypervisorError,
    InvalidState,
    JobLost,
    NoSpace,
    StateLockBusy,
    UnsupportedByHost,
)
from worker.images import qemu_img
from worker.images.files import available_space, human_size
from worker.images.qcow2 import virtual_size
from worker.images.writeback import written_out
from worker.models import MIB, DiskFormat, GuestDisk, SnapshotSpec, Taken, TakenDisk
from worker.stall import StallDeadline
from worker.virt.jobs import (
    NEEDS_BACKUP,
    NEEDS_SECTORS,
    NEEDS_SYNCHRONOUS_WRITES,
    UNLIMITED,
    BackupJob,
    BlockTarget,
    JobProgress,
    MirrorJob,
)

POLL = 0.01
"""Seconds between two looks at a job (a look costs 0.5 ms)."""

LOOK_AT_GUEST = 0.5
"""Seconds between two looks whether the guest stands still, as its disk is full."""

NO_CHAIN = "full instead of incremental: only backups are, for which this host's libvirt is too old"

OUT_OF_CHAIN = (
    "full instead of incremental, and no later one goes on from it: libvirt has lost sight of a backup of this guest,"
    " and lets no other one begin (virtfleet doctor says how to end that)"
)

LONG = 2.0
"""Seconds that a backup must have run to be known again when it has ended: a shorter one is soon made anew."""

COINCIDENCE = 0.5
"""Seconds that the end of a backup, as libvirt counts it, may be away from the last write to its files."""

CRAWL = MIB
"""Bytes per second until the guest is thawed: beside a copy at full speed its agent answered after 40 to 400 ms, on two
busy cores; beside one that crawls after 20 to 50."""


def take(instance: LocalInstance, spec: SnapshotSpec, ctx: Context) -> Taken:
    """Catch the guest as it runs; one that is off is left to extraction, as its disks hold still.

    A job that a dead attempt began is adopted when it is known what it shows, and else begun anew.
    Raises InvalidState when the guest stops meanwhile, QuiesceFailed, NoSpace, Stalled, UnsupportedByHost, and
    StateLockBusy while somebody else backs the guest up.
    """
    with taking(instance, spec, ctx) as this:
        this.folder.create()
        let_go(instance, this.folder)
        known = this.recall()
        if known is not None:  # whatever has become of the guest since
            return _by_backup(this, known) if known.method == "backup" else known
        if not this.guest.is_active():
            cold.require_off_will_do(this)
            return cold.take_off(this)
        return _by_mirror(this) if method(this) == "mirror" else _by_backup(this)


def method(this: Taking) -> str:
    """The way to take it that was asked for, or the best that the host can. Raises UnsupportedByHost."""
    can_back_up = this.host.libvirt_version >= NEEDS_BACKUP
    if this.spec.method == "backup" and not can_back_up:
        raise UnsupportedByHost(
            f"host {this.host.name} has libvirt {'.'.join(map(str, this.host.libvirt_version))};"
            f" backups need {'.'.join(map(str, NEEDS_BACKUP))}",
            hint="Use --method mirror.",
        )
    if this.spec.method == "mirror" or not can_back_up:
        return "mirror"
    return "mirror" if this.spec.method == "auto" and this.guest.has_lost_job() else "backup"


# --- backup -----------------------------------------------------------------------------------------------------------


def _by_backup(this: Taking, taken: Taken | None = None) -> Taken:
    job = BackupJob(this.guest)
    begun = taken or _begin_backup(this, job)
    try:
        if taken is not None:
            _require_sight(this, job, taken)
        _follow(this, [disk.path for disk in begun.disks], job.progress, lambda: job.progress() is None)
        job.require_success()
    except JobLost:
        abandon(this.guest, this.folder, this.ctx)
        raise
    except (InvalidState, HypervisorError) as error:
        _blame_power_off(this, error)
        raise
    return begun


def _require_sight(this: Taking, job: BackupJob, taken: Taken) -> None:
    """Raise JobLost unless the backup still runs, or is known again: libvirt tells how the last one ended, not whose
    it was."""
    if set(job.targets().values()) == {disk.path for disk in taken.disks}:
        return
    known = job.progress() is None and _is_known_again(job, taken)
    # A guest that is off, and of which libvirt tells no success, has taken its backup with it: that is told as such.
    if not known and (this.guest.is_active() or job.ran_for() > 0):
        raise JobLost(f"the backup of {this.guest.name} has ended while nobody saw how")


def _is_known_again(job: BackupJob, taken: Taken) -> bool:
    """Whether the last backup ended just when this one's files were written to last (measured: within 0.1 s)."""
    ran = job.ran_for()
    written = max(disk.path.stat().st_mtime for disk in taken.disks)
    return taken.began is not None and ran > LONG and abs(taken.began + ran - written) < COINCIDENCE


def _begin_backup(this: Taking, job: BackupJob) -> Taken:
    abandon(this.guest, this.folder, this.ctx)
    disks = _make_targets(this)
    targets = [BlockTarget(disk.target, disk.path, disk.format) for disk in disks]
    chain.sweep(this.guest, this.instance.local.data)
    link, speeds, power = chain.continue_from(this), _speeds(this), this.guest.power()
    this.keep_definition()
    this.guest.require_sight_of_job()
    if job.progress() is not None:  # libvirt would let this one wait for its end, the guest being frozen
        raise StateLockBusy(f"somebody else backs {this.guest.name} up; see: virsh domjobinfo {this.guest.name}")
    with held(this) as hold:  # as little as possible is done in here
        began = time.time()
        try:
            job.begin(targets, since=link.since, checkpoint=link.checkpoint)
        except CheckpointMissing as error:
            link, began = chain.broken(link, error.message), time.time()
            job.begin(targets, checkpoint=link.checkpoint)
        moment = now()
        if hold.frozen:
            job.limit(dict.fromkeys(this.targets, CRAWL))
    job.limit({disk: speeds.get(disk, UNLIMITED) for disk in this.targets})
    return this.caught(
        method="backup",
        taken_at=moment,
        power=power,
        **_achieved(hold, link.note),
        parent=link.parent,
        checkpoint=link.checkpoint,
        began=began,
        disks=disks,
    )


def _make_targets(this: Taking) -> tuple[TakenDisk, ...]:
    """An empty image for each disk; under its final name where nothing remains to be converted."""
    form: DiskFormat = "qcow2" if this.spec.compress else this.spec.format
    folder = this.folder
    paths = [folder.taken(disk) if this.spec.compress else folder.disk(disk, form) for disk in this.targets]
    disks = tuple(this.taken_disk(*one, form) for one in zip(this.disks, paths, strict=True))
    for disk in disks:
        qemu_img.create(disk.path, form, disk.virtual_size)
        disk.path.chmod(0o600)
    return disks


def _achieved(hold: Hold, *notes: str) -> dict[str, object]:
    return {
        "consistency": hold.consistency,
        "frozen_filesystems": hold.frozen,
        "held_seconds": round(hold.seconds, 3),
        "notes": tuple(filter(None, [hold.note, *notes])),
    }


# --- mirror -----------------------------------------------------------------------------------------------------------


def _by_mirror(this: Taking) -> Taken:
    jobs = [MirrorJob(this.guest, disk) for disk in this.targets]
    files = [this.folder.taken(disk) for disk in this.targets]
    if [job.target() for job in jobs] != files:
        abandon(this.guest, this.folder, this.ctx)
        speeds, synchronous = _speeds(this), _can_be_synchronous(this)
        for disk, job in zip(this.disks, jobs, strict=True):
            _begin_mirror(this, disk, job, speeds.get(disk.target), synchronous=synchronous)
    try:
        _follow(this, files, lambda: _total(jobs), lambda: _are_ready(this, jobs))
    except (InvalidState, HypervisorError) as error:
        _blame_power_off(this, error)
        raise
    power = this.guest.power()
    this.keep_definition()
    # Mirrors end one after the other: only a guest that stands still has all its disks at one instant.
    with held(this, pause=len(jobs) > 1) as hold:
        for job in jobs:
            job.end()
        moment = now()
    disks = tuple(this.taken_disk(disk, this.folder.taken(disk.target), "qcow2") for disk in this.disks)
    why = OUT_OF_CHAIN if this.host.libvirt_version >= NEEDS_BACKUP else NO_CHAIN
    notes = [why] * this.spec.incremental
    return this.caught(method="mirror", taken_at=moment, power=power, **_achieved(hold, *notes), disks=disks)


def _can_be_synchronous(this: Taking) -> bool:
    return this.host.libvirt_version >= NEEDS_SYNCHRONOUS_WRITES and this.guest.qemu_version() >= NEEDS_SECTORS


def _begin_mirror(this: Taking, disk: GuestDisk, job: MirrorJob, limit: int | None, *, synchronous: bool) -> None:
    path = this.folder.taken(disk.target)
    size = virtual_size(disk.path, format_of(disk))
    if disk.backing:
        backing_format: DiskFormat = "raw" if disk.backing_format == "raw" else "qcow2"
        make = qemu_img.create_delta if synchronous else qemu_img.create_overlay
        make(path, disk.backing, backing_format, size)
    else:
        qemu_img.create(path, "qcow2", size)
    job.begin(path, limit, synchronous=synchronous)


def _total(jobs: Sequence[MirrorJob]) -> JobProgress:
    parts = [part for part in (job.progress() for job in jobs) if part]
    return JobProgress(sum(part.done for part in parts), sum(part.total for part in parts))


def _are_ready(this: Taking, jobs: Sequence[MirrorJob]) -> bool:
    """Whether all mirrors are. Raises when one has ended by itself: libvirt does not keep why."""
    if all(job.is_ready() for job in jobs):
        return True
    for disk, job in zip(this.targets, jobs, strict=True):
        if job.target() is None:
            free = available_space(this.folder.path)
            kind = NoSpace if free < this.instance.local.settings.reserve_bytes else HypervisorError
            raise kind(f"the mirror of {disk} of {this.guest.name} broke off; {human_size(free)} are available")
    return False


def _blame_power_off(this: Taking, error: FleetError) -> None:
    """Raise InvalidState where the guest is off: its jobs end with it."""
    if this.guest.goes_off():
        raise InvalidState(f"{this.guest.name} is {this.guest.power()}, and its copy ended with it: {error}") from error


# --- both -------------------------------------------------------------------------------------------------------------


def _follow(
    this: Taking, files: Iterable[Path], progress: Callable[[], JobProgress | None], ended: Callable[[], bool]
) -> None:
    """Report the progress of a job, which writes to these files, until it has ended.

    Raises Stalled when it moves nothing for too long.
    """
    deadline = StallDeadline(f"the copy of {this.guest.name}", this.instance.local.settings.stall_timeout)
    looked_at = time.monotonic()
    with written_out(*files):
        while not ended():
            if time.monotonic() - looked_at > LOOK_AT_GUEST:
                looked_at = time.monotonic()
                _require_room(this)
            if (seen := progress()) is not None:
                this.ctx.progress(seen.done, seen.total, "copying")
            this.ctx.check()
            deadline.see(seen)
            time.sleep(POLL)


def _require_room(this: Taking) -> None:
    if this.guest.is_stopped_by_io_error():
        give_way(this.guest, this.folder)
        raise NoSpace(f"a disk of {this.guest.name} could not be written to: its snapshot gives way")


def _speeds(this: Taking) -> dict[str, int]:
    """The limit, shared out by size so that all disks are done at about the same time. Bytes per second."""
    if not this.spec.bytes_per_second:
        return {}
    sizes = {disk.target: virtual_size(disk.path, format_of(disk)) for disk in this.disks}
    return {disk: max(1, this.spec.bytes_per_second * size // sum(sizes.values())) for disk, size in sizes.items()}
