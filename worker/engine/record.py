"""The record of an operation as the journal keeps it: what was asked, its steps, how each ended."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from worker.errors import RecordUnreadable
from worker.models import DISCREET_FIELDS

SCHEMA = 1
"""Version of the record's form. A worker goes on with records of its own and of the previous version."""

UNDO_STEP = "undo:"


class State(StrEnum):
    """Where an operation is."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    UNDOING = "undoing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    STUCK = "stuck"

    @property
    def final(self) -> bool:
        """Nothing more happens to an operation in a final state."""
        return self in FINAL


FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REJECTED, State.STUCK})


class StepState(StrEnum):
    """Where a step is."""

    PENDING = "pending"
    RUNNING = "running"
    RETRY = "retry"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class StepPlan:
    """A step as the canvas names it: its key within the operation, the task, where it runs."""

    key: str
    name: str
    host: str
    queue: str

    def as_dict(self) -> dict[str, str]:
        """As the journal keeps it."""
        return {"key": self.key, "name": self.name, "host": self.host, "queue": self.queue}


Stages = tuple[tuple[StepPlan, ...], ...]
"""The plan of an operation: stages one after the other, the steps within a stage side by side."""


@dataclass(frozen=True)
class StepRecord:
    """What is known of one step. Times in seconds since the epoch by Redis' clock.

    Of its attempts, `lost` ended in silence, as their worker died, `locked` met another process' lock, and `forgiven`
    are those up to the last one that got on before it broke off.
    """

    plan: StepPlan
    state: StepState = StepState.PENDING
    attempt: int = 0
    lost: int = 0
    locked: int = 0
    forgiven: int = 0
    fence: int = 0
    worker: str = ""
    due: float | None = None
    published: float | None = None
    publications: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    result: Any = None
    error: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Its name within the operation."""
        return self.plan.key

    def as_dict(self) -> dict[str, Any]:
        """As users see it."""
        took = self.ended_at - self.started_at if self.ended_at and self.started_at else None
        return {
            **self.plan.as_dict(),
            "state": self.state.value,
            "attempt": self.attempt,
            "fence": self.fence,
            "worker": self.worker,
            "due": self.due,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "seconds": took,
            "error": self.error,
            "result": self.result,
        }


@dataclass(frozen=True)
class UndoEntry:
    """How to undo what one step did: an action, its arguments, and the host that has to do it."""

    action: str
    host: str
    arguments: dict[str, Any]

    @property
    def subject(self) -> str:
        """Its arguments, for people."""
        return ", ".join(f"{name} {value}" for name, value in self.arguments.items())

    def as_json(self) -> str:
        """As the journal keeps it; equal entries are equal text."""
        return json.dumps({"action": self.action, "host": self.host, "arguments": self.arguments}, sort_keys=True)


@dataclass(frozen=True)
class Record:
    """All that is known of one operation."""

    id: str
    kind: str
    request: dict[str, Any]
    instance: str
    uuid: str
    host: str
    state: State
    stages: Stages = ()
    steps: dict[str, StepRecord] = field(default_factory=dict)
    undo: tuple[UndoEntry, ...] = ()
    undo_steps: tuple[StepRecord, ...] = ()
    cancel: float | None = None
    irrevocable: bool = False
    waited: bool = False
    task: str = ""
    held: float | None = None
    restored: float | None = None
    verdict: State | None = None
    error: dict[str, Any] | None = None
    submitted_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts that have, or may have, a part in it."""
        return frozenset(step.plan.host for step in (*self.steps.values(), *self.undo_steps))

    def following(self, key: str) -> tuple[StepRecord, ...]:
        """The steps whose turn comes once this one is done; none at the end, or while one beside it is not done."""
        if key.startswith(UNDO_STEP):
            number = int(key.removeprefix(UNDO_STEP))
            return self.undo_steps[max(number - 1, 0) : number]
        for stage, after in zip(self.stages, self.stages[1:], strict=False):
            if key in {plan.key for plan in stage}:
                done = all(self.steps[plan.key].state is StepState.DONE for plan in stage)
                return tuple(self.steps[plan.key] for plan in after) if done else ()
        return ()

    @property
    def result(self) -> Any:
        """What a succeeded operation answers: the result of its last step."""
        return list(self.steps.values())[-1].result if self.state is State.SUCCEEDED and self.steps else None

    def as_dict(self) -> dict[str, Any]:
        """The record as users, schedulers and `--json` see it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "instance": self.instance,
            "uuid": self.uuid,
            "host": self.host,
            "state": self.state.value,
            "request": _discreet(self.request),
            "result": self.result,
            "error": self.error,
            "cancel_requested": self.cancel is not None,
            "irrevocable": self.irrevocable,
            "submitted_at": self.submitted_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "seconds": self.ended_at - self.started_at if self.ended_at and self.started_at else None,
            "steps": [step.as_dict() for step in self.steps.values()],
            "undo": [
                {
                    "action": entry.action,
                    "host": entry.host,
                    "arguments": entry.arguments,
                    "state": step.state.value,
                    "error": step.error,
                }
                for entry, step in zip(self.undo, self.undo_steps, strict=True)
            ],
        }


