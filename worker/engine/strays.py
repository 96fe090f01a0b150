"""What was left behind in Redis: claims, leases and operations that nobody sees to; and who is not over yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import cast

from worker.engine import keys
from worker.engine.advance import see_to
from worker.engine.connection import Redis, translated
from worker.engine.journal import Journal
from worker.engine.mirror import Copy, Mirror
from worker.engine.record import Record, State, StepRecord, StepState
from worker.engine.registry import Registry
from worker.engine.stalled import why_stalled
from worker.errors import RecordUnreadable
from worker.findings import Severity, Suspect, suspect


def owners(book: Journal) -> frozenset[str]:
    """Ids of the operations that are not over, with the uuids and names of their instances.

    Those too that Redis has lost and this host remembers: they are put back within seconds.
    """
    names = {one for one, state in book.states().items() if not state.final}
    records = [record for record in (_read(book, one) for one in names) if record]
    lost = [_names(copy) for copy in Mirror().copies() if book.state(copy.operation) is None]
    return frozenset(names.union(*({record.uuid, record.instance} for record in records), *lost) - {""})


def owners_by_host() -> frozenset[str]:
    """The same as far as this host knows by itself, while Redis is away."""
    return frozenset(set[str]().union(*map(_names, Mirror().copies())) - {""})


def _names(copy: Copy) -> set[str]:
    head = json.loads(copy.fields["head"])
    return {copy.operation, head["uuid"], head["instance"]}


def claims(book: Journal) -> Iterator[Suspect]:
    """Instances that are claimed by nobody who lives, or waited for in vain."""
    for instance in sorted({*_scan(book.redis, keys.claim("")), *_scan(book.redis, keys.waiting(""))}):
        with translated():
            owner = cast("str | None", book.redis.get(keys.claim(instance)))
        state = book.state(owner) if owner else None
        with translated():
            queue = cast("list[str]", book.redis.lrange(keys.waiting(instance), 0, -1))
            changed = book.redis.get(keys.claim(instance)) != owner
        if changed or (state and not state.final) or not (owner or queue):
            continue  # owned, or free since it was scanned
        over = f"has ended ({state})" if state else "does not exist"
        held = f"is claimed by operation {owner}, which {over}" if owner else "is free"
        yield suspect(
            Severity.WARNING,
            "stale_claim",
            f"instance {instance!r} {held}" + (f"; {len(queue)} operations wait for it" if queue else ""),
            where=keys.claim(instance),
            remedy="virtfleet doctor --fix frees it; who waits for it has it next.",
            repair=partial(_release, book, instance),
        )


def _release(book: Journal, instance: str) -> None:
    heir = book.release(instance)
    if heir:
        see_to(heir)


def leases(book: Journal) -> Iterator[Suspect]:
    """Leases of steps that nobody executes."""
    for name in sorted(_scan(book.redis, keys.lease("", "").removesuffix(":"))):
        operation_id, _, step = name.partition(":")
        record = _read(book, operation_id)
        running = {one.key for one in _steps(record) if one.state is StepState.RUNNING} if record else set()
        with translated():
            still_there = book.redis.exists(keys.lease(operation_id, step))
        if not still_there or (record and step in running and not record.state.final):
            continue
        over = f"has ended ({record.state})" if record and record.state.final else "does not run it"
        yield suspect(
            Severity.WARNING,
            "stale_lease",
            f"a lease on step {step!r} of operation {operation_id}, which {over if record else 'does not exist'}",
            where=keys.lease(operation_id, step),
            remedy="virtfleet doctor --fix removes it; it also expires by itself, if nobody renews it.",
            repair=partial(_drop_lease, book, operation_id, step),
        )


def _drop_lease(book: Journal, operation_id: str, step: str) -> None:
    book.drop_lease(operation_id, step)


def operations(book: Journal) -> Iterator[Suspect]:
    """Operations that do not move, or that could not be undone."""
    for operation_id, state in book.states().items():
        if state.final and state is not State.STUCK:
            continue
        record = _read(book, operation_id)
        if record:
            yield from _stalled(book, record)
            yield from _unattended(book, record)
        elif book.state(operation_id) is not None:
            what = f"the record of an operation that is {state} cannot be read: damaged, or of a newer version"
            remedy = "Bring all workers to one version."
            yield suspect(Severity.ERROR, "unreadable_record", what, where=keys.operation(operation_id), remedy=remedy)


def _stalled(book: Journal, record: Record) -> Iterator[Suspect]:
    why = why_stalled(record, book.leases(record, _steps(record)), book.now(), Registry(book.redis).alive)
    if not why or book.find(record.id) != record:
        return  # it moves, or moved while it was looked at
    what = f"{record.kind} of {record.instance!r} is {record.state}: {why}"
    see = f"See what stands in the way: virtfleet operation {record.id}"
    if record.state is State.STUCK:
        remedy = f"{see}; remove that, then try again: virtfleet operation retry-undo {record.id}"
        yield suspect(Severity.ERROR, "stuck_operation", what, where=record.id, remedy=remedy)
    else:
        remedy = f"{see}; to end and undo it: virtfleet cancel {record.id}"
        yield suspect(Severity.WARNING, "stalled_operation", what, where=record.id, remedy=remedy)


def _unattended(book: Journal, record: Record) -> Iterator[Suspect]:
    with translated():
        attended = book.redis.zscore(keys.ATTENTION, record.id)
    now = book.state(record.id)
    if attended is None and now and not now.final:
        yield suspect(
            Severity.ERROR,
            "unattended_operation",
            f"{record.kind} of {record.instance!r} is {record.state}, and the reaper does not know of it",
            where=record.id,
            remedy="virtfleet doctor --fix has the reaper look at it.",
            repair=partial(book.attend, record.id),
        )


def _read(book: Journal, operation_id: str) -> Record | None:
    try:
        return book.find(operation_id)
    except RecordUnreadable:
        return None  # told by `operations`; one such record must not hide what is wrong with the others


def _steps(record: Record) -> Iterable[StepRecord]:
    return (*record.steps.values(), *record.undo_steps)


def _scan(redis: Redis, prefix: str) -> Iterator[str]:
    """What follows the prefix in each key that has it."""
    with translated():
        for key in redis.scan_iter(match=f"{prefix}*", count=1000):
            yield str(key).removeprefix(prefix)
