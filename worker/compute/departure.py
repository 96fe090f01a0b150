"""The side of a move that an instance leaves: described, set aside where nobody starts it by accident, put back."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog
from pydantic import Field

from worker.compute import cargo, disks
from worker.compute.local import LocalHost, LocalInstance, require_ours
from worker.compute.power import OFF
from worker.compute.provision import remove_domain
from worker.compute.resize import Plan as ResizePlan
from worker.compute.resize import refuse_shrinking, require_spec
from worker.context import Alone, Context
from worker.errors import ChecksumMismatch, InternalError, InvalidState, UnsupportedByHost
from worker.images import qemu_img
from worker.images.checksum import checksum_of, is_current
from worker.images.files import (
    allocated_size,
    bring_back_former,
    forget_former,
    keep_former,
    remove_tree,
    rename_folder,
    write_text_durably,
)
from worker.models import Disk, Frozen, Move, Network, NewSizes, PowerState, Sizes
from worker.virt.guest import Guest

log = structlog.get_logger(__name__)

NOTHING_NEW = NewSizes()


class Departure(Frozen):
    """What leaves: the domain as it was defined, what it did, and its files with their lengths while it still ran.

    `base` is the image in the host's cache that the root disk stands on; with `flatten` it is to stand alone there,
    and `flat` is how much more it takes then, at most.
    `probe` is what its directory was marked with. Sizes in bytes.
    """

    power: PowerState
    autostart: bool
    xml: str
    files: dict[str, int]
    spec_size: int
    allocated: int
    base: str | None
    base_size: int = 0
    base_allocated: int = 0
    flat: int = 0
    flatten: bool = False
    sizes: Sizes
    resized: bool
    networks: tuple[Network, ...]
    probe: str
    notes: tuple[str, ...] = ()


class Handover(Frozen):
    """Lies in both copies of an instance that has moved: which one counts, and what the other one is.

    `confirm_at`: see `worker.models.Move`. It is noted here since Redis may lose what it was asked to do later.
    `former`: where an earlier version kept what `keep_former` keeps now. `sealed`: there was a seal, see `break_seal`.
    """

    operation: str
    phase: Literal["moving", "moved"]
    authoritative: str
    leftover: str
    shared: bool
    departure: Departure
    digests: dict[str, str] = Field(default_factory=dict)
    confirm_at: float | None = None
    former: Handover | None = None
    sealed: bool = False


def describe(
    instance: LocalInstance, wanted: NewSizes, files: tuple[str, ...], ctx: Context, *, flatten: bool = False
) -> Departure:
    """What there is to move, while the guest runs on; marks its directory for `arrival.sees_our_storage`.

    Raises `InvalidState`, `InvalidSpec` (a disk would shrink), `NotOurs`, `UnsupportedByHost`, `NoSpace`.
    """
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        power, spec = _require_movable(instance, guest), require_spec(instance)
        disks.require_no_others(guest, folder, spec)
        before, root = Sizes.of(spec), disks.root(folder)
        base = root.backing
        refuse_shrinking(ResizePlan(before=before, after=wanted.after(before), power=power), root.virtual_size)
        if files != folder.files():
            raise InvalidState(
                f"{instance.name} has the files {', '.join(folder.files())}, but the fleet knows of {', '.join(files)}",
                hint=f"Have the host looked through: virtfleet hosts sync {instance.local.name}",
            )
        cached = base is not None and base.parent == instance.local.data.images
        flatten = base is not None and (flatten or not cached)
        if flatten:
            cargo.require_room_to_flatten(folder, instance.local.settings.reserve_bytes)
        ctx.undo("forget_probe", uuid=instance.uuid)
        probe = secrets.token_hex(16)
        write_text_durably(folder.probe(ctx.operation), probe)
        return Departure(
            power=power,
            autostart=guest.autostart(),
            xml=host.pinned_xml(guest),
            files={name: (folder.path / name).stat().st_size for name in files},
            spec_size=folder.spec.stat().st_size,
            allocated=sum(allocated_size(folder.path / name) for name in files),
            base=base.name if base else None,
            base_size=base.stat().st_size if base else 0,
            base_allocated=allocated_size(base) if base else 0,
            flat=max(0, _flat_size(root) - allocated_size(root.path)) if base else 0,
            flatten=flatten,
            sizes=wanted.after(before),
            resized=wanted.after(before) != before,
            networks=spec.networks,
            probe=probe,
            notes=tuple(_staying_behind(guest)),
        )


def _staying_behind(guest: Guest) -> Iterator[str]:
    """What only this libvirt knows of the guest."""
    for name in guest.checkpoints():
        yield f"checkpoint {name} is not taken along"
    for name in guest.snapshots():
        yield f"libvirt's own snapshot {name} is not taken along"


def _flat_size(disk: Disk) -> int:
    return qemu_img.measure(disk.path, disk.format, disk.format)


def _require_movable(instance: LocalInstance, guest: Guest) -> PowerState:
    power = guest.power()
    if power is PowerState.SAVED:
        raise InvalidState(
            f"{instance.name} is off with its memory saved, which only this host can go on with",
            hint=f"Let it go on first: virtfleet power on {instance.name}",
        )
    nvram = guest.nvram()
    if nvram is not None and nvram != instance.folder.nvram:
        raise UnsupportedByHost(
            f"{instance.name} has its UEFI variables in {nvram}, outside its folder: they would stay behind",
            hint=f"Power it off, copy them to {instance.folder.nvram}, and name that file in <nvram>: virsh edit",
        )
    return power


def forget_probe(instance: LocalInstance, operation: str) -> None:
    """Take the mark away again."""
    for folder in (instance.folder, instance.local.data.aside(instance.uuid)):
        folder.probe(operation).unlink(missing_ok=True)


def set_aside(instance: LocalInstance, handover: Handover, ctx: Context) -> None:
    """Keep a stopped instance's copy where nothing starts it: under another name, which its domain does not know.

    On shared storage there is one copy, so the domain itself goes; `handover` holds its definition.
    """
    ctx.undo("put_back", name=instance.name, uuid=instance.uuid)
    aside = instance.aside
    if not handover.shared and aside.folder.spec.exists():
        return
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None:
            guest.claim(instance.owner(ctx))
            if guest.power() not in OFF:
                raise InvalidState(
                    f"{instance.name} is {guest.power()}: it cannot be set aside", hint="Who started it?"
                )
        # Before anything changes: it says what the domain was.
        note(instance, _keeping_note_of_before(instance, handover))
        if guest is not None:
            guest.set_autostart(enabled=False)
        folder.probe(ctx.operation).unlink(missing_ok=True)
        if not handover.shared:
            rename_folder(folder.path, aside.folder.path)
        elif guest is not None:
            guest.undefine(keep_nvram=True)


def put_back(instance: LocalInstance, ctx: Context, *, keep_note: bool = False) -> Handover | None:
    """Bring a copy that was set aside back to its place, its domain as it was; what was noted about it.

    `keep_note` is for the copy that an earlier operation set aside: it does not count before it has been started.
    """
    aside = instance.aside
    if aside.folder.spec.exists():
        _clear_place(instance)
        with aside.owned(ctx):
            rename_folder(aside.folder.path, instance.folder.path)
    handover = handover_of(instance)
    if handover is None or (handover.operation != ctx.operation and not keep_note):
        forget_former(_note_of(instance))
        return None  # this operation has not come to setting it aside
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        folder.forget_flat()
        if not keep_note:
            folder.seal.unlink(missing_ok=True)
        guest = host.find_uuid(instance.uuid) or host.restore(handover.departure.xml, instance.owner(ctx))
        guest.claim(instance.owner(ctx))
        guest.set_autostart(enabled=handover.departure.autostart)
        if not keep_note and not bring_back_former(_note_of(instance)):
            note(instance, handover.former)
    return handover


def _clear_place(instance: LocalInstance) -> None:
    """Remove what a look at the place may have left there: an empty folder with its lock."""
    folder = instance.folder
    if folder.files():
        raise InternalError(
            f"{folder.path} and {instance.aside.folder.path} both hold disks of {instance.name}: neither is touched"
        )
    remove_tree(folder.path, instance.local.data.instances)


def handover_of(instance: LocalInstance) -> Handover | None:
    """What is noted about the move that this host's copy was part of."""
    try:
        return Handover.model_validate_json(_note_of(instance).read_text())
    except FileNotFoundError:
        return None