def _discreet(request: dict[str, Any]) -> dict[str, Any]:
    """What is passed to the guest often holds passwords; who reads records need not read those."""
    hidden = {name: str(request[name]).encode(errors="replace") for name in DISCREET_FIELDS if request.get(name)}
    shown = {**request, **{name: f"<{len(value)} bytes>" for name, value in hidden.items()}}
    if isinstance(shown.get("image"), str):
        shown["image"] = re.sub(r"//[^/@]*@", "//", shown["image"])  # a login in an address
    return shown


def parse(operation_id: str, fields: dict[str, str], undo: list[str]) -> Record:
    """A record from its hash and its list of undo entries. Raises `RecordUnreadable`."""
    if int(fields.get("schema", 1)) > SCHEMA:
        raise RecordUnreadable(
            f"the record of operation {operation_id} is of a newer form ({fields['schema']}) than this version knows",
            hint="Bring all workers and clients to one version; the newer ones go on with it meanwhile.",
        )
    try:
        return _parsed(operation_id, fields, undo)
    except (KeyError, ValueError, TypeError) as error:
        raise RecordUnreadable(f"the record of operation {operation_id} is damaged: {error!r}") from error


def _parsed(operation_id: str, fields: dict[str, str], undo: list[str]) -> Record:
    head = json.loads(fields["head"])
    stages = tuple(tuple(StepPlan(**step) for step in stage) for stage in json.loads(fields.get("plan", "[]")))
    entries = tuple(UndoEntry(**json.loads(entry)) for entry in undo)
    return Record(
        id=operation_id,
        kind=head["kind"],
        request=head["request"],
        instance=head["instance"],
        uuid=head["uuid"],
        host=head["host"],
        details=head.get("details", {}),
        state=State(fields["state"]),
        stages=stages,
        steps={plan.key: _step(plan, fields) for stage in stages for plan in stage},
        undo=entries,
        undo_steps=tuple(_step(undo_plan(index, entry), fields) for index, entry in enumerate(entries)),
        cancel=None if "irrevocable" in fields else _number(fields.get("cancel")),
        irrevocable="irrevocable" in fields,
        waited="waited" in fields,
        task=fields.get("task", ""),
        held=_number(fields.get("held")),
        restored=_number(fields.get("restored")),
        verdict=State(fields["verdict"]) if fields.get("verdict") else None,
        error=json.loads(fields["error"]) if fields.get("error") else None,
        submitted_at=float(fields.get("submitted_at", 0)),
        started_at=_number(fields.get("started_at")),
        ended_at=_number(fields.get("ended_at")),
    )


def undo_plan(index: int, entry: UndoEntry) -> StepPlan:
    """Undoing is a step too: on the control queue of the host where the effect is."""
    return StepPlan(key=f"{UNDO_STEP}{index}", name="undo", host=entry.host, queue="control")


def _step(plan: StepPlan, fields: dict[str, str]) -> StepRecord:
    def get(name: str) -> str | None:
        return fields.get(f"step:{plan.key}:{name}")

    result, error = get("result"), get("error")
    return StepRecord(
        plan=plan,
        state=StepState(get("state") or StepState.PENDING),
        attempt=int(get("attempt") or 0),
        lost=int(get("lost") or 0),
        locked=int(get("locked") or 0),
        forgiven=int(get("forgiven") or 0),
        fence=int(get("fence") or 0),
        worker=get("worker") or "",
        due=_number(get("due")),
        published=_number(get("published")),
        publications=int(get("publications") or 0),
        started_at=_number(get("started_at")),
        ended_at=_number(get("ended_at")),
        result=json.loads(result) if result else None,
        error=json.loads(error) if error else None,
    )


def _number(value: str | None) -> float | None:
    return float(value) if value else None
