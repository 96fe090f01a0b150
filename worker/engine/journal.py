"""The journal: the durable record of operations and their steps in Redis, changed only by atomic scripts.

Each method is one script in `lua/`, whose first lines say what it promises. Nothing here decides anything.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, cast

import structlog

from worker.engine import keys
from worker.engine.connection import Redis, shared, text, translated
from worker.engine.record import SCHEMA, Record, Stages, State, StepRecord, UndoEntry, parse
from worker.engine.silence import silence
from worker.errors import OperationNotFound, RecordUnreadable
from worker.settings import get_settings

log = structlog.get_logger(__name__)

Answer = Literal["yours", "done", "leased", "early", "cancel", "ended", "gone", "newer", "unowned"]
Phase = Literal["run", "undo"]
Outcome = Literal["done", "retry", "failed"]
Kept = Literal["held", "stop", "leave", "lost", "gone"]
Committed = Literal["ok", "refused", "gone"]
Waiter = tuple[str, str]
"""A Celery task whose result is an operation's final record: its id, and the worker that took it."""
Revived = Literal["put back", "completed", ""]

TRIM_BATCH = 500
"""Ids that one `trim` looks at: it runs within the reaper's tick."""

UNWANTED = 3600
"""Seconds that a cancel is kept of which nothing is known: its request may wait in a queue for a worker."""

_OPERATION_PREFIX = keys.operation("")


@functools.cache
def _source(name: str) -> str:
    lua = resources.files("worker.engine").joinpath("lua")
    return "\n".join(lua.joinpath(f"{part}.lua").read_text() for part in ("common", name))


@dataclass(frozen=True)
class Admission:
    """What became of a request for admission."""

    outcome: Literal["admitted", "exists", "busy"]
    detail: str


@dataclass(frozen=True)
class Lease:
    """The right to execute one step, as long as it is renewed."""

    operation: str
    step: str
    token: str
    fence: int
    attempt: int
    worker: str
    asked_at: float = field(compare=False)
    """When it was asked for, by this machine's monotonic clock: it runs from there, whenever its holder hears of it."""
    fields: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """The operation's record of the instant in which the lease was taken, as Redis held it; and its undo entries."""
    undo: list[str] = field(default_factory=list, compare=False, repr=False)


