"""Canvases: the steps of an operation put together with Celery's `chain` and `group`.

A canvas is read as stages, for the journal and for deciding what is next. What is left of an operation is built from
these stages again, and not by the code of today: an upgrade must not change what is under way.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from celery import chain, chord, group
from celery.canvas import Signature, _chain

from worker.app import app, host_queue
from worker.engine.record import Stages, StepPlan

Canvas = Any
"""A step's signature, or a `chain` or `group` of canvases. (Celery's own types do not tell them apart.)"""


def step_signature(task: Any, plan: StepPlan, operation_id: str, instance: str) -> Signature[Any]:
    """The message of one step. Immutable: what a step needs of another it finds in the journal."""
    message: Signature[Any] = task.si(instance=instance, host=plan.host, operation=operation_id, step=plan.key)
    return message.set(queue=host_queue(plan.host, plan.queue))


def stages_of(canvas: Canvas) -> Stages:
    """The steps of a canvas, stage by stage."""
    return tuple(tuple(_plan(one) for one in stage) for stage in _stages(canvas))


def remaining(stages: Stages, keys: Collection[str], operation_id: str, instance: str) -> Canvas | None:
    """What is left of an operation: its steps with these keys, in their order. None when nothing is left."""
    left = [
        [step_signature(app.tasks[plan.name], plan, operation_id, instance) for plan in stage if plan.key in keys]
        for stage in stages
    ]
    parts = [stage[0] if len(stage) == 1 else group(*stage) for stage in left if stage]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else chain(*parts)


def _stages(canvas: Canvas) -> list[list[Signature[Any]]]:
    if isinstance(canvas, _chain):
        return [stage for part in canvas.tasks for stage in _stages(part)]
    if isinstance(canvas, chord):
        return [*_stages(group(*canvas.tasks)), *_stages(canvas.body)]
    if isinstance(canvas, group):
        members = [_stages(part) for part in canvas.tasks]
        if any(len(stages) != 1 for stages in members):
            raise TypeError("a group may hold single steps only: the journal knows stages, not trees")
        return [[one for stages in members for one in stages[0]]]
    return [[canvas.clone()]]


def _plan(signature: Signature[Any]) -> StepPlan:
    queue = str(signature.options["queue"]).rpartition(".")[2]
    return StepPlan(key=signature.kwargs["step"], name=str(signature.task), host=signature.kwargs["host"], queue=queue)
