"""What all ways of taking a snapshot share: the guest, the folder it goes to, and which of its disks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from worker.compute.local import LocalInstance, require_ours
from worker.context import Context
from worker.errors import InvalidSpec, SnapshotExists, UnsupportedByHost
from worker.images import snapshots
from worker.images.files import copy_durably, write_text_atomically
from worker.images.layout import SnapshotDir, boot
from worker.images.qcow2 import virtual_size
from worker.models import DiskFormat, Frozen, GuestDisk, Snapshot, SnapshotSpec, Taken, TakenDisk
from worker.virt.domain_xml import parse_nvram
from worker.virt.guest import Guest
from worker.virt.host import Host


@dataclass(frozen=True)
class Taking:
    """A snapshot that is being taken: of which guest, how, and into which folder. Its id is its operation's."""

    instance: LocalInstance
    spec: SnapshotSpec
    ctx: Context
    host: Host
    guest: Guest
    folder: SnapshotDir
    disks: Sequence[GuestDisk]
    left_out: Sequence[str] = ()
    """Disks that belong to all that was asked for, and cannot be taken."""

    @property
    def targets(self) -> list[str]:
        """Names of the disks, as the guest's definition has them."""
        return [disk.target for disk in self.disks]

    def recall(self) -> Taken | None:
        """What an earlier attempt caught, if it got as far as that since the host was started."""
        try:
            known = Taken.model_validate_json(self.folder.instant.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return known if known.boot == boot() else None

    def keep_definition(self) -> None:
        """Keep the guest's definition and UEFI variables as they are now."""
        xml = self.guest.xml(inactive=True)
        write_text_atomically(self.folder.definition, xml)
        nvram = parse_nvram(xml)
        if nvram and nvram.exists():
            copy_durably(nvram, self.folder.nvram, mode=0o400)

    def caught(self, **facts: Any) -> Taken:
        """Put down what was caught, for whoever takes over from a dead worker; no job outlasts the host's power."""
        notes = [*facts.pop("notes", ()), *(f"left out: {disk}, which is no file" for disk in self.left_out)]
        taken = Taken(boot=boot(), **facts, notes=tuple(dict.fromkeys(notes)))
        write_text_atomically(self.folder.instant, taken.model_dump_json())
        return taken

    def taken_disk(self, disk: GuestDisk, path: Path, form: DiskFormat) -> TakenDisk:
        """A disk's content at `path`, in `form`."""
        size = virtual_size(disk.path, format_of(disk))
        return TakenDisk(target=disk.target, role=disk.role, path=path, format=form, virtual_size=size)


@contextmanager
def taking(instance: LocalInstance, spec: SnapshotSpec, ctx: Context) -> Iterator[Taking]:
    """The instance's guest, locked and marked as this operation's. Raises InvalidSpec, NotOurs, UnsupportedByHost."""
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        guest.claim(instance.owner(ctx))
        folder = instance.local.data.unfinished_snapshot(ctx.operation)
        left_out = [] if spec.disks else guest.other_disks()
        yield Taking(instance, spec, ctx, host, guest, folder, chosen_disks(guest, spec), left_out)


def published(instance: LocalInstance, ctx: Context) -> Snapshot | None:
    """This operation's snapshot, if it is published already. Raises SnapshotExists when it is of another instance."""
    found = snapshots.find(instance.local.data, ctx.operation)
    if found and str(found.instance_uuid) != instance.uuid:
        raise SnapshotExists(
            f"operation_id: a snapshot {found.id} of {found.instance} ({found.instance_uuid}) is there already",
            field="operation_id",
            given=ctx.operation,
        )
    return found


def require_new(instance: LocalInstance, ctx: Context) -> None:
    """Raise SnapshotExists when there is a snapshot of this operation's id, of an earlier operation that was forgotten.

    To take it again would begin its checkpoint anew, and the next increment would lack what changed in between.
    """
    found = published(instance, ctx)
    if found:
        raise SnapshotExists(
            f"operation_id: a snapshot {found.id} was taken at {found.taken_at:%F %T} UTC already",
            hint=f"See it with: virtfleet snapshots --instance {found.instance}. For another one use another id.",
            field="operation_id",
            given=ctx.operation,
        )


def chosen_disks(guest: Guest, spec: SnapshotSpec) -> list[GuestDisk]:
    """The disks to take: those asked for, or all that the guest can write to but its swap. Raises InvalidSpec."""
    there = {disk.target: disk for disk in guest.disks()}
    writable = [target for target, disk in there.items() if not disk.readonly]
    unknown = [target for target in spec.disks if target not in writable]
    if unknown or not writable:
        raise InvalidSpec(
            f"disks: {guest.name} has {', '.join(writable) or 'none'} to take"
            f" (given: {', '.join(spec.disks) or 'all'})",
            field="disks",
            given=list(spec.disks),
            allowed=writable,
        )
    wanted = set(spec.disks or [target for target in writable if there[target].role != "swap"])
    return [there[target] for target in writable if target in wanted]


def format_of(disk: GuestDisk) -> DiskFormat:
    """The format of a guest's disk. Raises UnsupportedByHost for one that snapshots do not know."""
    if disk.format == "qcow2":
        return "qcow2"
    if disk.format == "raw":
        return "raw"
    raise UnsupportedByHost(
        f"disk {disk.target} is of format {disk.format}; snapshots are taken of qcow2 and raw disks",
        hint="Choose the disks to take with --disk.",
    )


def now() -> datetime:
    """The time, as manifests have it."""
    return datetime.now(UTC)


class Intent(Frozen):
    """What is being done to a guest that must be taken back; `released` when somebody else has done so."""

    name: str
    uuid: str
    host: str = ""
    """Where the guest is; several hosts may have this folder. Earlier versions did not say."""
    frozen: bool = False
    paused: bool = False
    released: bool = False


def note_intent(folder: SnapshotDir, intent: Intent) -> None:
    """Put down what is about to be done to the guest, for whoever has to take it back."""
    write_text_atomically(folder.intent, intent.model_dump_json())


def intent_of(folder: SnapshotDir) -> Intent | None:
    """What is being done to the guest, or what a dead attempt may have left done to it."""
    try:
        return Intent.model_validate_json(folder.intent.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
