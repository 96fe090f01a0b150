"""Power: on, off, reboot, pause, resume. Asking for what already is succeeds and says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from worker.compute import comeback
from worker.compute.local import LocalInstance, require_ours
from worker.context import Context
from worker.errors import GuestHung, InvalidState
from worker.models import Frozen, Owner, PowerState
from worker.virt.guest import Guest

POLL = 0.02
"""Seconds between two looks at a guest that was asked to shut down and is not needed to."""

BRIEFLY = 1.0
"""Seconds in which a guest that listens has shut down; a cancel does not wait for it any longer."""

OFF = (PowerState.OFF, PowerState.CRASHED)


class PowerChange(Frozen):
    """What became of a guest's power."""

    before: PowerState
    after: PowerState
    note: str


@contextmanager
def _guest(instance: LocalInstance, ctx: Context, *, mark_first: bool = True) -> Iterator[tuple[Guest, Owner | None]]:
    """The instance's guest, marked as this step's; and the mark of an earlier attempt of this operation."""
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        require_ours(guest)
        mark = guest.owner()
        begun = mark if mark and mark.operation == ctx.operation else None
        owner = instance.owner(ctx, started=begun is not None and begun.started)
        guest.claim(owner) if mark_first else guest.check_fence(owner)
        yield guest, begun


def power_on(instance: LocalInstance, ctx: Context) -> PowerChange:
    """Start the guest; with saved memory it goes on where it was."""
    with _guest(instance, ctx) as (guest, _):
        before = guest.power()
        if before is PowerState.RUNNING:
            return PowerChange(before=before, after=before, note="already running")
        if before is PowerState.PAUSED:
            return PowerChange(before=before, after=before, note="already on, but paused: resume it to let it run")
        if before is PowerState.CRASHED:
            guest.destroy()
        _start(instance, guest, ctx)
        note = "resumed with its saved memory" if before is PowerState.SAVED else "started"
        return PowerChange(before=before, after=guest.power(), note=note)


class Patience(Frozen):
    """How to ask a guest to shut down: again every `retry_interval` seconds until `timeout` seconds; 0: not at all."""

    timeout: float = 60.0
    retry_interval: float = 10.0


BY_FORCE = Patience(timeout=0)


def power_off(instance: LocalInstance, patience: Patience, ctx: Context, *, comes_back: bool = False) -> PowerChange:
    """Ask the guest to shut down; when it does not in time, take the power away.

    `comes_back`: if it is not to be, the guest has to run again, and so be waited for once it was asked.
    """
    # A QEMU that hangs keeps libvirt from all but taking its power away, also from marking the domain.
    by_force = patience.timeout == 0
    with _guest(instance, ctx, mark_first=not by_force) as (guest, _):
        before = guest.power()
        if before is PowerState.SAVED:
            return PowerChange(before=before, after=before, note="already off, its memory saved")
        if before is PowerState.OFF:
            return PowerChange(before=before, after=before, note="already off")
        if comes_back:
            _await_when_undone(instance, patience, ctx)
        note = _take_down(instance, guest, before, patience, ctx)
        if by_force:
            guest.claim(instance.owner(ctx))
        return PowerChange(before=before, after=guest.power(), note=note)


def restore(instance: LocalInstance, before: PowerState, ctx: Context) -> PowerChange:
    """Bring the guest from off to what it was doing before; one that was off stays off."""
    with _guest(instance, ctx) as (guest, _):
        now = guest.power()
        if before in (PowerState.RUNNING, PowerState.PAUSED):
            guest.start(paused=before is PowerState.PAUSED)
            if before is PowerState.RUNNING:
                guest.resume()
            elif guest.power() is PowerState.RUNNING:
                guest.pause()  # it was let run to hear the request to shut down
        return PowerChange(before=now, after=guest.power(), note=f"it was {before} before the operation")


def reboot(instance: LocalInstance, patience: Patience, ctx: Context) -> PowerChange:
    """Shut the guest down, by force when it does not react in time, and start it again.

    A worker that died between the two left the guest off: trying again starts it. One that died after both had left
    its mark: the guest is not shut down once more.
    """
    with _guest(instance, ctx) as (guest, begun):
        before = guest.power()
        if before is PowerState.SAVED or (before is PowerState.OFF and not begun):
            raise _not_on(instance, before, "reboot")
        if begun and begun.started and before is PowerState.RUNNING:
            return PowerChange(before=before, after=before, note="started by an attempt whose worker died")
        ctx.undo("power_on", name=instance.name, uuid=instance.uuid)
        note = "off already"
        if before is not PowerState.OFF:
            _await_when_undone(instance, patience, ctx)
            note = _take_down(instance, guest, before, patience, ctx)
        guest.claim(instance.owner(ctx, started=True))
        _start(instance, guest, ctx)
        return PowerChange(before=before, after=guest.power(), note=f"{note}, then started")


