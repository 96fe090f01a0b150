"""The typed Python client: submit requests, follow operations, list what there is.

It writes to the journal itself, so a request is refused or accepted at once, also while no worker is up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import structlog

from tasks.hosts import ask_to_sync
from worker.engine.connection import be_brief, shared
from worker.engine.intervention import cancel, retry_undo
from worker.engine.journal import Journal
from worker.engine.operation import submit
from worker.engine.record import Record
from worker.engine.registry import Registry
from worker.engine.requests import Request
from worker.engine.stalled import why_stalled

FIRST_POLL, SLOWEST_POLL = 0.02, 0.2
"""Seconds between two looks at an operation (a look costs under a millisecond); short ones end soon."""

MOST_LOOKED_AT = 10_000
"""Unfinished operations that a search for those that do not move goes through."""


@dataclass(frozen=True)
class Sight:
    """An operation at one moment: its record, and how far its running steps are."""

    record: Record
    progress: dict[str, dict[str, Any]]


class Fleet:
    """The fleet behind the Redis of the settings (`VIRTFLEET_REDIS_URL`).

    Every method raises `BrokerUnavailable` within seconds when Redis does not answer.
    """

    def __init__(self) -> None:
        _log_through_logging()
        be_brief()
        self.journal = Journal(shared())
        self.registry = Registry(shared())

    def submit(self, request: Request) -> Record:
        """Accept a request (`SpawnRequest`, `ShutdownRequest`, ...) as an operation; its record as it is then.

        Raises errors of the kind `BadInput`, `InstanceBusy`, `OperationConflict`.
        """
        return submit(request)

    def cancel(self, operation_id: str, *, give_up: bool = False) -> Record:
        """Ask an operation to stop; with `give_up` also one that is `irrevocable`. Raises `OperationNotFound`."""
        return cancel(operation_id, give_up=give_up)

    def retry_undo(self, operation_id: str) -> Record:
        """Try again to undo an operation that is stuck. Raises `OperationNotFound`, `InvalidState`, `InstanceBusy`."""
        return retry_undo(operation_id)

    def stalled(self, limit: int) -> list[tuple[Record, str]]:
        """Operations that do not move, with the reason: at most `limit`, however many do move."""
        now = self.journal.now()
        records = {
            record.id: record for record in [*self.journal.stuck(limit), *self.journal.unfinished(MOST_LOOKED_AT)]
        }
        alive = cache(self.registry.alive)
        reasons = ((record, why_stalled(record, self._leases(record), now, alive)) for record in records.values())
        return list(islice(((record, why) for record, why in reasons if why), limit))

    def _leases(self, record: Record) -> dict[str, float]:
        return self.journal.leases(record, [*record.steps.values(), *record.undo_steps])

    def watch(self, operation_id: str) -> Iterator[Sight]:
        """The operation again and again until it has ended. Raises `OperationNotFound`."""
        pause = FIRST_POLL
        while True:
            sight = Sight(self.journal.read(operation_id), self.journal.progress(operation_id))
            yield sight
            if sight.record.state.final:
                return
            time.sleep(pause)
            pause = min(pause * 1.2, SLOWEST_POLL)

    def wait(self, operation_id: str, timeout: float | None = None) -> Record:
        """The operation's record once it has ended. Raises `TimeoutError` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for sight in self.watch(operation_id):
            if sight.record.state.final:
                return sight.record
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation_id} is still {sight.record.state} after {timeout} s")
        raise AssertionError("a watch ends with a final state")

    def sync(self, host: str, timeout: float = 30.0) -> dict[str, Any]:
        """Have a host's control worker rebuild its part of the registry. Raises `HostUnreachable`, `UnknownHost`."""
        return ask_to_sync(host, timeout)


def _log_through_logging() -> None:
    """Leave logs to the program that uses this client: unconfigured, structlog prints them to standard output."""
    if not structlog.is_configured():
        structlog.configure(
            processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
            wrapper_class=structlog.stdlib.BoundLogger,
            logger_factory=structlog.stdlib.LoggerFactory(),
        )