class Journal:
    """Reads and writes the records of operations. Raises `BrokerUnavailable` while Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._scripts: dict[str, Callable[..., Any]] = {}
        self._trimmed_to = 0

    def _run(self, script: str, script_keys: Iterable[str], *args: Any) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.redis.register_script(_source(script))
        with translated():
            answer = self._scripts[script](keys=list(script_keys), args=[text(arg) for arg in args])
        silence.answered()
        return answer

    def now(self) -> float:
        """Seconds since the epoch by Redis' clock."""
        with translated():
            seconds, micro = self.redis.time()
        return seconds + micro / 1e6

    def uptime(self) -> float:
        """Seconds since Redis started."""
        with translated():
            return float(self.redis.info("server")["uptime_in_seconds"])

    # --- taking in -----------------------------------------------------------------------------------------------

    def admit(
        self,
        operation_id: str,
        head: dict[str, Any],
        digest: str,
        stages: Stages,
        *,
        wait: bool,
        waiter: Waiter | None = None,
    ) -> Admission:
        """Write a new operation down and claim its instance; `waiter` is told of its end."""
        instance = head["instance"]
        plan = [[step.as_dict() for step in stage] for stage in stages]
        outcome, detail = self._run(
            "admit",
            [
                keys.operation(operation_id),
                keys.claim(instance),
                keys.waiting(instance),
                keys.ATTENTION,
                keys.OPERATIONS,
                keys.waiters(operation_id),
                keys.unwanted(operation_id),
            ],
            operation_id,
            digest,
            get_settings().publish_grace,
            "1" if wait else "",
            _OPERATION_PREFIX,
            " ".join(waiter or ()),
            *("schema", SCHEMA, "head", json.dumps(head), "plan", json.dumps(plan)),
        )
        return Admission(outcome, detail)

    def reject(self, operation_id: str, head: dict[str, Any], error: dict[str, Any], task: str = "") -> None:
        """Keep a record of a request that was turned away, and of the Celery `task` that it came by."""
        self._run(
            "reject",
            [keys.operation(operation_id), keys.OPERATIONS],
            operation_id,
            int(get_settings().keep_records),
            *("schema", SCHEMA, "head", json.dumps(head), "error", json.dumps(error), "task", task),
        )

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, operation_id: str) -> Record:
        """The record of an operation. Raises `OperationNotFound`."""
        record = self.find(operation_id)
        if record is None:
            raise OperationNotFound(f"no operation {operation_id!r} is in the journal")
        return record

    def find(self, operation_id: str) -> Record | None:
        """The record of an operation, if there is one. Raises `RecordUnreadable`."""
        fields, undo = self.dump(operation_id)
        return parse(operation_id, fields, undo) if fields else None

    def state(self, operation_id: str) -> State | None:
        """Where an operation is, if there is one; what was turned away at admission, and so has no plan, is none."""
        with translated():
            state, plan = cast("list[str | None]", self.redis.hmget(keys.operation(operation_id), ["state", "plan"]))
        turned_away = state == State.REJECTED and not plan
        return State(state) if state and not turned_away else None

    def dump(self, operation_id: str) -> tuple[dict[str, str], list[str]]:
        """An operation's fields and undo entries as Redis holds them, of one instant."""
        with translated():
            pipe = self.redis.pipeline(transaction=True)
            pipe.hgetall(keys.operation(operation_id))
            pipe.lrange(keys.undo(operation_id), 0, -1)
            fields, undo = pipe.execute()
        return fields, undo

    def latest(self, limit: int) -> list[Record]:
        """Records of operations, newest first."""
        return self._listed(keys.OPERATIONS, limit)

    def unfinished(self, limit: int) -> list[Record]:
        """Records of operations that have not ended, newest first; the longest overdue, if there are more."""
        return self._listed(keys.ATTENTION, limit, newest=False)

    def stuck(self, limit: int) -> list[Record]:
        """Records of operations that could not be undone, newest first."""
        return self._listed(keys.STUCK, limit)

    def _listed(self, listing: str, limit: int, *, newest: bool = True) -> list[Record]:
        with translated():
            ids = cast("list[str]", self.redis.zrange(listing, 0, limit - 1, desc=newest))
        records = [record for record in map(self._readable, ids) if record]
        return sorted(records, key=lambda record: record.submitted_at, reverse=True)

    def _readable(self, operation_id: str) -> Record | None:
        """A record for a listing, which one that cannot be read must not spoil."""
        try:
            return self.find(operation_id)
        except RecordUnreadable as error:
            log.warning("left out of the listing", operation=operation_id, error=error.message)
            return None

    def count_stuck(self) -> int:
        """How many operations could not be undone."""
        with translated():
            return int(self.redis.zcard(keys.STUCK))

    def leases(self, record: Record, steps: Iterable[StepRecord]) -> dict[str, float]:
        """Seconds that the lease of each of these steps still runs, for those that are leased."""
        wanted = [step.key for step in steps]
        if not wanted:
            return {}
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            for key in wanted:
                pipe.pttl(keys.lease(record.id, key))
            left = pipe.execute()
        return {key: ms / 1000 for key, ms in zip(wanted, left, strict=True) if ms > 0}

    def due(self, limit: int) -> list[str]:
        """Ids of operations whose time to be looked at has come: those that have begun, then others, oldest first."""
        now = self.now()
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            pipe.zrangebyscore(keys.ATTENTION, "-inf", now, start=0, num=limit)
            pipe.zrangebyscore(keys.ATTENTION, keys.NOT_BEGUN, keys.NOT_BEGUN + now, start=0, num=limit)
            begun, others = cast("tuple[list[str], list[str]]", pipe.execute())
        return [*begun, *others][:limit]

    def look_in(self, operation_id: str, seconds: float, *, since: float) -> None:
        """Have the reaper look at an operation that has not ended in `seconds` from now, or sooner if it must.

        `since`: when the record was read that shows nothing to do; what has changed later is looked at.
        """
        self._run("look_in", [keys.operation(operation_id), keys.ATTENTION], operation_id, seconds, since)

    def forget_attention(self, operation_id: str) -> None:
        """Nothing is left to look at."""
        with translated():
            self.redis.zrem(keys.ATTENTION, operation_id)

    # --- executing -----------------------------------------------------------------------------------------------

    def acquire(
        self, operation_id: str, step: str, instance: str, *, worker: str, token: str, phase: Phase
    ) -> tuple[Answer, Lease | None]:
        """Ask to execute a step on an instance; with the answer "yours" comes a lease."""
        asked_at = time.monotonic()
        answer = self._run(
            "acquire",
            [
                keys.operation(operation_id),
                keys.lease(operation_id, step),
                keys.ATTENTION,
                keys.FENCE,
                keys.undo(operation_id),
                keys.claim(instance),
                keys.waiting(instance),
            ],
            *(operation_id, step, worker, token, _ttl_ms(), phase, SCHEMA, _OPERATION_PREFIX),
        )
        if answer[0] != "yours":
            return answer[0], None
        _, fence, attempt, flat, undo = answer
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return "yours", Lease(operation_id, step, token, int(fence), int(attempt), worker, asked_at, fields, undo)

    def renew(self, lease: Lease) -> tuple[Kept, bool]:
        """Keep a lease; also says whether a cancel was asked for."""
        kept, cancel = self._run(
            "renew",
            [
                keys.operation(lease.operation),
                keys.lease(lease.operation, lease.step),
                keys.stopping(lease.worker),
            ],
            *(lease.step, lease.token, lease.fence, _ttl_ms()),
        )
        return kept, bool(cancel)

    def leave_from(self, worker: str, seconds: float | None) -> None:
        """Have the steps of a worker hand over in so many seconds; None: its steps may stay."""
        with translated():
            if seconds is None:
                self.redis.delete(keys.stopping(worker))
            else:
                self.redis.set(keys.stopping(worker), f"{self.now() + seconds:.0f}", ex=int(seconds) + 3600)

    def count(self, name: str) -> None:
        """Count a deed for the metrics."""
        with translated():
            self.redis.hincrby(keys.COUNTERS, name, 1)

    def commit(
        self, lease: Lease, outcome: Outcome, *, look_in: float, verdict: State | None = None, **fields: Any
    ) -> Committed:
        """Put down how a step ended. With `verdict`, the operation turns back in the same instant."""
        # default: an error's details are for reading; one that JSON does not know must not keep a step from ending.
        pairs = [part for name, value in fields.items() for part in (name, json.dumps(value, default=str))]
        answer = self._run(
            "commit",
            [
                keys.operation(lease.operation),
                keys.lease(lease.operation, lease.step),
                keys.ATTENTION,
                keys.COUNTERS,
            ],
            *(lease.operation, lease.step, lease.token, lease.fence, outcome, look_in, verdict or "", *pairs),
        )
        return cast("Committed", answer)

    def push_undo(self, lease: Lease, entry: UndoEntry) -> Committed:
        """Put down how to undo what is about to be done."""
        answer = self._run(
            "push_undo",
            [keys.operation(lease.operation), keys.undo(lease.operation)],
            *(lease.step, lease.fence, entry.as_json()),
        )
        return cast("Committed", answer)

    def make_irrevocable(self, lease: Lease) -> Literal["ok", "cancel", "refused", "gone"]:
        """Have the operation go forward only; `cancel` when it was asked to stop before."""
        answer = self._run("make_irrevocable", [keys.operation(lease.operation)], lease.step, lease.fence)
        return cast('Literal["ok", "cancel", "refused", "gone"]', answer)

    def mark_published(self, operation_id: str, steps: Iterable[StepRecord]) -> None:
        """Remember that messages for these steps went out just now."""
        pairs = [part for step in steps for part in (step.key, step.attempt)]
        self._run("mark_published", [keys.operation(operation_id)], *pairs)

    def restore(self, lease: Lease, fields: dict[str, str], undo: list[str]) -> bool:
        """Put back a record that Redis has lost, and the lease; True when something was put back."""
        head = json.loads(fields["head"])
        pairs = [part for pair in fields.items() for part in pair]
        return bool(
            self._run(
                "restore",
                [
                    keys.operation(lease.operation),
                    keys.claim(head["instance"]),
                    keys.undo(lease.operation),
                    keys.ATTENTION,
                    keys.OPERATIONS,
                    keys.FENCE,
                    keys.lease(lease.operation, lease.step),
                    keys.waiting(head["instance"]),
                    keys.HELD,
                ],
                *(lease.operation, lease.step, lease.token, lease.fence, _ttl_ms()),
                *(fields["submitted_at"], _OPERATION_PREFIX, len(undo), *undo, *pairs),
            )
        )

    def revive(self, operation_id: str, fence: int, fields: dict[str, str], undo: list[str]) -> Revived:
        """Put back a record that Redis has lost and nobody executes, or add to one that is held what it lacks."""
        instance = json.loads(fields["head"])["instance"]
        pairs = [part for pair in fields.items() for part in pair]
        answer = self._run(
            "revive",
            [
                keys.operation(operation_id),
                keys.claim(instance),
                keys.undo(operation_id),
                keys.ATTENTION,
                keys.OPERATIONS,
                keys.FENCE,
                keys.waiting(instance),
                keys.HELD,
            ],
            *(operation_id, fence, fields["submitted_at"], _OPERATION_PREFIX, len(undo), *undo, *pairs),
        )
        return cast("Revived", answer)

    def let_go(self, operation_id: str) -> None:
        """Have an operation go on that was held since it was put back."""
        with translated():
            pipe = self.redis.pipeline(transaction=True)
            pipe.hdel(keys.operation(operation_id), "held")
            pipe.srem(keys.HELD, operation_id)
            pipe.execute()

    def held(self) -> list[str]:
        """Ids of the operations that were put back and wait for what their other hosts know."""
        with translated():
            return sorted(cast("set[str]", self.redis.smembers(keys.HELD)))

    # --- turning back and ending ---------------------------------------------------------------------------------

    def cancel(self, operation_id: str, *, give_up: bool = False, on_arrival: bool = False) -> State:
        """Ask an operation to stop; the state it was in. `give_up`: also one that can only go forward.

        Raises `OperationNotFound`. With `on_arrival` it is cancelled should it be asked for within an hour.
        """
        subjects = [keys.operation(operation_id), keys.ATTENTION, keys.unwanted(operation_id)]
        kept = UNWANTED if on_arrival else 0
        state = self._run("cancel", subjects, operation_id, "1" if give_up else "", kept)
        if not state:
            raise OperationNotFound(f"no operation {operation_id!r} is in the journal")
        return State(state)

    def retry_undo(self, record: Record) -> tuple[str, str]:
        """Let an operation that is stuck try its undo again; what came of it: ok, state, busy or gone, and a detail."""
        answer = self._run(
            "retry_undo",
            [
                keys.operation(record.id),
                keys.claim(record.instance),
                keys.undo(record.id),
                keys.ATTENTION,
                keys.STUCK,
            ],
            *(record.id, _OPERATION_PREFIX),
        )
        return answer[0], answer[1] if len(answer) > 1 else ""

    def begin_undo(self, operation_id: str, verdict: State, error: dict[str, Any]) -> None:
        """Turn an operation back; it will end in `verdict`."""
        self._run(
            "begin_undo",
            [keys.operation(operation_id), keys.ATTENTION],
            *(operation_id, verdict, json.dumps(error)),
        )

    def conclude(self, record: Record, state: State) -> tuple[bool, str]:
        """End an operation; whether this call did it, and the id of the operation that has the instance next."""
        keep = 0 if state is State.STUCK else int(get_settings().keep_records)
        first, heir = self._run(
            "conclude",
            [
                keys.operation(record.id),
                keys.claim(record.instance),
                keys.waiting(record.instance),
                keys.ATTENTION,
                keys.progress(record.id),
                keys.undo(record.id),
                keys.waiters(record.id),
                keys.STUCK,
                keys.HELD,
            ],
            *(record.id, state, keep, _OPERATION_PREFIX),
        )
        return bool(first), heir

    def trim(self) -> int:
        """Take the ids of records that have expired out of the listing; how many there were."""
        before = self.now() - get_settings().keep_records
        with translated():
            ids = cast(
                "list[str]",
                self.redis.zrangebyscore(keys.OPERATIONS, "-inf", before, start=self._trimmed_to, num=TRIM_BATCH),
            )
            pipe = self.redis.pipeline(transaction=False)
            for operation_id in ids:
                pipe.exists(keys.operation(operation_id))
            gone = [one for one, there in zip(ids, pipe.execute(), strict=True) if not there]
            # Records that are kept (stuck ones) must not be read again and again: go on behind them next time.
            self._trimmed_to = self._trimmed_to + len(ids) - len(gone) if len(ids) == TRIM_BATCH else 0
            return int(self.redis.zrem(keys.OPERATIONS, *gone)) if gone else 0

    # --- those who wait for the end ------------------------------------------------------------------------------

    def wait_for(self, operation_id: str, waiter: Waiter) -> bool:
        """Let a Celery task's result be the final record; False when the operation has ended already."""
        script_keys = [keys.operation(operation_id), keys.waiters(operation_id)]
        return bool(self._run("wait_for", script_keys, " ".join(waiter)))

    def waiters(self, operation_id: str) -> list[Waiter]:
        """The Celery tasks to be answered."""
        with translated():
            waiting = cast("list[str]", self.redis.lrange(keys.waiters(operation_id), 0, -1))
        return [(task_id, worker) for task_id, _, worker in (one.partition(" ") for one in waiting)]

    def waiter_answered(self, operation_id: str, task_id: str, worker: str) -> None:
        """One of them has its answer."""
        with translated():
            self.redis.lrem(keys.waiters(operation_id), 0, f"{task_id} {worker}")

    # --- progress ------------------------------------------------------------------------------------------------

    def report(self, operation_id: str, step: str, report: dict[str, Any]) -> None:
        """Say how far a step is."""
        with translated():
            self.redis.hset(keys.progress(operation_id), step, json.dumps(report))

    def progress(self, operation_id: str) -> dict[str, dict[str, Any]]:
        """How far each step is that has said so."""
        with translated():
            reports = cast("dict[str, str]", self.redis.hgetall(keys.progress(operation_id)))
        return {step: json.loads(report) for step, report in reports.items()}

    # --- what was left behind ------------------------------------------------------------------------------------

    def states(self) -> dict[str, State]:
        """Where every operation is, by id: those that are listed, and those that the reaper looks at."""
        with translated():
            listed = cast("list[str]", self.redis.zrange(keys.OPERATIONS, 0, -1))
            attended = cast("list[str]", self.redis.zrange(keys.ATTENTION, 0, -1))
            ids = list(dict.fromkeys([*listed, *attended]))
            pipe = self.redis.pipeline(transaction=False)
            for operation_id in ids:
                pipe.hget(keys.operation(operation_id), "state")
            found = cast("list[str | None]", pipe.execute())
        return {one: State(state) for one, state in zip(ids, found, strict=True) if state}

    def release(self, instance: str) -> str:
        """Free an instance whose owner has ended or is gone; the id of the operation that has it then, or ""."""
        script_keys = [keys.claim(instance), keys.waiting(instance), keys.ATTENTION]
        return str(self._run("release", script_keys, _OPERATION_PREFIX))

    def drop_lease(self, operation_id: str, step: str) -> bool:
        """Remove the lease of a step that nobody executes; False when it is executed."""
        script_keys = [keys.operation(operation_id), keys.lease(operation_id, step)]
        return bool(self._run("drop_lease", script_keys, step))

    def inherit(self, operation_id: str, step: str, error: dict[str, Any], *, dead: str, living: str) -> bool:
        """Have a step tried again now if its lease's token begins with `dead`, and not with `living`; whether it did.

        `error` says what became of the attempt.
        """
        script_keys = [keys.operation(operation_id), keys.lease(operation_id, step), keys.ATTENTION]
        return bool(self._run("inherit", script_keys, operation_id, step, dead, living, json.dumps(error)))

    def outgrow(self, fence: int) -> None:
        """Hand out only higher fences from now on: a host has seen this one, from a Redis that was lost since."""
        self._run("outgrow", [keys.FENCE], fence)

    def attend(self, operation_id: str) -> None:
        """Have the reaper look now at an operation that has not ended."""
        self._run("attend", [keys.operation(operation_id), keys.ATTENTION], operation_id)


def _ttl_ms() -> int:
    return int(get_settings().lease_ttl * 1000)


def journal() -> Journal:
    """This process' journal."""
    return Journal(shared())
