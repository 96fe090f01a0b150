"""The reaper sets going what stands still, and nothing else: however long that takes, and however much there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import settings
from tests.integration import engine_tasks as tasks
from tests.lab.process import wait_until
from tests.lab.redis import Redis
from worker.app import host_queue
from worker.client import Fleet
from worker.engine import keys
from worker.engine.journal import Journal, journal
from worker.engine.operation import new_id, submit
from worker.engine.reaper import BATCH, Reaper
from worker.engine.registry import registry
from worker.engine.succession import new_token

QUEUE = host_queue(tasks.HOST, "control")
GRACE = 0.05


@pytest.fixture
def book(redis: Redis) -> Iterator[Journal]:
    """A journal on an empty Redis; what was published and is not begun may go out again very soon."""
    redis.flushall()
    with settings(redis_url=redis.url, publish_grace=GRACE, lease_ttl=0.5):
        wait_until(lambda: journal().uptime() > 1, 5, "leases count again")
        yield journal()


def ask(tmp_path: Path, **fields: object) -> str:
    return submit(tasks.CallRequest.model_validate({"log": str(tmp_path / "log"), "name": new_id(), **fields})).id


def tick_until(reaper: Reaper, done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        reaper.tick()
        time.sleep(GRACE / 2)


def test_a_queue_does_not_grow_while_no_worker_is_up(book: Journal, tmp_path: Path) -> None:
    """It is drained when one comes up; what was lost on the way is sent again then."""
    ids = [ask(tmp_path) for _ in range(3)]
    reaper = Reaper("alone")
    tick_until(reaper, lambda: False, 20 * GRACE)
    assert book.redis.llen(QUEUE) == len(ids)
    assert {book.read(one).steps["test.long_call"].publications for one in ids} == {1}

    def all_came_again() -> bool:
        book.redis.delete(QUEUE)  # what a worker takes, and loses as it dies
        return all(book.read(one).steps["test.long_call"].publications > 1 for one in ids)

    tick_until(reaper, all_came_again, 10)
    assert all_came_again()


def test_a_queue_does_not_grow_while_a_worker_is_busy(book: Journal, tmp_path: Path) -> None:
    ask(tmp_path)
    registry().heartbeat(tasks.HOST, "control", {})
    tick_until(Reaper("alone"), lambda: False, 20 * GRACE)
    assert book.redis.llen(QUEUE) == 1


def test_a_step_whose_worker_died_is_published_before_all_that_is_due(book: Journal, tmp_path: Path) -> None:
    for _ in range(2 * BATCH):
        ask(tmp_path)
    orphan = ask(tmp_path)
    instance = book.read(orphan).instance
    _, lease = book.acquire(orphan, "test.long_call", instance, worker="w", token=new_token(), phase="run")
    assert lease
    book.redis.delete(keys.lease(orphan, "test.long_call"), QUEUE)
    book.redis.zadd(keys.ATTENTION, {orphan: book.now()})
    time.sleep(GRACE)
    assert Reaper("alone").tick(), "more is due than one tick can look at"
    assert book.read(orphan).steps["test.long_call"].publications == 1


def test_what_nobody_takes_is_told_of(book: Journal, tmp_path: Path) -> None:
    operation = ask(tmp_path)
    assert Fleet().stalled(10) == []
    book.redis.hset(keys.operation(operation), "step:test.long_call:published", book.now() - 60)
    ((record, why),) = Fleet().stalled(10)
    assert record.id == operation
    assert "published 1 times, last 60 s ago, and no worker has taken it" in why


def test_what_does_not_move_is_found_among_many_that_do(book: Journal, tmp_path: Path) -> None:
    """The reaper looks at it last of all."""
    still = ask(tmp_path)
    book.redis.hset(keys.operation(still), "step:test.long_call:published", book.now() - 60)
    book.redis.zadd(keys.ATTENTION, {still: keys.NOT_BEGUN + book.now() + 300})
    for _ in range(5):
        ask(tmp_path)
    assert [record.id for record, _ in Fleet().stalled(1)] == [still]
