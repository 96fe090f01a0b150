"""What must hold after every round, whatever was done to the fleet."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.faults import Fault
from tests.chaos.scenarios import Scenario, Whereabouts
from tests.chaos.site import AWAY, HOME, PET, Site
from tests.lab.fleet import KINDS
from tests.lab.process import running
from worker.app import SHARED_QUEUE, host_queue
from worker.engine import keys
from worker.engine.record import Record, State
from worker.images.layout import ASIDE
from worker.models import PowerState

PASSING = ("tmp/*", "operations/*", "images/.*", "snapshots/.*", "reserved/*")
"""Where a host keeps what no operation may leave behind."""

SETTLE = 8.0
"""Seconds after the end of an operation in which copies of its record and the like must have gone."""

ACCEPTED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REJECTED})


@dataclass(frozen=True)
class Played:
    """A round when it is over: the operation as it ended, and where the workers' logs were when it began.

    `forgotten`: Redis lost the record after the operation had ended. `lost_backups`: as in `Verdict`.
    """

    scenario: Scenario
    fault: Fault | None
    instance: str
    record: Record
    logs: dict[Path, int]
    cancelled: bool = False
    forgotten: bool = False
    lost_backups: int = 0
    boots: int | None = None
    checkpoints: frozenset[str] = frozenset()


def violations(site: Site, played: Played) -> list[str]:
    """Everything that does not hold; what may still be on its way gets a moment."""
    found = [*_ending(played), *executions(site, played)]
    deadline = time.monotonic() + SETTLE
    while unsettled := [*_guests(site, played), *_leftovers(site, played), *_snapshots(site, played)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return [*found, *unsettled, *_contents(site, played)]


# --- the operation ----------------------------------------------------------------------------------------------------


def _ending(played: Played) -> Iterator[str]:
    state, fault = played.record.state, played.fault
    if state not in ACCEPTED:
        yield f"the operation ended {state}: {played.record.error}"
    if played.cancelled or (fault and fault.name == "cancel"):
        wanted = {State.CANCELLED, State.SUCCEEDED}  # a cancel may come too late
    elif played.lost_backups:
        wanted = {State.SUCCEEDED, State.FAILED}  # libvirt lets nothing but a mirror be taken
    elif fault is None or (fault.harmless and not (fault.as_root and played.scenario.needs_space)):
        wanted = {State.SUCCEEDED}
    else:
        wanted = {State.SUCCEEDED, State.FAILED}
    if state in ACCEPTED - wanted:
        yield f"the operation ended {state}: {played.record.error}"


@dataclass(frozen=True)
class Execution:
    """One process' work on one attempt at one step, by the worker's own log. Monotonic seconds."""

    step: str
    pid: int
    began: float
    ended: float

    def __str__(self) -> str:
        return f"{self.step} in process {self.pid} from {self.began:.3f} to {self.ended:.3f}"


def executions(site: Site, played: Played) -> Iterator[str]:
    """At most one executor at any time, but for steps that stand side by side; and none that outlives the operation."""
    works = sorted(_read_executions(site, played), key=lambda work: work.began)
    stages = [{plan.key for plan in stage} for stage in played.record.stages]
    for first, second in itertools.combinations(works, 2):
        side_by_side = first.step != second.step and any({first.step, second.step} <= stage for stage in stages)
        if second.began < first.ended and not side_by_side:
            yield f"two executors at once: {first}, and {second}"
    if not works and played.record.state is State.SUCCEEDED:
        yield "the operation succeeded, but no log tells of an executor"


def _read_executions(site: Site, played: Played) -> Iterator[Execution]:
    begun: dict[tuple[Any, Any], dict[str, Any]] = {}
    for log, offset in played.logs.items():
        for event in events_of(played.record.id, log, offset):
            key = event.get("step"), event.get("fence")
            if event["event"] == "begins":
                begun[key] = event
            elif event["event"] == "ends":
                yield Execution(event["step"], event["pid"], begun.pop(key)["at"], event["at"])
    for (step, _), event in begun.items():
        pid = event["pid"]  # killed: it could work until it was gone
        yield Execution(step, pid, event["at"], time.monotonic() if running(pid) else site.supervisor.deaths[pid])


def events_of(operation: str, log: Path, offset: int) -> Iterator[dict[str, Any]]:
    """What a worker's log tells of an operation, from `offset` on."""
    with log.open("rb") as file:
        file.seek(offset)
        for line in file:
            if operation.encode() in line and line.startswith(b"{"):
                event: dict[str, Any] = json.loads(line)
                if event.get("operation") == operation:
                    yield event


