"""Catching a guest that holds still: off, or with its memory saved until its disks are copied."""

from __future__ import annotations

import time

from worker.compute.local import LocalInstance, require_ours
from worker.compute.snapshots.jobs import end_jobs
from worker.compute.snapshots.taking import Taking, format_of, now, taking
from worker.context import Context
from worker.errors import InvalidState, QuiesceFailed
from worker.models import PowerState, SnapshotSpec, Taken

ON = (PowerState.RUNNING, PowerState.PAUSED)

OUT_OF_CHAIN = (
    "full instead of incremental, and no later one goes on from it: the guest does not run, and only QEMU knows what"
    " has changed"
)


def note_power(instance: LocalInstance) -> PowerState:
    """What the guest does now, before anything is done to it. Raises InvalidState for a crashed one."""
    with instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        power = guest.power()
        if power is PowerState.CRASHED:
            raise InvalidState(
                f"{instance.name} has crashed: its memory is not worth saving",
                hint=f"Power it off, or take it live: virtfleet power off {instance.name}",
            )
        return power


def save(instance: LocalInstance, spec: SnapshotSpec, power: PowerState, ctx: Context) -> Taken:
    """Save the guest's memory, which stops it, so that its disks hold still; one that is off already is left so.

    `power` is what it did before. Raises NoSpace when its memory does not fit beside libvirt's state.
    """
    with taking(instance, spec, ctx) as this:
        this.folder.create()
        if (known := this.recall()) is not None:
            return known
        began = time.monotonic()
        if power in ON:
            this.guest.require_sight_of_job()
            if this.guest.is_active():
                end_jobs(this.guest, this.folder, ctx)
            ctx.undo("restore_power", name=instance.name, uuid=instance.uuid, power=power.value)
            this.guest.save_memory(ctx, stall=instance.local.settings.stall_timeout)
        return take_off(this, power, time.monotonic() - began if power in ON else 0.0)


def require_off_will_do(this: Taking) -> None:
    """Raise where what was asked for needs a guest that runs: InvalidState, QuiesceFailed."""
    if this.spec.method != "auto":
        raise InvalidState(
            f"{this.guest.name} is {this.guest.power()}: what was asked for needs a guest that runs",
            hint="Leave out --method, or start it.",
        )
    if this.spec.quiesce == "require" and not this.guest.shut_itself_down():
        raise QuiesceFailed(
            f"{this.guest.name} is {this.guest.power()} and did not shut itself down: its disks are as after a power"
            " failure",
            hint="Start it, or take what there is: --quiesce auto",
        )


def take_off(this: Taking, power: PowerState | None = None, held: float = 0.0) -> Taken:
    """A guest that does not run: its disks are what there is to extract."""
    by_itself = this.guest.shut_itself_down()
    this.keep_definition()
    return this.caught(
        method="cold",
        taken_at=now(),
        power=power or this.guest.power(),
        # A guest that shut itself down wrote everything out first. Saved memory keeps what the disks do not have.
        consistency="application" if by_itself else "crash",
        held_seconds=round(held, 3),
        notes=(OUT_OF_CHAIN,) * this.spec.incremental,
        disks=tuple(this.taken_disk(disk, disk.path, format_of(disk)) for disk in this.disks),
    )


def restore_power(instance: LocalInstance, power: PowerState, ctx: Context) -> PowerState:
    """Bring the guest back to what it did before, with the memory it had; its power state then.

    Only a guest whose memory is saved is started: one that is off now was shut down by somebody after it came back.
    A save that still goes on is waited for. Repeating it is harmless.
    """
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        guest.wait_for_job(ctx, stall=instance.local.settings.stall_timeout)
        if power in ON and guest.power() is PowerState.SAVED:
            guest.start()  # libvirt lets a guest that was paused come back paused
        if power is PowerState.RUNNING and guest.power() is PowerState.PAUSED:
            guest.resume()
        guest.drop_stale_memory()
        return guest.power()
