"""The table of operations that the chaos suite disturbs. A new operation joins by a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from tasks.steps import destroy, migrate, power, provision, resize, snapshots
from worker.engine import undo
from worker.engine.step import Step
from worker.models import PowerState
from worker.settings import RootDisk

Subject = Literal["pet", "victim", "new"]
"""Whom the operation is about: the guest that lives through all rounds and has written to its disks, one that was
spawned for this round, or one that the operation itself makes."""

MISSING, OFF, RUNNING, PAUSED = PowerState.MISSING, PowerState.OFF, PowerState.RUNNING, PowerState.PAUSED

ADMISSION = "admission"
UNDO = "undo"

QUEUES = {
    made.name: made.queue
    for module in (destroy, migrate, power, provision, resize, snapshots, undo)
    for made in vars(module).values()
    if isinstance(made, Step)
}
"""The queue of each step that operations are made of."""


class Whereabouts(StrEnum):
    """On which of two hosts an instance is, and whether its former copy is still kept."""

    UNMOVED = "at home, and not on the other host"
    MOVED = "on the other host, its former copy set aside at home"
    SETTLED = "on the other host, and no more at home"


@dataclass(frozen=True)
class Journey:
    """From where to where an operation on two hosts brings an instance; `undone` as in `Scenario`."""

    before: Whereabouts
    after: Whereabouts
    undone: frozenset[Whereabouts]


UNMOVED, MOVED, SETTLED = Whereabouts.UNMOVED, Whereabouts.MOVED, Whereabouts.SETTLED


@dataclass(frozen=True)
class Ground:
    """What a request can name: the host, the instance, images below the host's image roots, a published snapshot, and
    the other host."""

    host: str
    instance: str
    blank_image: str
    guest_image: str
    snapshot: str = ""
    other: str = ""


Asks = Callable[[Ground], dict[str, Any]]
"""Makes a request's arguments."""


@dataclass(frozen=True)
class Scenario:
    """One operation, from a state to a state.

    `undone` are the states in which it may leave the guest when it failed or was cancelled. `cancel_at` is the step
    during which it is cancelled when its undo is to be disturbed; empty where nothing is undone. `needs_space`: it
    may fail on a full disk. `needs_snapshot`: one of the pet has been published before. `journey`: it is about two
    hosts; the states are those of the guest where it runs. `root_disk`: a victim's.
    """

    name: str
    task: str
    subject: Subject
    before: PowerState
    after: PowerState
    undone: frozenset[PowerState]
    steps: tuple[str, ...]
    request: Asks
    cancel_at: str = ""
    needs_space: bool = False
    needs_snapshot: bool = False
    journey: Journey | None = None
    root_disk: RootDisk = "raw"

    @property
    def moments(self) -> tuple[str, ...]:
        """When a fault may strike: as soon as it is admitted, in each step, and while it is undone."""
        return (ADMISSION, *self.steps, *([UNDO] if self.cancel_at else []))

    def queue(self, moment: str) -> str:
        """The queue of the step that runs then, or that is about to begin."""
        step = self.steps[0] if moment == ADMISSION else moment
        return QUEUES[step.partition(":")[0]]


@dataclass(frozen=True)
class Power:
    """A row for an operation of one step on a guest that is there."""

    name: str
    before: PowerState
    after: PowerState
    undone: frozenset[PowerState]
    cancel_at: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def scenario(self) -> Scenario:
        """The whole row."""
        return Scenario(
            name=self.name,
            task=f"virtfleet.{self.name}",
            subject="pet",
            before=self.before,
            after=self.after,
            undone=self.undone,
            steps=(self.name,),
            request=lambda ground: {"instance": ground.instance, **self.arguments},
            cancel_at=self.cancel_at,
        )


def _spawn(image: str, **arguments: Any) -> Asks:
    def request(ground: Ground) -> dict[str, Any]:
        fixed = {"name": ground.instance, "host": ground.host, "image": getattr(ground, image)}
        return {**fixed, "ephemeral_gib": [1], **arguments}

    return request


def _snapshot(name: str, *steps: str, cancel_at: str = "extract_snapshot", **arguments: Any) -> Scenario:
    """A row for a way of taking a snapshot of the guest that writes all the time."""
    return Scenario(
        name=f"snapshot {name}",
        task="virtfleet.snapshot",
        subject="pet",
        before=RUNNING,
        after=RUNNING,
        undone=frozenset({RUNNING}),
        steps=steps,
        request=lambda ground: {"instance": ground.instance, **arguments},
        cancel_at=cancel_at,
        needs_space=True,
    )


def _journey(name: str, *steps: str, request: Asks, journey: Journey, **rest: Any) -> Scenario:
    """A row for an operation on two hosts."""
    return Scenario(
        name=name,
        task=f"virtfleet.{name.partition(' ')[0]}",
        subject="victim",
        before=RUNNING,
        after=RUNNING,
        undone=frozenset({RUNNING}),
        steps=steps,
        request=lambda ground: {"instance": ground.instance, **request(ground)},
        journey=journey,
        **rest,
    )


LIVE = ("reserve_space", "live_snapshot", "extract_snapshot", "publish_snapshot")
COLD = ("reserve_space", "note_power", "managed_save", "extract_snapshot", "restore_power", "publish_snapshot")
PROVISION = ("fetch_image", "create_disks", "build_seed", "spawn_instance", "wait_ready")
READY = {"wait_for": "console", "console_line": "virtfleet-guest ready", "memory_mib": 256}
IMPATIENT = {"timeout": 1.5, "retry_interval": 0.5}


def _to_other(ground: Ground) -> dict[str, Any]:
    return {"to": ground.other, **IMPATIENT}


