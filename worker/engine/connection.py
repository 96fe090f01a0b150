"""The connection to Redis: opened once per process, fails fast, and speaks in the fleet's own errors."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import redis
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.app import app
from worker.engine.silence import silence
from worker.errors import BrokerUnavailable
from worker.settings import get_settings

Redis = redis.Redis
"""A client whose answers are text."""

UNAVAILABLE = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.InvalidResponse,
    redis.exceptions.NoPermissionError,
    OperationalError,
)
"""What Redis answers, to us or to Celery, while it is away, loads its data, waits to be promoted, or is full."""


REFUSALS = ("MISCONF", "BUSY", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "DB index")
"""Answers of a Redis that cannot serve and has changed nothing: its append-only file cannot be written (disk full),
somebody's script runs too long, a replica or its master is missing, the database of our URL does not exist."""


BRIEF = 0.8
"""Seconds a client waits for a silent Redis; a worker can wait longer."""

_timeout = 5.0


def connect(url: str) -> Redis:
    """A client for `url` that gives up within 2 s when nobody answers there."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=min(2, _timeout),
        socket_timeout=_timeout,
        socket_keepalive=True,
        health_check_interval=25,
        # A pooled connection that died with its server is replaced once. Silence is not met again: redis-py would
        # retry the handshake and the command each, 20 s until the clear error.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
    )


def be_brief() -> None:
    """Give a silent Redis up sooner in this process: a person or a scheduler waits for the answer."""
    global _timeout  # noqa: PLW0603 - one setting of the whole process
    if _timeout == BRIEF:
        return
    shared().close()
    _of_process.cache_clear()
    _timeout = BRIEF
    app.conf.broker_transport_options |= {"socket_timeout": _timeout, "socket_connect_timeout": _timeout}
    app.conf.task_publish_retry = False


@functools.cache
def _of_process(url: str, pid: int) -> Redis:  # noqa: ARG001 - a forked child must not share its parent's sockets
    return connect(url)


def shared() -> Redis:
    """This process' client for the Redis of the settings."""
    return _of_process(get_settings().redis_url, os.getpid())


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what redis-py and kombu raise while Redis cannot serve into `BrokerUnavailable`."""
    try:
        yield
    except UNAVAILABLE as error:
        silence.failed()
        raise BrokerUnavailable(f"Redis at {_shown_url()} does not answer: {error}") from error
    except redis.exceptions.ResponseError as error:
        if not str(error).startswith(REFUSALS):
            raise
        silence.failed()
        raise BrokerUnavailable(f"Redis at {_shown_url()} cannot serve us: {error}") from error


def _shown_url() -> str:
    url = get_settings().redis_url
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]  # never a password in a message


def text(value: Any) -> str:
    """A value as Redis keeps it in a hash."""
    return value if isinstance(value, str) else str(value)