# --- the guests -------------------------------------------------------------------------------------------------------


def _guests(site: Site, played: Played) -> Iterator[str]:
    yield from _place(site, played)
    for host in site.hosts:
        domains = site.domains(host)
        if unknown := set(domains) - {PET, played.instance}:
            yield f"domains nobody knows on {host}: {sorted(unknown)}"
        if (PET in domains) != (host == HOME):
            yield f"the guest that was at home all the time: {host} has the domains {sorted(domains)}"
        yield from (f"{name} is transient: its power-off would lose it" for name in site.transient(host))
        yield from (f"a job runs on: {job}" for job in site.jobs(host))
        yield from _processes(site, host, domains)


def _place(site: Site, played: Played) -> Iterator[str]:
    """The guest is in one of the places where it may be now, as it should be there, and nowhere else."""
    succeeded, journey = played.record.state is State.SUCCEEDED, played.scenario.journey
    if journey is None:
        yield from _powers(site, played, {HOME: _wanted(played), AWAY: {PowerState.MISSING}})
        return
    allowed = {journey.after} if succeeded else journey.undone
    amiss = {where: [*_amiss(site, played, where)] for where in allowed}
    if all(amiss.values()):
        yield from (f"it is not {where}: {'; '.join(why)}" for where, why in amiss.items())


def _amiss(site: Site, played: Played, where: Whereabouts) -> Iterator[str]:
    """What speaks against an instance being there as a whole."""
    uuid, here = played.record.uuid, _host_of(where)
    left = AWAY if here == HOME else HOME
    kept = where is Whereabouts.MOVED
    yield from _powers(site, played, {here: _wanted(played), left: {PowerState.OFF if kept else PowerState.MISSING}})
    folders = {here: [uuid], left: [f"{uuid}{ASIDE}"] if kept else []}
    for host, wanted in folders.items():
        found = sorted(folder.name for folder in site.hosts[host].data.glob(f"instances/{uuid}*"))
        if found != wanted:
            yield f"{host} has the folders {found}, not {wanted}"
        notes = [path.name for path in site.hosts[host].data.glob(f"instances/{uuid}*/.handover.*")]
        if notes != [f".handover.{host}.json"] * kept:
            yield f"{host} has the notes {notes}"
    known = site.client.registry.find(played.instance)
    if known is None or known.host != here or bool(known.move) != kept:
        yield f"the registry has {known}"


def _host_of(where: Whereabouts) -> str:
    return HOME if where is Whereabouts.UNMOVED else AWAY


def _wanted(played: Played) -> set[PowerState]:
    """The states in which the guest may be where it runs."""
    succeeded = played.record.state is State.SUCCEEDED
    wanted = {played.scenario.after} if succeeded else set(played.scenario.undone)
    if played.fault and PowerState.MISSING not in wanted:
        wanted |= played.fault.may_leave
    return wanted


def _powers(site: Site, played: Played, wanted: dict[str, set[PowerState]]) -> Iterator[str]:
    for host in site.hosts:
        power = site.power(played.instance, host)
        if power not in wanted[host]:
            allowed = " or ".join(sorted(wanted[host]))
            yield f"{played.instance} is {power} on {host}, not {allowed}; the operation {played.record.state}"


def _processes(site: Site, host: str, domains: dict[str, PowerState]) -> Iterator[str]:
    """Every active domain has its QEMU, and no program that a worker had started works on without it."""
    active = sorted(name for name, power in domains.items() if power is not PowerState.OFF)
    emulators = []
    for words in _command_lines():
        if not any(str(site.hosts[host].data) in word for word in words):
            continue
        guest = next((word for word in words if word.startswith("guest=")), None)
        if guest:
            emulators.append(guest.removeprefix("guest=").partition(",")[0])
        else:
            yield f"still runs: {' '.join(words)}"
    if sorted(emulators) != active:
        yield f"QEMU runs for {sorted(emulators)} on {host}, libvirt's active domains are {active}"


def _command_lines() -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            yield path.read_text(errors="replace").split("\0")


# --- what must not be left --------------------------------------------------------------------------------------------


def _leftovers(site: Site, played: Played) -> Iterator[str]:
    for host in site.hosts:
        yield from _files(site, host, played)
    yield from _records(site, played)