def note(instance: LocalInstance, handover: Handover | None) -> None:
    """Put down beside this host's copy which one counts; None: there is only this one."""
    path = _note_of(instance)
    if handover is None:
        path.unlink(missing_ok=True)
    elif handover != handover_of(instance):  # to say the same again needs no space
        write_text_durably(path, handover.model_dump_json(), 0o600)


def _keeping_note_of_before(instance: LocalInstance, handover: Handover) -> Handover:
    noted = handover_of(instance)
    if noted is None or noted.operation != handover.operation:
        keep_former(_note_of(instance))
        return handover
    return handover.model_copy(update={"former": noted.former})  # this operation has been here before


def _note_of(instance: LocalInstance) -> Path:
    return instance.folder.handover(instance.local.name)


def counts_here(local: LocalHost, name: str, uuid: str) -> bool:
    """Whether this host's copy is the one that counts, set aside or not; two hosts may have one during a move."""
    instance = LocalInstance(local, name, uuid)
    noted = handover_of(instance.aside) or handover_of(instance)
    return noted is None or noted.authoritative == local.name


def release(instance: LocalInstance, handover: Handover, ctx: Context) -> None:
    """Acknowledge, on the host that was left, that its copy does not count any more."""
    if handover.shared:
        with instance.owned(ctx):
            note(instance, handover)
        return
    with instance.aside.owned(ctx) as folder:
        folder.forget_flat()
        folder.seal.touch(mode=0o600)
        note(instance.aside, handover.model_copy(update={"sealed": True}))


