"""What is wrong in the libraries below Celery, shown without our mending and gone with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from kombu import Connection, Consumer, Producer, Queue
from kombu.transport.redis import QoS

from tests.lab import Redis, lab_folder
from worker.engine import mended


@pytest.fixture
def redis() -> Iterator[Redis]:
    with lab_folder() as folder, Redis(folder / "redis") as redis:
        yield redis


def lose_redis_with_a_message_in_hand(redis: Redis) -> None:
    """As a worker does it: with one channel for its tasks, on which a message is not acknowledged yet, and another."""
    connection = Connection(redis.url, transport_options={"socket_timeout": 1, "socket_connect_timeout": 1})
    channels = connection.default_channel, connection.channel()
    arrived: list[object] = []
    for number, channel in enumerate(channels):
        queue = Queue(f"queue{number}", routing_key=f"queue{number}")
        Consumer(channel, [queue], on_message=arrived.append).consume()
    Producer(connection.channel()).publish({}, routing_key="queue0")
    for _ in range(3):
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.2)
    assert len(arrived) == 1
    redis.kill9()
    connection.collect(socket_timeout=0.5)
    connection.close()


def test_a_worker_outlives_redis_also_with_a_message_in_hand(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QoS, "restore_unacked", mended._restore)
    with pytest.raises(AttributeError, match="hostname"):  # once it does not any more, the mending can go
        lose_redis_with_a_message_in_hand(redis)
    redis.start()
    mended.outlive_redis()
    lose_redis_with_a_message_in_hand(redis)
