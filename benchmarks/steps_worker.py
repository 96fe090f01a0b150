"""The worker of `benchmarks.steps`: empty tasks, once as plain Celery tasks and once as steps of an operation."""

from __future__ import annotations

from typing import Any

from celery import chain

from worker.app import app
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import Request, Target
from worker.engine.step import step
from worker.engine.step_context import StepContext


class ChainRequest(Request):
    """A chain of so many empty steps."""

    steps: int

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """Every chain has an instance of its own."""
        return Target(operation_id, "", "bench")


@step("bench.step", queue="disk")
def empty(ctx: StepContext, request: Any) -> None:
    """Do nothing, durably."""


@operation("bench.chain", ChainRequest)
def chain_of_steps(op: Operation[ChainRequest]) -> Canvas:
    """As many empty steps as asked for."""
    return chain(*[empty.on(op, key=f"empty{number}") for number in range(op.request.steps)])


@app.task(name="bench.plain", ignore_result=False)
def plain() -> None:
    """Do nothing."""


if __name__ == "__main__":
    app.worker_main(["worker", "--pool=prefork", "--concurrency=1", "--queues=host.bench.disk", "--loglevel=warning"])
