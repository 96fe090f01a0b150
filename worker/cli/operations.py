"""`virtfleet operations|operation|watch|cancel`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from worker.cli import output
from worker.cli.follow import SIGNS, follow, tell_undone
from worker.cli.options import AsJson
from worker.client import Fleet
from worker.engine.record import Record, State, StepState

COLUMNS = ["id", "kind", "instance", "host", "state", "step", "submitted (UTC)", "took"]
OperationId = Annotated[str, typer.Argument(metavar="ID", help="Id of an operation.")]


def operations(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 20,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Only those that have not ended.")] = False,
    stalled: Annotated[bool, typer.Option("--stalled", help="Only those that do not move, with the reason.")] = False,
    as_json: AsJson = False,
) -> None:
    """List operations, newest first."""
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        if stalled:
            _list_stalled(fleet, limit, as_json=as_json)
            return
        records = fleet.journal.unfinished(limit) if unfinished else fleet.journal.latest(limit)
        if as_json:
            output.print_json({"operations": [record.as_dict() for record in records]})
            return
        rows = [_row(record) for record in records]
        output.table("", COLUMNS, rows, empty="Every operation has ended." if unfinished else "No operations yet.")


def _list_stalled(fleet: Fleet, limit: int, *, as_json: bool) -> None:
    found = fleet.stalled(limit)
    if as_json:
        output.print_json({"operations": [{**record.as_dict(), "why": why} for record, why in found]})
        return
    rows = [[*_row(record), escape(why)] for record, why in found]
    output.table("", [*COLUMNS, "why"], rows, empty="Every operation moves.")


def operation(
    words: Annotated[list[str], typer.Argument(metavar="[retry-undo] ID", help="Id of an operation.")],
    as_json: AsJson = False,
) -> None:
    """Show one operation: its steps, attempts, errors and what was undone. With retry-undo, undo a stuck one again."""
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        match words:
            case ["retry-undo", operation_id]:
                fleet.retry_undo(operation_id)
                raise typer.Exit(follow(fleet, operation_id, as_json=as_json))
            case [operation_id]:
                record = fleet.journal.read(operation_id)
            case _:
                raise typer.BadParameter("allowed: ID, or retry-undo ID")
        if as_json:
            output.print_json(record.as_dict())
            return
        _show(record)


def watch(operation_id: OperationId, as_json: AsJson = False) -> None:
    """Follow an operation with a live bar per step; exits with its exit code."""
    with output.errors_told(as_json=as_json):
        raise typer.Exit(follow(Fleet(), operation_id, as_json=as_json))


GiveUp = Annotated[
    bool,
    typer.Option("--give-up", help="Also if it cannot be taken back: its host is gone for good. It ends half done."),
]


def cancel(operation_id: OperationId, no_wait: bool = False, give_up: GiveUp = False, as_json: AsJson = False) -> None:
    """Stop an operation and undo what it did; exits with 3 when that was done."""
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        record = fleet.cancel(operation_id, give_up=give_up)
        if not as_json and (obstacle := _too_late(record)):
            output.complaints.print(f"[yellow]Too late[/]: {operation_id} {obstacle}.")
        if no_wait:
            if as_json:
                output.print_json(record.as_dict())
            raise typer.Exit(output.OK)
        raise typer.Exit(follow(fleet, operation_id, as_json=as_json))


def _too_late(record: Record) -> str:
    if record.state.final:
        return "has ended already"
    return "cannot be taken back any more; to end it as it is: --give-up" if record.irrevocable else ""


def _row(record: Record) -> list[str]:
    current = [step.key for step in record.steps.values() if step.state is not StepState.DONE]
    return [
        record.id,
        record.kind.removeprefix("virtfleet."),
        record.instance,
        record.host,
        output.state_text(record.state),
        "" if record.state.final or not current else current[0],
        output.when(record.submitted_at),
        output.duration(record.as_dict()["seconds"]),
    ]


def _show(record: Record) -> None:
    say = output.console.print
    say(f"{record.id}  {record.kind}  {output.state_text(record.state)}")
    say(f"instance {record.instance} ({record.uuid or 'no uuid'}) on host {record.host or '?'}")
    say(f"submitted {output.when(record.submitted_at)} UTC, ended {output.when(record.ended_at) or 'not yet'}")
    rows = [
        [
            f"{SIGNS[step.state]} {step.key}",
            step.plan.host,
            step.state.value,
            str(step.attempt or ""),
            output.duration(step.as_dict()["seconds"]),
            escape(step.error["message"]) if step.error else "",
        ]
        for step in record.steps.values()
    ]
    output.table("", ["step", "host", "state", "attempt", "took", "last error"], rows, empty="It has no steps.")
    if record.undo and record.state is not State.SUCCEEDED:
        undo = reversed(list(zip(record.undo, record.undo_steps, strict=True)))
        lines = [[entry.action, entry.host, entry.subject, step.state.value] for entry, step in undo]
        output.table("undo", ["action", "host", "of", "state"], lines, empty="")
    if record.error:
        output.tell(record.error, as_json=False)
        tell_undone(record)
