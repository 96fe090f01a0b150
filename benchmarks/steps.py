"""What a journaled step costs more than a plain Celery task in a chain."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from celery import Celery, chain

from benchmarks.common import Result, interleaved, milliseconds, report
from tests.lab.process import Keeper, Process, lab_folder, wait_until
from tests.lab.redis import Redis

ROUNDS = 30
STEPS = 5
TARGET_MS = 15.0


def main() -> int:
    """Run chains of five empty steps both ways, in turns, on one worker."""
    with lab_folder() as folder, Redis(folder / "redis") as redis:
        os.environ.update(environment := {"VIRTFLEET_REDIS_URL": redis.url, "VIRTFLEET_DATA_DIR": str(folder / "data")})
        worker = start_worker(folder, environment)
        client = Celery(broker=redis.url, backend=redis.url)

        def plain_chain() -> object:
            # A new one each time: a chain that is sent twice has the ids, and so the results, of the first time.
            parts = [client.signature("bench.plain", immutable=True) for _ in range(STEPS)]
            return chain(*[part.set(queue="host.bench.disk") for part in parts]).apply_async().get(30)

        try:
            wait_until(lambda: client.control.ping(timeout=0.5), 30, "the worker answers", folder / "worker.log")
            journaled_ms, plain_ms = interleaved(
                ROUNDS,
                lambda _: milliseconds(
                    lambda: client.send_task("bench.chain", queue="host.bench.disk", kwargs={"steps": STEPS}).get(30)
                ),
                lambda _: milliseconds(plain_chain),
            )
        finally:
            worker.end()
        overhead = Result("a step in the journal", journaled_ms / STEPS, plain_ms / STEPS, TARGET_MS, "ms more")
        return report([overhead])


def start_worker(folder: Path, environment: dict[str, str]) -> Keeper:
    """A prefork worker with one process that knows both kinds of tasks."""
    keeper = Keeper(folder / "worker.log")
    argv = [sys.executable, "-m", "benchmarks.steps_worker"]
    Process(keeper, argv, folder / "worker.log", environment).start()
    return keeper


if __name__ == "__main__":
    raise SystemExit(main())
