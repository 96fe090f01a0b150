"""Submitting a request and following it: the common end of all commands that start an operation."""

from __future__ import annotations

from typing import Any, TypeVar

import typer
from pydantic import ValidationError

from worker.cli import output
from worker.cli.follow import follow
from worker.client import Fleet
from worker.engine.record import Record, StepState
from worker.engine.requests import Request
from worker.models import explain

Asked = TypeVar("Asked", bound=Request)


def submit(kind: type[Asked], *, no_wait: bool, as_json: bool, **fields: Any) -> None:
    """Build the request from the fields that were given, submit it, follow it, and exit with its code."""
    with output.errors_told(as_json=as_json):
        given = {name: value for name, value in fields.items() if value not in (None, [])}  # else the default
        try:
            request = kind.model_validate(given)
        except ValidationError as error:
            raise explain(error) from error
        fleet = Fleet()
        record = fleet.submit(request)
        _warn_of_absent_worker(fleet, record)
        if no_wait:
            _accepted(record.as_dict(), as_json=as_json)
            raise typer.Exit(output.OK)
        raise typer.Exit(follow(fleet, record.id, as_json=as_json))


def _warn_of_absent_worker(fleet: Fleet, record: Record) -> None:
    waiting = next((step for step in record.steps.values() if step.state is StepState.PENDING), None)
    if record.state.final or waiting is None or waiting.plan.queue in fleet.registry.alive(waiting.plan.host):
        return
    output.complaints.print(
        f"[yellow]No {waiting.plan.queue} worker serves host {waiting.plan.host} right now[/]: the operation is "
        "accepted and waits for one."
    )


def _accepted(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.print_json(record)
    else:
        output.console.print(f"{record['state']}: {record['id']}   (follow it: virtfleet watch {record['id']})")
