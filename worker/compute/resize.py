"""Resize on the same host: a stopped guest gets other sizes, and can get its old ones back until it has run with them.

What the instance was lies beside its disks (`.before-resize.json`) from before the first change until the guest has
been started with the new sizes, its CPUs still stopped; so do its former spec and swap disk (`*.former`). As long as
that file is there nothing in the guest has seen a new disk, so shrinking it again loses nothing; once it is gone, there
is nothing to take back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path

import structlog

from worker.compute import disks
from worker.compute.local import LocalInstance, require_ours
from worker.compute.power import OFF
from worker.compute.provision import METADATA_BYTES, domain_config, spec_of
from worker.context import Context
from worker.errors import InvalidSpec, InvalidState
from worker.images import qemu_img
from worker.images.files import (
    bring_back_former,
    keep_former,
    replace_json,
    require_space,
    size_of,
    write_text_durably,
)
from worker.images.layout import InstanceDir
from worker.images.swap import make_swap
from worker.models import GIB, MIB, DiskSet, Frozen, InstanceSpec, NewSizes, PowerState, Sizes
from worker.virt.guest import Guest
from worker.virt.host import Host

log = structlog.get_logger(__name__)

RUNS = (PowerState.RUNNING, PowerState.PAUSED)


class Plan(Frozen):
    """What a resize changes, and what the guest was doing before."""

    before: Sizes
    after: Sizes
    power: PowerState

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.before != self.after


class Before(Frozen):
    """What an instance was: its definition, its spec, and the virtual size of each growing disk in bytes."""

    operation: str
    xml: str
    spec: InstanceSpec
    disks: dict[str, int]


# --- before anything is touched ---------------------------------------------------------------------------------------


def plan(instance: LocalInstance, wanted: NewSizes, ctx: Context) -> Plan:
    """What there is to do; refuses what cannot be done.

    Raises `InvalidSpec` (a disk would shrink or go), `InvalidState` (memory is saved), `NoSpace`, `NotOurs`,
    `UnsupportedByHost` (it has other disks than the fleet gave it).
    """
    ctx.check()
    spec = require_spec(instance)
    with instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        power = guest.power()
        _refuse_saved(instance, power)
        disks.require_no_others(guest, instance.folder, spec)
        before = Sizes.of(spec)
        found = Plan(before=before, after=wanted.after(before), power=power)
        if found.after.vcpus > before.vcpus:
            host.domain_capabilities(guest.accel()).require_vcpus(found.after.vcpus)
        if found.after.memory_mib > before.memory_mib:
            host.require_memory(found.after.memory_mib)
    refuse_shrinking(found, disks.root(instance.folder).virtual_size)
    require_space(instance.folder.path, METADATA_BYTES, instance.local.settings.reserve_bytes)
    return found


def require_spec(instance: LocalInstance) -> InstanceSpec:
    """What the instance is made of. Raises `InvalidState` where its directory does not say."""
    spec = spec_of(instance.local, instance.uuid)
    if spec is None:
        raise InvalidState(
            f"{instance.folder.spec} is missing or damaged, so nothing says what {instance.name} is made of",
            hint="Put it back from a backup; the guest itself is untouched.",
        )
    return spec


def _refuse_saved(instance: LocalInstance, power: PowerState) -> None:
    if power is PowerState.SAVED:
        raise InvalidState(
            f"{instance.name} is off with its memory saved, which fits only the guest as it is",
            hint=f"Let it go on first: virtfleet power on {instance.name}",
        )


def refuse_shrinking(plan: Plan, root_bytes: int) -> None:
    """Raise `InvalidSpec` when a disk would lose data; the root disk holds so many bytes now."""
    after = plan.after
    if after.disk_gib is not None and after.disk_gib * GIB < root_bytes:
        least = -(-root_bytes // GIB)
        raise _refused("disk_gib", after.disk_gib, f"at least {least}: disks never shrink")
    kept = after.ephemeral_gib[: len(plan.before.ephemeral_gib)]
    if len(kept) < len(plan.before.ephemeral_gib) or any(
        new < old for new, old in zip(kept, plan.before.ephemeral_gib, strict=True)
    ):
        present = ", ".join(map(str, plan.before.ephemeral_gib))
        raise _refused("ephemeral_gib", list(after.ephemeral_gib), f"at least {present}, in this order, and more disks")


def _refused(field: str, given: object, allowed: str) -> InvalidSpec:
    return InvalidSpec(f"{field}: allowed: {allowed} (given: {given})", field=field, given=given, allowed=allowed)


# --- the resize itself ------------------------------------------------------------------------------------------------


def resize_disks(instance: LocalInstance, plan: Plan, ctx: Context) -> DiskSet:
    """Grow the stopped guest's disks, make new ones, and its swap anew. Raises `InvalidState` while it runs."""
    if not plan.changes:
        return DiskSet(disks=())
    ctx.undo("revert_resize", name=instance.name, uuid=instance.uuid)
    with _stopped(instance, ctx) as (folder, _, guest):
        guest.claim(instance.owner(ctx))
        old = require_spec(instance)
        found, spec = disks.present(folder, old), plan.after.on(old)
        _remember(folder, guest, old, found, ctx)
        if plan.before.swap_mib != plan.after.swap_mib and spec.swap_mib:
            make_swap(folder.swap, spec.swap_mib, ctx)
        return disks.grow(folder, spec, found.disks, ctx)