def pause(instance: LocalInstance, ctx: Context) -> PowerChange:
    """Stop the guest's CPUs; its memory stays."""
    with _guest(instance, ctx) as (guest, _):
        before = guest.power()
        if before is PowerState.PAUSED:
            return PowerChange(before=before, after=before, note="already paused")
        if before is not PowerState.RUNNING:
            raise _not_on(instance, before, "pause")
        _undo_as(instance, before, ctx)
        guest.pause()
        return PowerChange(before=before, after=guest.power(), note="paused")


def resume(instance: LocalInstance, ctx: Context) -> PowerChange:
    """Let a paused guest run on."""
    with _guest(instance, ctx) as (guest, _):
        before = guest.power()
        if before is PowerState.RUNNING:
            return PowerChange(before=before, after=before, note="already running")
        if before is not PowerState.PAUSED:
            raise _not_on(instance, before, "resume")
        _undo_as(instance, before, ctx)
        guest.resume()
        return PowerChange(before=before, after=guest.power(), note="resumed")


def pause_again(instance: LocalInstance, ctx: Context) -> PowerChange:
    """Stop the CPUs of a guest that was let run to hear the request to shut down; one that did so stays off."""
    with _guest(instance, ctx) as (guest, _):
        before = guest.power()
        if before is PowerState.RUNNING:
            guest.pause()
        return PowerChange(before=before, after=guest.power(), note="it was paused before the operation")


def _start(instance: LocalInstance, guest: Guest, ctx: Context) -> None:
    ctx.check()
    # It may write to disks that a resize has grown: from now on they cannot be shrunk again.
    instance.folder.forget_before_resize()
    guest.start()


def _undo_as(instance: LocalInstance, before: PowerState, ctx: Context) -> None:
    """What QEMU was asked to do it may do late, after this step was given up."""
    ctx.undo("power_as_before", name=instance.name, uuid=instance.uuid, before=before.value)


def _not_on(instance: LocalInstance, before: PowerState, verb: str) -> InvalidState:
    return InvalidState(
        f"{instance.name} is {before}, so there is nothing to {verb}",
        hint=f"Start it: virtfleet power on {instance.name}",
    )


def await_shutdown(instance: LocalInstance, ctx: Context) -> None:
    """Wait briefly whether a guest does shut down that was asked to; what was asked by ACPI cannot be taken back.

    One that takes its time is left to its host's control worker: see `worker.compute.comeback`.
    """
    deadline = time.monotonic() + BRIEFLY
    with instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        while guest and guest.power() is PowerState.RUNNING and time.monotonic() < deadline:
            ctx.progress(0, None, "the guest was asked to shut down: waiting whether it does")
            time.sleep(POLL)
        if guest and guest.power() is PowerState.RUNNING:
            comeback.expect(instance, ctx)


def _await_when_undone(instance: LocalInstance, patience: Patience, ctx: Context) -> None:
    if patience.timeout:  # else it is not asked
        ctx.undo("await_shutdown", name=instance.name, uuid=instance.uuid)


def _take_down(instance: LocalInstance, guest: Guest, before: PowerState, patience: Patience, ctx: Context) -> str:
    """Shut down in time or by force; how it went."""
    if before is PowerState.CRASHED or patience.timeout == 0:
        _force(guest, ctx)
        return "powered off by force"
    if before is PowerState.PAUSED:
        ctx.undo("pause_again", name=instance.name, uuid=instance.uuid)
        guest.resume()  # a paused guest cannot save its data: let it hear the request
    return _ask_down(guest, patience, ctx)


def _ask_down(guest: Guest, patience: Patience, ctx: Context) -> str:
    began = time.monotonic()
    asked = 0
    while (elapsed := time.monotonic() - began) < patience.timeout:
        ctx.progress(0, None, f"waiting for the guest to shut down (asked {asked} times)")
        if guest.power() in OFF:
            return f"shut down by itself after {elapsed:.1f} s"
        if elapsed >= asked * patience.retry_interval:
            asked += 1
            try:
                guest.shutdown()  # a guest that is still booting ignores the first request
            except GuestHung:
                _force(guest, ctx)
                return "QEMU did not answer: powered off by force"
        time.sleep(_pause(elapsed))
    _force(guest, ctx)
    return f"did not shut down within {patience.timeout:.0f} s (asked {asked} times): powered off by force"


def _pause(waited: float) -> float:
    """Seconds until the next look, which costs 0.5 ms: a fiftieth of the wait at the most, as an idle guest is down
    after 0.3 s, and one that stops its databases after minutes."""
    return min(max(waited / 50, 0.005), 0.25)


def _force(guest: Guest, ctx: Context) -> None:
    """Take the power away, unless the step was told to stop, or overtaken, while it waited."""
    ctx.check()
    guest.destroy()
