"""The reaper: finds operations that stand still and sets them going again.

It runs in every control worker; one leads by a lease. It looks only at operations whose time has come (see
`keys.ATTENTION`), so a tick costs the same with ten and with a hundred thousand operations in the journal.
"""

from __future__ import annotations

import math
import threading
import time
from typing import cast

import structlog

from worker.engine import keys
from worker.engine.advance import advance
from worker.engine.connection import Redis, shared, translated
from worker.engine.decide import End, Publish, TurnBack, Undo
from worker.engine.deferred import submit_due
from worker.engine.journal import Journal
from worker.engine.queues import QueueLook
from worker.engine.silence import silence
from worker.errors import BrokerUnavailable
from worker.settings import get_settings

log = structlog.get_logger(__name__)

BATCH = 50
BUDGET = 0.02
"""A tick looks at so many operations, for so many seconds, at the most: the leader renews its lease in time, and the
worker's other threads get their turn. Half of that may go to requests that the fleet submits itself."""

BREATH = 0.05
"""Seconds between two ticks while more operations are due than one tick could look at."""

LEADER_SHARE = 1 / 3
"""Of the lease's time to live: a step whose worker died together with the leader is not taken over later for that.
That two lead for a moment does no harm: what is published twice runs once."""

TRIM_EVERY = 60.0

_LEAD = """
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


class Reaper(threading.Thread):
    """Ticks until it is stopped."""

    def __init__(self, worker: str, redis: Redis | None = None) -> None:
        super().__init__(name="reaper", daemon=True)
        self.worker = worker
        self._redis = redis or shared()
        self._book = Journal(self._redis)
        self._lead = self._redis.register_script(_LEAD)
        self._ended = threading.Event()
        self._trimmed_at = -math.inf

    def run(self) -> None:
        """Tick, and survive whatever a tick meets."""
        more = False
        while not self._ended.wait(BREATH if more else get_settings().reaper_interval):
            try:
                more = self.tick()
            except BrokerUnavailable as error:
                log.warning("the reaper waits for Redis", error=str(error))
            except Exception:
                log.exception("a tick of the reaper failed")

    def stop(self) -> None:
        """End after the running tick."""
        self._ended.set()

    def tick(self) -> bool:
        """Submit requests and look at operations that are due, as the leader; whether some are left."""
        if not self._leads():
            return False
        self._trim()
        enough = time.monotonic() + BUDGET
        more = submit_due(self._redis, BATCH, seconds=BUDGET / 2)
        due, queues = self._book.due(BATCH), QueueLook(self._redis)
        for looked_at, operation_id in enumerate(due):
            if looked_at and time.monotonic() > enough:
                return True
            try:
                decision = advance(operation_id, queues=queues)
            except BrokerUnavailable:
                raise
            except Exception:
                # One operation that cannot be handled must not hold the others up.
                log.exception("cannot advance an operation", operation=operation_id)
                self._book.look_in(operation_id, 30, since=self._book.now())
            else:
                if isinstance(decision, Publish | Undo | TurnBack | End):
                    self._book.count(f"reaper:{type(decision).__name__.lower()}")
                log.debug("looked at", operation=operation_id, decision=repr(decision))
        return more or len(due) == BATCH

    def _trim(self) -> None:
        if time.monotonic() - self._trimmed_at > TRIM_EVERY:
            self._trimmed_at = time.monotonic()
            self._book.trim()

    def _leads(self) -> bool:
        ttl = int(get_settings().lease_ttl * LEADER_SHARE * 1000)
        with translated():
            leads = bool(cast("int", self._lead(keys=[keys.REAPER], args=[self.worker, ttl])))
        silence.answered()
        return leads
