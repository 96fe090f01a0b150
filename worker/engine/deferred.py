"""Requests that are submitted later by the fleet itself: due entries in Redis, admitted by the reaper."""

from __future__ import annotations

import json
import math
import time
from typing import Any, cast

import structlog

from worker.engine import keys
from worker.engine.connection import Redis, shared, translated
from worker.engine.journal import Journal
from worker.engine.kinds import kind_of
from worker.engine.operation import submit
from worker.engine.registry import Registry
from worker.errors import BrokerUnavailable, FleetError, HostsAreJoining

log = structlog.get_logger(__name__)


PUT_OFF = 60.0
"""Seconds until a request that cannot be read is tried again."""

LOOK_AGAIN = 5.0
"""Seconds until one that had better wait is looked at again."""


class _Later(Exception):
    """Not now."""


def defer(operation_id: str, kind: str, request: dict[str, Any], seconds: float) -> None:
    """Have a request of that kind submitted in `seconds` from now, under this id; the same id again changes nothing."""
    redis = shared()
    at = Journal(redis).now() + seconds
    with translated():
        pipe = redis.pipeline(transaction=True)
        pipe.hsetnx(keys.DEFERRED_REQUESTS, operation_id, json.dumps({"kind": kind, "request": request}))
        pipe.zadd(keys.DEFERRED, {operation_id: at}, nx=True)
        pipe.execute()


def forget(operation_id: str) -> None:
    """Do not submit it any more."""
    _forget(shared(), operation_id)


def submit_due(redis: Redis, limit: int, *, seconds: float = math.inf) -> bool:
    """Submit what is due, and begin with none after so many seconds; whether some may be left.

    An id is admitted once, so whoever dies here leaves nothing to be done twice.
    """
    enough = time.monotonic() + seconds
    now = Journal(redis).now()
    with translated():
        due = cast("list[str]", redis.zrangebyscore(keys.DEFERRED, "-inf", now, start=0, num=limit))
    for submitted, operation_id in enumerate(due):
        if submitted and time.monotonic() > enough:
            return True
        try:
            _submit(redis, operation_id)
        except HostsAreJoining:
            log.info("hosts are joining: tried again", operation=operation_id)
        except _Later:
            _put_off(redis, operation_id, now + LOOK_AGAIN)
        except BrokerUnavailable:
            raise
        except Exception:  # of another version, perhaps: one that cannot be read must not hold up everything else
            log.exception("cannot submit a deferred request; it is tried again", operation=operation_id)
            _put_off(redis, operation_id, now + PUT_OFF)
        else:
            _forget(redis, operation_id)
    return len(due) == limit


def _put_off(redis: Redis, operation_id: str, until: float) -> None:
    with translated():
        redis.zadd(keys.DEFERRED, {operation_id: until}, xx=True)


def _submit(redis: Redis, operation_id: str) -> None:
    with translated():
        found = cast("str | None", redis.hget(keys.DEFERRED_REQUESTS, operation_id))
    if found is None:
        return
    deferred = json.loads(found)
    try:
        kind = kind_of(deferred["kind"])
        request = kind.request.model_validate({**deferred["request"], "operation_id": operation_id})
        if request.can_wait(Registry(redis)):
            raise _Later
        submit(request)
    except BrokerUnavailable:
        raise
    except FleetError as error:
        log.warning("a deferred request was turned away", operation=operation_id, error=str(error))


def _forget(redis: Redis, operation_id: str) -> None:
    with translated():
        pipe = redis.pipeline(transaction=True)
        pipe.zrem(keys.DEFERRED, operation_id)
        pipe.hdel(keys.DEFERRED_REQUESTS, operation_id)
        pipe.execute()
