"""Steps: what canvases are made of. Each is one plain function and the Celery task that executes it once."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter

from worker.app import app
from worker.engine.canvas import step_signature
from worker.engine.execution import execute
from worker.engine.kinds import Operation, kind_of
from worker.engine.record import StepPlan
from worker.engine.retries import Retries
from worker.engine.step_context import StepContext
from worker.errors import FleetError

Returned = TypeVar("Returned")
Body = Callable[[StepContext, Any], Returned]


@dataclass(frozen=True)
class Step(Generic[Returned]):
    """One kind of step. Its body converges: it reads what is there before it changes anything."""

    name: str
    queue: str
    body: Body[Returned]
    retries: Retries

    def on(self, op: Operation[Any], *, key: str | None = None, host: str | None = None) -> Any:
        """This step for an operation: a signature for its canvas. `key` tells several of one kind apart."""
        plan = StepPlan(key or self.name, self.name, host or op.host, self.queue)
        return step_signature(app.tasks[self.name], plan, op.id, op.instance)

    @cached_property
    def returned(self) -> TypeAdapter[Returned]:
        """The form of what the body returns."""
        # Only this one: the request's type is imported for type checkers alone, as operations import steps.
        answer = SimpleNamespace(__annotations__={"return": self.body.__annotations__["return"]})
        return TypeAdapter(typing.get_type_hints(answer, vars(sys.modules[self.body.__module__]))["return"])

    def run(self, ctx: StepContext) -> Any:
        """Do the work; what it returns, as the journal keeps it."""
        request = kind_of(ctx.record.kind).of(ctx.record).request
        return self.returned.dump_python(self.body(ctx, request), mode="json")


def step(
    name: str, *, queue: Literal["control", "disk"], retries: Retries | None = None
) -> Callable[[Body[Returned]], Step[Returned]]:
    """Make a function into a step, with a Celery task of that name on that queue of the step's host."""

    def register(body: Body[Returned]) -> Step[Returned]:
        made = Step(name, queue, body, retries or Retries())

        def task(self: Any, operation: str, step: str, instance: str, host: str) -> Any:  # noqa: ARG001 - for Flower
            return execute(made, self, operation, step, instance)

        task.__doc__ = body.__doc__
        # ignore_result: what a step returns belongs in the journal; a copy under Celery's keys would outlive it.
        app.task(name=name, bind=True, ignore_result=True, throws=(FleetError,))(task)
        return made

    return register
