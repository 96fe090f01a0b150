"""Every key the fleet keeps in Redis: type, time to live, who writes it, who reads it.

Times are seconds since the epoch by Redis' own clock, so that hosts need not agree on theirs.
"""

from __future__ import annotations

PREFIX = "virtfleet"

OPERATIONS = f"{PREFIX}:operations"
"""ZSET, kept: operation id → time of admission. Written by admission, trimmed by the reaper, read by listings."""

ATTENTION = f"{PREFIX}:attention"
"""ZSET, kept: id of each operation that has not ended → when the reaper must look at it next. Every change of an
operation sets it, so a look costs nothing for operations that go well, however many there are. With NOT_BEGUN added
those that nobody has begun with come after all others, whose recovery does not wait in line behind them."""

NOT_BEGUN = 1e10
"""Seconds: more than any time is. As in lua/common.lua."""

HELD = f"{PREFIX}:held"
"""SET, kept: ids of operations that Redis had lost and a host has put back, until each of their hosts has been heard.
Written as records are put back, emptied as they go on or end, read by every host that may know how one ended."""

STUCK = f"{PREFIX}:stuck"
"""ZSET, kept: id of each operation that could not be undone → when it got stuck. Written as operations end, emptied by
retrying their undo, read by listings and metrics."""

FENCE = f"{PREFIX}:fence"
"""STRING, kept: the last fence handed out; never below Redis' clock in µs, so it grows even after FLUSHALL."""

REAPER = f"{PREFIX}:reaper"
"""STRING, expires: name of the worker whose reaper leads. Written and renewed by that reaper."""

COUNTERS = f"{PREFIX}:counters"
"""HASH, kept: `step:<name>:<outcome>` and `reaper:<deed>` → how often. Counted by steps and the reaper, read by the
metrics."""

DEFERRED = f"{PREFIX}:deferred"
"""ZSET, kept: id of each operation that the fleet will ask for itself → when. Written by steps, read by the reaper."""

DEFERRED_REQUESTS = f"{PREFIX}:deferred:requests"
"""HASH, kept: operation id → JSON of the kind and the request. Written together with DEFERRED."""

HOSTS = f"{PREFIX}:hosts"
"""HASH, kept: host → JSON `HostRecord`. Written by control workers as they start, read by admission and the CLI."""

SETTLING = f"{PREFIX}:settling"
"""STRING, expires: the last host that joined with instances of which Redis knew nothing, as it has lost its memory.
Until then other hosts, and what is on them, may still be missing. Written as hosts join, read by admission."""

INSTANCES = f"{PREFIX}:instances"
"""HASH, kept: instance name → JSON `Instance`. Written by steps and by a host's sync, read by admission and the CLI."""

UUIDS = f"{PREFIX}:instances:uuid"
"""HASH, kept: instance uuid → name. Written together with INSTANCES."""


SNAPSHOTS = f"{PREFIX}:snapshots"
"""HASH, kept: snapshot id → JSON `SnapshotEntry`. Written by steps and by a host's sync from the manifests there, read
by admission and the CLI."""


def operation(operation_id: str) -> str:
    """HASH, expires once ended: the operation's record. Fields: schema, head, digest, plan, state, cancel, irrevocable,
    waited (for its instance), task (by which a request came that was turned away), verdict, error, submitted_at,
    started_at, ended_at, held (since when it was put back and waits for its hosts), restored (when who executes it put
    it back), and `step:<key>:<field>`
    with the fields state, fence, attempt, lost, locked, forgiven, worker, due, published, publications, started_at,
    ended_at, result, error."""
    return f"{PREFIX}:op:{operation_id}"


def undo(operation_id: str) -> str:
    """LIST, expires with its operation: JSON `UndoEntry`, newest last. Pushed by steps before they change something,
    read by whoever undoes."""
    return f"{operation(operation_id)}:undo"


def progress(operation_id: str) -> str:
    """HASH, deleted when the operation ends: step key → JSON of bytes done, total, rate, eta. Written by the running
    step at most twice a second, read by watchers."""
    return f"{operation(operation_id)}:progress"


def waiters(operation_id: str) -> str:
    """LIST, deleted when they are answered: Celery tasks (id, worker) whose result is this operation's final record."""
    return f"{operation(operation_id)}:waiters"


def unwanted(operation_id: str) -> str:
    """STRING, expires after an hour: nothing was known of the operation when it was asked to stop; its request may wait
    in a queue. Written by cancelling; admission deletes it, and the operation ends at once."""
    return f"{PREFIX}:unwanted:{operation_id}"


def lease(operation_id: str, step: str) -> str:
    """STRING, expires after the lease's time to live: token of the worker that executes the step right now."""
    return f"{PREFIX}:lease:{operation_id}:{step}"


def claim(instance: str) -> str:
    """STRING, deleted when its owner ends: id of the one operation that may change this instance."""
    return f"{PREFIX}:claim:{instance}"


def waiting(instance: str) -> str:
    """LIST, deleted when empty: ids of operations that wait for the instance's claim, in order."""
    return f"{PREFIX}:waiting:{instance}"


def gone(instance: str) -> str:
    """STRING, expires with the records: JSON of which operation destroyed the instance, so that asking again is met
    with success and a mistyped name is not."""
    return f"{PREFIX}:gone:{instance}"


def stopping(worker: str) -> str:
    """STRING, expires: from when on the steps of a worker that was told to stop must hand over. Written by the worker,
    deleted as it starts, read with each renewal of a lease."""
    return f"{PREFIX}:stopping:{worker}"


def alive(host: str, kind: str) -> str:
    """STRING, expires after three heartbeats: JSON of the worker (`control` or `disk`) that serves the host."""
    return f"{PREFIX}:alive:{host}:{kind}"
