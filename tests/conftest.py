"""What tests of several parts share: a private Redis and this process' journal on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
from kombu import Connection, pools

from tests.lab.process import lab_folder
from tests.lab.redis import Redis
from worker.app import app
from worker.engine.journal import Journal
from worker.engine.journal import journal as journal_of_process
from worker.settings import get_settings

# How long an example takes says how busy the machine is, and nothing about the code.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@contextmanager
def settings(**changed: object) -> Iterator[None]:
    """This process has other settings, given by their names, in the `with` block; Celery follows `redis_url`."""
    variables = {f"VIRTFLEET_{name.upper()}": str(value) for name, value in changed.items()}
    with _environment(variables):
        get_settings.cache_clear()
        before = app.conf.broker_url, app.conf.result_backend
        _point_celery_at(get_settings().redis_url, get_settings().redis_url)
        try:
            yield
        finally:
            _point_celery_at(*before)
    get_settings.cache_clear()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _point_celery_at(broker: str, backend: str) -> None:
    """Celery has no public way to be pointed elsewhere: its connections are closed here, and opened anew on demand."""
    former: Any = app.backend
    former.result_consumer.stop()
    former.result_consumer.subscribed_to.clear()  # results that go later have nothing to unsubscribe from
    former.client.close()
    _close_pools_of(app.connection_for_write())
    app.conf.update(broker_url=broker, result_backend=backend)
    app._after_fork()  # type: ignore[attr-defined]
    app._backend_cache = None  # type: ignore[attr-defined]
    app._local = threading.local()  # type: ignore[attr-defined]  # where a backend that is not thread-safe is kept


def _close_pools_of(connection: Connection) -> None:
    """Other applications of this process keep theirs: a scheduler's connection differs in its options."""
    for group in (pools.producers, pools.connections):
        if connection in group:
            group[connection].force_close_all()
            del group[connection]


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """A private Redis, which keeps running for the whole session."""
    with lab_folder() as folder, Redis(folder / "redis") as server:
        yield server


@pytest.fixture
def journal(redis: Redis) -> Iterator[Journal]:
    """This process' journal on the private Redis, empty."""
    redis.flushall()
    with settings(redis_url=redis.url):
        yield journal_of_process()
