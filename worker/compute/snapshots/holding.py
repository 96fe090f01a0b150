"""Keeping a guest from writing for the instant of a snapshot: frozen by its agent, or paused; and letting go, always.

What is held is put down twice before it is held: in the snapshot's folder, where the next attempt finds it, and as an
undo entry, which the operation runs when it fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from worker.compute.local import LocalInstance
from worker.compute.snapshots.jobs import give_way
from worker.compute.snapshots.taking import Intent, Taking, intent_of, note_intent
from worker.context import Alone, watched_by
from worker.errors import (
    AgentUnresponsive,
    FleetError,
    HypervisorError,
    InvalidState,
    LetGoTooEarly,
    QuiesceFailed,
    UnsupportedByHost,
)
from worker.images.layout import SnapshotDir
from worker.models import Consistency, PowerState
from worker.virt import agent

PING_WITHIN = 2
"""Seconds the agent has to show that it is there, while the guest runs on."""

LET_GO_WITHIN = 60.0
"""Seconds to go on trying to thaw or resume a guest, over restarts of libvirtd and of its agent."""

_PAUSE = 0.2  # seconds between two attempts


@dataclass
class Hold:
    """What was achieved, and how long the guest could not write. Seconds."""

    frozen: int = 0
    applications: bool = False
    seconds: float = 0.0
    note: str = ""

    @property
    def consistency(self) -> Consistency:
        """What a snapshot taken meanwhile may be called."""
        if not self.frozen:
            return "crash"
        return "application" if self.applications else "filesystem"


@contextmanager
def held(taking: Taking, *, pause: bool = False) -> Iterator[Hold]:
    """The guest writes nothing while the block runs: its file systems are frozen, as far as the request wants and the
    guest can, and with `pause` its CPUs stand still; a guest that was paused stays so.

    Raises QuiesceFailed when the request demands a freeze and nothing could be frozen, LetGoTooEarly when a guest that
    was to stand still did not until the end.
    """
    hold = Hold()
    obstacle = _obstacle(taking, hold)
    if obstacle:
        _accept(taking, hold, obstacle)
    intent = Intent(
        name=taking.instance.name,
        uuid=taking.instance.uuid,
        host=taking.instance.local.name,
        frozen=not obstacle,
        paused=pause and taking.guest.power() is PowerState.RUNNING,
    )
    if not intent.frozen and not intent.paused:
        yield hold
        return
    _put_down(taking, intent)
    began = time.monotonic()
    try:
        if intent.frozen:
            _freeze(taking, hold)
        if intent.paused:
            taking.guest.pause()
        yield hold
    finally:
        _release_at_once(taking, intent)
        hold.seconds = time.monotonic() - began
        agent.relax(taking.guest)
        noted = intent_of(taking.folder)
        taking.folder.intent.unlink(missing_ok=True)
    if noted is not None and noted.released:
        if intent.paused:
            raise LetGoTooEarly(
                f"{taking.guest.name} was let go of after {hold.seconds:.0f} s, and its disks may show several instants"
            )
        hold.frozen = 0
        _accept(taking, hold, f"it was let go of after {hold.seconds:.0f} s, perhaps before the instant")


def _put_down(taking: Taking, intent: Intent) -> None:
    arguments = {"name": intent.name, "uuid": intent.uuid}
    if intent.frozen:
        taking.ctx.undo("thaw_guest", **arguments)
    if intent.paused:
        taking.ctx.undo("resume_guest", **arguments)  # undone first: the agent of a paused guest cannot thaw
    note_intent(taking.folder, intent)


def _freeze(taking: Taking, hold: Hold) -> None:
    try:
        hold.frozen = agent.freeze(taking.guest)
    except (AgentUnresponsive, InvalidState, HypervisorError, UnsupportedByHost) as error:  # also: a hook of it failed
        thaw(taking.instance, taking.folder)  # it may have frozen some, or may do so yet
        _accept(taking, hold, error.message)
        return
    if not hold.frozen:
        _accept(taking, hold, "its agent found no file system that is mounted from a disk")


def _obstacle(taking: Taking, hold: Hold) -> str:
    """Why the guest cannot be frozen now, or is not to be; notes what a freeze will be worth."""
    if taking.spec.quiesce == "never":
        return "not asked for"
    if (power := taking.guest.power()) is not PowerState.RUNNING:
        return f"the guest is {power}"
    system = agent.system_of(taking.guest, PING_WITHIN)
    hold.applications = system == agent.WINDOWS
    return "the guest's agent does not answer" if system is None else ""


def _accept(taking: Taking, hold: Hold, obstacle: str) -> None:
    if taking.spec.quiesce == "require":
        raise QuiesceFailed(f"{taking.guest.name} could not be frozen: {obstacle}")
    hold.note = f"not frozen: {obstacle}"


def _release_at_once(taking: Taking, intent: Intent) -> None:
    """Take back what was done, on the connection that is open; on fresh ones if that fails."""
    try:
        if intent.paused:
            taking.guest.resume()
        if intent.frozen:
            agent.thaw(taking.guest)
    except FleetError:
        release(taking.instance, taking.folder, intent)


def let_go(instance: LocalInstance, folder: SnapshotDir) -> None:
    """Thaw and resume a guest that a dead attempt may have left held."""
    intent = intent_of(folder)
    if intent is not None:
        release(instance, folder, intent)
        folder.intent.unlink(missing_ok=True)


def release(instance: LocalInstance, folder: SnapshotDir, intent: Intent) -> None:
    """Take back what was done to the guest, also when the step was told to stop."""
    with watched_by(Alone()):
        if intent.paused:
            resume(instance)  # first: a paused guest's agent cannot thaw
        if intent.frozen:
            thaw(instance, folder)


def thaw(instance: LocalInstance, folder: SnapshotDir) -> None:
    """Thaw the guest's file systems, each attempt on a fresh connection. Off, gone and thawed already are success.

    Where the guest stands still because its disk is full, what is copied into the folder is given up.
    Raises what the last attempt met, after a minute of attempts.
    """
    for attempt in _patiently():
        with attempt, instance.local.libvirt() as host:
            guest = host.find_uuid(instance.uuid)
            if guest is not None:
                give_way(guest, folder)
                agent.thaw(guest)
                agent.relax(guest)


def resume(instance: LocalInstance) -> None:
    """Let the guest's CPUs run, each attempt on a fresh connection. Off and gone are success."""
    for attempt in _patiently():
        with attempt, instance.local.libvirt() as host:
            guest = host.find_uuid(instance.uuid)
            if guest is not None and guest.power() is PowerState.PAUSED:
                guest.resume()


def _patiently() -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(FleetError),
        stop=stop_after_delay(LET_GO_WITHIN),
        wait=wait_fixed(_PAUSE),
        reraise=True,
    )