def _files(site: Site, host: str, played: Played) -> Iterator[str]:
    data = site.hosts[host].data
    known = {str(one.uuid) for one in site.client.registry.instances(host)}
    folders = sorted(data.glob("instances/*"))
    present = {folder.name for folder in folders if not folder.name.endswith(ASIDE)}
    if present != known:
        yield f"folders of instances on {host} {sorted(present)}, the registry knows {sorted(known)}"
    gone = site.power(played.instance, host) is PowerState.MISSING
    if gone and played.record.uuid in present | known:
        yield f"{played.instance} is gone, but not without a trace: folder or registry entry {played.record.uuid}"
    left = [path for place in PASSING for path in data.glob(place)]
    seals = {*data.glob(f"instances/*{ASIDE}/.sealed")}
    hidden = {*data.glob("instances/*/.*")} - seals
    left += [path for path in hidden if not path.name.startswith((".lock", ".handover."))]
    yield from (f"left behind: {path}" for path in left)
    workers = data.glob(".*@*.lock")  # each holds its own
    locks = {*data.glob("instances/*/.lock"), *data.glob(".*.lock")} - {*workers}
    yield from (f"locked: {lock}" for lock in locks if _is_locked(lock))


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _records(site: Site, played: Played) -> Iterator[str]:
    redis, operation = site.client.journal.redis, played.record.id
    for pattern in (keys.lease("*", "*"), keys.claim("*"), keys.waiting("*"), keys.progress("*"), keys.waiters("*")):
        yield from (f"left in Redis: {key}" for key in redis.scan_iter(pattern))
    if redis.zscore(keys.ATTENTION, operation) is not None:
        yield "the reaper still looks at the operation"
    for queue in (SHARED_QUEUE, *(host_queue(host, kind) for host in site.hosts for kind in KINDS)):
        if redis.llen(queue):
            yield f"messages wait in {queue}"
    state = site.client.journal.state(operation)
    if state is not played.record.state and not played.forgotten:
        yield f"the operation ended {played.record.state} and is now {state}"


# --- snapshots --------------------------------------------------------------------------------------------------------


def _snapshots(site: Site, played: Played) -> Iterator[str]:
    """A snapshot is there as a whole or not at all, and the guest it was taken of has not noticed."""
    published = site.published()
    if [one.id for one in published] != _expected_snapshots(site, played):
        yield f"published: {[one.id for one in published]}; the operation {played.record.state}"
    for one in published:
        yield from site.snapshot_complaints(one)
    if site.frozen():
        yield "the guest is frozen"
    # libvirt cannot delete the checkpoint of a guest that is off: it goes with the next snapshot.
    known = {one.checkpoint for one in published} | played.checkpoints
    if site.power(PET) is not PowerState.OFF:
        yield from (f"a checkpoint of no snapshot: {name}" for name in site.checkpoints() if name not in known)
    boots = played.boots is not None and site.boots() - played.boots
    if boots and played.scenario.task == "virtfleet.snapshot":
        yield "the guest has lost its memory: it booted again"


def _expected_snapshots(site: Site, played: Played) -> list[str]:
    succeeded = played.record.state is State.SUCCEEDED
    deleted = succeeded and played.scenario.task == "virtfleet.snapshot_delete"
    kept = [site.kept] if played.scenario.needs_snapshot and not deleted else []
    taken = [played.record.id] if succeeded and played.scenario.task == "virtfleet.snapshot" else []
    return [*kept, *taken]


# --- data -------------------------------------------------------------------------------------------------------------


def _contents(site: Site, played: Played) -> Iterator[str]:
    markers = site.read_markers()
    yield from (
        f"the pet's {disk} disk holds {found!r}, not {site.markers[disk]!r}"
        for disk, found in markers.items()
        if found != site.markers[disk]
    )
    for image in (path for host in site.hosts.values() for path in host.data.glob("images/*.*")):
        if image.suffix != ".json" and _sha256(image) != image.stem:
            yield f"the base image {image} has changed"
    for host in site.hosts if played.scenario.journey else ():
        is_there = any(site.hosts[host].data.glob(f"instances/{played.record.uuid}*"))  # whether it must be: `_place`
        if is_there and (found := site.read_contents(played.instance, host)) != site.contents[host]:
            yield f"the copy on {host} holds {found}, not {site.contents[host]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
