"""How long one tick of the reaper takes with 100,000 operations in the journal."""

from __future__ import annotations

import importlib
import json
import os
import statistics
from typing import Any

from benchmarks.common import Result, milliseconds, report
from tests.lab.process import lab_folder
from tests.lab.redis import Redis

OPERATIONS = 100_000
UNFINISHED = 20_000
TICKS = 50
TARGET_MS = 50.0


def main() -> int:
    """Fill a journal, a fifth of it unfinished and all of that due, and tick."""
    with lab_folder() as folder, Redis(folder / "redis") as redis:
        os.environ["VIRTFLEET_REDIS_URL"] = redis.url
        os.environ["VIRTFLEET_DATA_DIR"] = str(folder / "data")
        importlib.import_module("benchmarks.steps_worker")  # makes the kind of these operations known
        Reaper = importlib.import_module("worker.engine.reaper").Reaper  # noqa: N806 - its settings are set just now

        importlib.import_module("worker.logs").configure("warning")
        fill(redis)
        reaper = Reaper("benchmark")
        reaper.tick()
        taken = [milliseconds(reaper.tick) for _ in range(TICKS)]
        worst, median = max(taken), statistics.median(taken)
        print(f"median {median:.1f} ms, worst {worst:.1f} ms of {TICKS} ticks")
        return report([Result("the reaper's tick, worst", worst, 0.0, TARGET_MS, "ms")])


def fill(redis: Redis) -> None:
    """Write records as admission does, of operations that wait for a worker that is not there."""
    client = redis.client(timeout=60)
    step = {"key": "bench.step", "name": "bench.step", "host": "bench", "queue": "disk"}
    for start in range(0, OPERATIONS, 1000):
        pipe = client.pipeline(transaction=False)
        for number in range(start, start + 1000):
            name, unfinished = f"op-{number}", number < UNFINISHED
            head = {"schema": 1, "kind": "bench.chain", "request": {"steps": 1}, "instance": name, "uuid": ""}
            fields: dict[Any, Any] = {
                "head": json.dumps({**head, "host": "bench"}),
                "plan": json.dumps([[step]]),
                "state": "running" if unfinished else "succeeded",
                "submitted_at": "1.0",
                "step:bench.step:state": "running" if unfinished else "done",
            }
            pipe.hset(f"virtfleet:op:{name}", mapping=fields)
            pipe.zadd("virtfleet:operations", {name: 1.0})
            if unfinished:
                pipe.zadd("virtfleet:attention", {name: 1.0})
        pipe.execute()


if __name__ == "__main__":
    raise SystemExit(main())