def break_seal(instance: LocalInstance, ctx: Context) -> None:
    """The guest is about to run on the copy that was set aside: what was noted of its content holds no more."""
    with instance.owned(ctx) as folder:
        folder.seal.unlink(missing_ok=True)


def move_of(local: LocalHost, name: str, uuid: str) -> Move | None:
    """The move that brought the instance here and is not confirmed yet."""
    found = handover_of(LocalInstance(local, name, uuid))
    if found is None or found.phase == "moving" or found.authoritative != local.name:
        return None
    return Move(
        operation=found.operation,
        authoritative=found.authoritative,
        leftover=found.leftover,
        shared=found.shared,
        confirm_at=found.confirm_at,
    )


def back_home(instance: LocalInstance, ctx: Context) -> PowerState:
    """`put_back`, and what the guest does then."""
    put_back(instance, ctx)
    with instance.local.libvirt() as host:
        return host.guest(instance.uuid).power()


def set_aside_again(instance: LocalInstance, migration: str, counts: str, ctx: Context) -> None:
    """Take back a `put_back`: this host's copy may have run, but the one on host `counts` is what counts."""
    handover = handover_of(instance)
    if handover is None:
        return
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None:
            guest.check_fence(instance.owner(ctx))
            guest.destroy()
    was = {"operation": migration, "phase": "moved", "authoritative": counts, "leftover": instance.local.name}
    set_aside(instance, handover.model_copy(update=was), Alone(ctx.operation, ctx.fence))


def prove_aside(instance: LocalInstance, migration: str, ctx: Context) -> Handover:
    """Make sure that the copy that is set aside is still what it was. Raises `InvalidState`, `ChecksumMismatch`.

    One that has run since, for a revert that was undone, only has to be sound.
    """
    folder = instance.aside.folder
    handover = handover_of(instance.aside) or handover_of(instance)
    if handover is None or handover.operation != migration:
        raise InvalidState(f"host {instance.local.name} keeps no copy of {instance.name} from migration {migration}")
    if handover.shared:
        return handover
    ran = handover.sealed and not folder.seal.exists()
    for name in handover.departure.files:
        wanted = None if ran else handover.digests.get(name)
        _prove(folder.path / name, wanted, instance.local.settings.stall_timeout, ctx)
    return handover


def _prove(path: Path, wanted: str | None, stall: float, ctx: Context) -> None:
    hint = "Keep the instance where it is now, or look into that file first."
    if wanted is None:
        log.warning("not compared: the guest has run on it since", path=str(path))
        if path.suffix == ".qcow2" and qemu_img.check(path, "qcow2", watch=ctx, stall=stall).corruptions:
            raise ChecksumMismatch(f"{path} is damaged", hint=hint)
    elif not is_current(wanted):
        log.warning("not compared: its checksum is of a kind of before", path=str(path))
    elif checksum_of(path, ctx) != wanted:
        raise ChecksumMismatch(f"{path} is not what it was when the instance left: it has changed", hint=hint)


def remove_aside(instance: LocalInstance, migration: str, ctx: Context) -> bool:
    """Remove a copy that was set aside, and its domain; False when it is gone."""
    folder = instance.aside.folder
    handover = handover_of(instance.aside)
    if handover is None and not folder.spec.exists():
        _remove_rest(instance)
        return False
    if handover is None or handover.operation != migration or handover.authoritative == instance.local.name:
        raise InvalidState(f"{folder.path} is not from migration {migration}: it is left alone")
    with instance.aside.owned(ctx), instance.local.libvirt():  # both can be had: nobody is kept waiting from now on
        ctx.make_irrevocable()
    remove_domain(instance.aside, ctx)
    with instance.aside.owned(ctx):
        for path in set(folder.path.iterdir()) - {*folder.handovers(), folder.lock}:
            remove_tree(path, folder.path)  # the note goes last: by it a second attempt knows what it may remove
        remove_tree(folder.path, instance.local.data.instances)
    log.info("removed the copy that was set aside", instance=instance.name, path=str(folder.path))
    return True


def _remove_rest(instance: LocalInstance) -> None:
    """Remove the folder that one who died had all but removed: its note had gone already."""
    folder = instance.aside.folder
    if folder.path.exists() and not folder.files():
        remove_tree(folder.path, instance.local.data.instances)