SCENARIOS = (
    Scenario(
        name="spawn",
        task="virtfleet.spawn",
        subject="new",
        before=MISSING,
        after=RUNNING,
        undone=frozenset({MISSING}),
        steps=PROVISION,
        request=_spawn("blank_image", memory_mib=64, root_disk="raw"),
        cancel_at="spawn_instance",
        needs_space=True,
    ),
    Scenario(
        name="spawn until ready",
        task="virtfleet.spawn",
        subject="new",
        before=MISSING,
        after=RUNNING,
        undone=frozenset({MISSING}),
        steps=("wait_ready",),
        request=_spawn("guest_image", **READY),
        cancel_at="wait_ready",
        needs_space=True,
    ),
    Power("power_on", OFF, RUNNING, frozenset({OFF, RUNNING})).scenario(),
    Power("power_off", RUNNING, OFF, frozenset({RUNNING, OFF}), arguments=IMPATIENT).scenario(),
    Power("reboot", RUNNING, RUNNING, frozenset({RUNNING}), cancel_at="reboot", arguments=IMPATIENT).scenario(),
    replace(
        Power(
            "power_off", PAUSED, OFF, frozenset({PAUSED, OFF}), cancel_at="power_off", arguments=IMPATIENT
        ).scenario(),
        name="power_off of one that is paused",
    ),
    replace(
        Power(
            "reboot", PAUSED, RUNNING, frozenset({PAUSED, RUNNING}), cancel_at="reboot", arguments=IMPATIENT
        ).scenario(),
        name="reboot of one that is paused",
    ),
    Power("pause", RUNNING, PAUSED, frozenset({RUNNING, PAUSED})).scenario(),
    Power("resume", PAUSED, RUNNING, frozenset({RUNNING, PAUSED})).scenario(),
    Scenario(
        name="resize",
        task="virtfleet.resize",
        subject="victim",
        before=RUNNING,
        after=RUNNING,
        undone=frozenset({RUNNING}),
        steps=("plan_resize", "shut_down", "resize_disks", "redefine", "finish_resize"),
        request=lambda ground: {
            "instance": ground.instance,
            "memory_mib": 80,
            "swap_mib": 8,
            "ephemeral_gib": [2, 1],
            **IMPATIENT,
        },
        cancel_at="redefine",
        needs_space=True,
    ),
    Scenario(
        name="destroy",
        task="virtfleet.destroy",
        subject="victim",
        before=RUNNING,
        after=MISSING,
        undone=frozenset({RUNNING}),
        steps=("destroy_instance",),
        request=lambda ground: {"instance": ground.instance},
    ),
    _snapshot("by backup", *LIVE, cancel_at="live_snapshot", method="backup", quiesce="require", limit_mib=1000),
    _snapshot("by mirror", *LIVE, method="mirror", compress="zstd", limit_mib=50),
    _snapshot("incremental", *LIVE, incremental=True),
    replace(_snapshot("increment", *LIVE, incremental=True), needs_snapshot=True),
    _snapshot("cold", *COLD, method="cold"),
    replace(
        _snapshot("cold of one that is paused", *COLD, method="cold"),
        before=PAUSED,
        after=PAUSED,
        undone=frozenset({PAUSED}),
    ),
    replace(_snapshot("of one that is off", *LIVE), before=OFF, after=OFF, undone=frozenset({OFF})),
    Scenario(
        name="snapshot delete",
        task="virtfleet.snapshot_delete",
        subject="pet",
        before=RUNNING,
        after=RUNNING,
        undone=frozenset({RUNNING}),
        steps=("delete_snapshot",),
        request=lambda ground: {"snapshot": ground.snapshot},
        needs_snapshot=True,
    ),
    Scenario(
        name="snapshot restore",
        task="virtfleet.snapshot_restore",
        subject="new",
        before=MISSING,
        after=RUNNING,
        undone=frozenset({MISSING}),
        steps=("restore_disks", "restore_seed", "restore_instance"),
        request=lambda ground: {"snapshot": ground.snapshot, "name": ground.instance},
        cancel_at="restore_instance",
        needs_space=True,
        needs_snapshot=True,
    ),
    _journey(
        "migrate",
        *("describe_source", "preflight", "prepare_destination", "shut_down_source", "set_aside", "prepare_source"),
        *("copy_disk:root.raw", "fingerprint:root.raw", "verify_disks", "hand_over", "define_destination"),
        *("start_destination", "release", "take_over"),
        journey=Journey(UNMOVED, MOVED, undone=frozenset({UNMOVED})),
        request=_to_other,
        cancel_at="start_destination",
        needs_space=True,
    ),
    _journey(
        "migrate over NBD",
        *("lend:base", "prepare_destination", "lend:disks", "copy_disk:root.qcow2"),
        journey=Journey(UNMOVED, MOVED, undone=frozenset({UNMOVED})),
        request=lambda ground: {**_to_other(ground), "transport": "nbd"},
        cancel_at="copy_disk:root.qcow2",
        needs_space=True,
        root_disk="overlay",
    ),
    _journey(
        "confirm",
        *("prove_here", "remove_leftover", "settle"),
        journey=Journey(MOVED, SETTLED, undone=frozenset({MOVED, SETTLED})),
        request=lambda _: {},
    ),
    _journey(
        "revert",
        *("prove_source", "describe_destination", "shut_down_destination", "leave_destination", "return_source"),
        *("start_source", "release_destination", "take_back"),
        journey=Journey(MOVED, UNMOVED, undone=frozenset({MOVED})),
        request=lambda _: IMPATIENT,
        cancel_at="start_source",
        needs_space=True,
    ),
)

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