def redefine(instance: LocalInstance, plan: Plan, resized: DiskSet, ctx: Context) -> None:
    """Give the stopped guest the definition of its new sizes and `resized` disks. Raises `DomainRejected`."""
    if not plan.changes:
        return
    with _stopped(instance, ctx) as (folder, host, guest):
        spec = plan.after.on(require_spec(instance))
        same_accel = spec.model_copy(update={"accel": guest.accel()})
        config = domain_config(instance, host, same_accel, resized, instance.owner(ctx))
        host.redefine(guest.xml(inactive=True), config, from_here=True)
        replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})


def finish(instance: LocalInstance, plan: Plan, ctx: Context) -> PowerState:
    """Bring the guest's power back to what it was: from here on the resize is not taken back.

    The guest starts with its CPUs stopped: QEMU has accepted the new sizes before the guest can write to a new disk.
    """
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        guest.claim(instance.owner(ctx))
        if plan.power in RUNS and not guest.is_active():
            ctx.check()
            guest.start(paused=True)
        ctx.make_irrevocable()
        folder.forget_before_resize()
        if plan.power is PowerState.RUNNING:
            guest.resume()
        if not plan.after.swap_mib:
            folder.swap.unlink(missing_ok=True)
        return guest.power()


# --- taking it back ---------------------------------------------------------------------------------------------------


def revert(instance: LocalInstance, ctx: Context) -> None:
    """Give the guest its old sizes and definition back, unless it has run with the new ones."""
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        before = _remembered(folder)
        if before is None:
            folder.forget_before_resize()  # it had only begun to put down what the instance is
        if before is None or before.operation != ctx.operation:
            log.info("nothing to take back: the guest has its old sizes, or runs with the new ones", uuid=instance.uuid)
            return
        guest = host.guest(instance.uuid)
        guest.check_fence(instance.owner(ctx))
        if guest.power() is PowerState.PAUSED:
            guest.destroy()  # started by `finish`, and never run
        if guest.is_active():
            # Somebody started it: what it has written to its new disks must not be cut off.
            log.warning("the guest runs with its new disks: they stay", uuid=instance.uuid)
            folder.forget_before_resize()
            return
        _restore_disks(folder, before, ctx)
        if not bring_back_former(folder.spec) and require_spec(instance) != before.spec:
            replace_json(folder.spec, {"spec": before.spec.model_dump(mode="json"), "operation": ctx.operation})
        host.restore(before.xml, instance.owner(ctx))
        folder.forget_before_resize()


def _restore_disks(folder: InstanceDir, before: Before, ctx: Context) -> None:
    for disk in disks.kept(folder, before.spec):
        if disk.virtual_size > before.disks[disk.path.name]:
            qemu_img.shrink(disk.path, disk.format, before.disks[disk.path.name])
    # Those that this resize has made, the last one first: so a second attempt finds what the first one has left.
    added = takewhile(Path.exists, map(folder.ephemeral, count(len(before.spec.ephemeral_gib))))
    for path in reversed([*added]):
        path.unlink()
    if not before.spec.swap_mib:
        folder.swap.unlink(missing_ok=True)
    elif not bring_back_former(folder.swap) and size_of(folder.swap) != before.spec.swap_mib * MIB:
        make_swap(folder.swap, before.spec.swap_mib, ctx)


def _remember(folder: InstanceDir, guest: Guest, spec: InstanceSpec, found: DiskSet, ctx: Context) -> None:
    known = _remembered(folder)
    if known is not None and known.operation == ctx.operation:
        return
    sizes = {disk.path.name: disk.virtual_size for disk in found.disks}
    before = Before(operation=ctx.operation, xml=guest.xml(inactive=True), spec=spec, disks=sizes)
    for path in (folder.spec, folder.swap):
        keep_former(path)
    write_text_durably(folder.before_resize, before.model_dump_json(), 0o600)


def _remembered(folder: InstanceDir) -> Before | None:
    try:
        return Before.model_validate_json(folder.before_resize.read_text())
    except FileNotFoundError:
        return None


@contextmanager
def _stopped(instance: LocalInstance, ctx: Context) -> Iterator[tuple[InstanceDir, Host, Guest]]:
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        guest.check_fence(instance.owner(ctx))
        if (power := guest.power()) not in OFF:
            raise InvalidState(f"{instance.name} is {power}: its disks cannot be resized", hint="Who started it?")
        yield folder, host, guest
