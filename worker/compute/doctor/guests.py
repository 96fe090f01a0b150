"""The fleet's domains on a host: persistent, with all their files, and free of jobs that nobody follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from worker.compute.departure import counts_here
from worker.compute.doctor import leftovers
from worker.compute.local import LocalHost
from worker.context import Alone
from worker.errors import GuestHung, InstanceNotFound, NotOurs, StateLockBusy
from worker.findings import Severity, Suspect, suspect
from worker.images import snapshots
from worker.images.files import locked
from worker.models import Owner
from worker.virt.guest import Guest
from worker.virt.jobs import BackupJob, MirrorJob

BACKED_UP = "its disks"


def examine(local: LocalHost, guest: Guest, *, has_files: bool) -> Iterator[Suspect]:
    """What is wrong with a domain, if it is the fleet's; foreign ones are left alone."""
    try:
        owner = guest.owner()
        if owner is not None:
            yield from _examine(local, guest, owner, has_files=has_files)
    except InstanceNotFound:
        return  # destroyed while it was looked at
    except (GuestHung, StateLockBusy) as error:
        what, remedy = f"domain {guest.name!r} could not be examined to the end: {error.message}", error.hint
        yield suspect(Severity.ERROR, error.code, what, where=guest.name, remedy=remedy)
    except NotOurs as error:
        yield suspect(
            Severity.WARNING,
            "damaged_mark",
            f"domain {guest.name!r}: {error.message}",
            where=guest.name,
            remedy=f"Correct <virtfleet:instance>: virsh edit {guest.name}",
        )


def _examine(local: LocalHost, guest: Guest, owner: Owner, *, has_files: bool) -> Iterator[Suspect]:
    owners: list[object] = [guest.uuid, owner.name]
    yield from _transient(local, guest, owners)
    yield from _not_counting(local, guest, owner, owners)
    yield from _jobs(local, guest, owners)
    yield from _checkpoints(local, guest, owners)
    if has_files and not local.data.aside(guest.uuid).path.exists():
        yield from _missing(guest, owners)
        yield from leftovers.unknown_in(local.data.instance(guest.uuid), guest.files(), owners)


def _not_counting(local: LocalHost, guest: Guest, owner: Owner, owners: list[object]) -> Iterator[Suspect]:
    if not guest.is_active() or counts_here(local, owner.name, str(guest.uuid)):
        return
    yield suspect(
        Severity.ERROR,
        "runs_where_it_does_not_count",
        f"domain {guest.name!r} runs here, but by what was noted as it moved the copy on another host counts",
        where=guest.name,
        remedy=f"See where it belongs: virtfleet instances. If it runs there, take it off here at once: virsh destroy"
        f" {guest.name}",
        owners=owners,
    )


def _transient(local: LocalHost, guest: Guest, owners: list[object]) -> Iterator[Suspect]:
    if guest.is_persistent():
        return
    yield suspect(
        Severity.ERROR,
        "transient_domain",
        f"domain {guest.name!r} is transient: its definition is lost as soon as the guest is off",
        where=guest.name,
        remedy="virtfleet doctor --fix defines it as it runs.",
        owners=owners,
        repair=partial(_define, local, guest),
    )


def _define(local: LocalHost, seen: Guest) -> None:
    with _alone(local, seen), local.libvirt() as host:
        guest = host.guest(seen.uuid)
        if not guest.is_persistent():
            host.define_xml(guest.xml(inactive=True), name=guest.name)


def _jobs(local: LocalHost, guest: Guest, owners: list[object]) -> Iterator[Suspect]:
    jobs = guest.block_jobs()
    if guest.has_lost_job():
        yield suspect(
            Severity.ERROR,
            "lost_backup",
            f"libvirt holds domain {guest.name!r} in a backup of which it knows nothing, and lets neither another one"
            " begin nor its memory be saved; a guest that is powered off then does not start again",
            where=guest.name,
            remedy=guest.lost_job_remedy(),
            owners=owners,
        )
    elif guest.has_backup():
        jobs[BACKED_UP] = "backup"
    for target, kind in jobs.items():
        ours = _is_ours(local, guest, target)
        yield suspect(
            Severity.WARNING if ours else Severity.INFO,
            "stray_job" if ours else "foreign_job",
            f"a {kind} job runs on {target} of domain {guest.name!r},"
            f" {'and no operation follows it' if ours else 'which the fleet has not begun'}",
            where=f"{guest.name}: {target}",
            remedy="virtfleet doctor --fix ends it and leaves the guest on its disks."
            if ours
            else f"Let it be if you or a backup program began it; else end it: {_by_hand(guest, target)}",
            owners=owners,
            repair=partial(_abort, local, guest, target) if ours else None,
        )


def _is_ours(local: LocalHost, guest: Guest, target: str) -> bool:
    """Whether a job writes into a snapshot of the fleet."""
    files = BackupJob(guest).targets().values() if target == BACKED_UP else [MirrorJob(guest, target).target()]
    return any(path is not None and path.is_relative_to(local.data.snapshots) for path in files)


def _by_hand(guest: Guest, target: str) -> str:
    if target == BACKED_UP:
        return f"virsh domjobabort {guest.name}"
    return f"virsh blockjob {guest.name} {target} --abort"


def _abort(local: LocalHost, seen: Guest, target: str) -> None:
    with _alone(local, seen), local.libvirt() as host:
        guest = host.guest(seen.uuid)
        if target == BACKED_UP:
            BackupJob(guest).end(Alone())
        else:
            guest.abort_block_job(target)


def _checkpoints(local: LocalHost, guest: Guest, owners: list[object]) -> Iterator[Suspect]:
    known = {one.checkpoint for one in snapshots.every(local.data)}
    for name in guest.checkpoints():
        if name in known:
            continue
        yield suspect(
            Severity.WARNING,
            "unknown_checkpoint",
            f"domain {guest.name!r} has a checkpoint {name!r} that belongs to no snapshot of the fleet",
            where=f"{guest.name}: {name}",
            remedy=f"If no backup program needs it: virsh checkpoint-delete {guest.name} {name}",
            owners=owners,
        )


def _missing(guest: Guest, owners: list[object]) -> Iterator[Suspect]:
    for path in sorted(guest.files()):
        if path.exists():
            continue
        held = guest.is_active() and path in guest.disk_paths().values()
        hold_on = "The running guest still has it open: leave it on, and copy its data out of the guest first. "
        yield suspect(
            Severity.ERROR,
            "missing_file",
            f"a disk of domain {guest.name!r} is not there" + (", but the guest still runs on it" if held else ""),
            where=path,
            remedy=f"{hold_on if held else ''}Put the file back from a backup, or, if the guest is lost:"
            f" virtfleet destroy {guest.name}",
            owners=owners,
        )


def _alone(local: LocalHost, guest: Guest) -> AbstractContextManager[object]:
    """The instance's lock, if it has a folder. Raises `InstanceLocked` while somebody works on it."""
    folder = local.data.instance(guest.uuid)
    return locked(folder.lock, operation="doctor") if folder.path.is_dir() else nullcontext()
