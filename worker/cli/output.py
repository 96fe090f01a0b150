"""What the command prints and how it ends: tables and bars for people, `--json` for programs, exit codes for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker.engine.record import Record, State
from worker.errors import BrokerUnavailable, FleetError, HostUnreachable

OK, FAILED, BAD_INPUT, CANCELLED, UNREACHABLE = 0, 1, 2, 3, 4

WIDE = None if sys.stdout.isatty() else 200
"""Columns: a terminal's own width; in pipes and logs wide enough that no id is broken in two."""

console = Console(highlight=False, width=WIDE)
complaints = Console(stderr=True, highlight=False)

COLOURS = {
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.STUCK: "bold red",
    State.REJECTED: "red",
    State.CANCELLED: "yellow",
    State.UNDOING: "yellow",
}


@contextmanager
def errors_told(*, as_json: bool) -> Iterator[None]:
    """Show a `FleetError` as a message and end with its exit code."""
    try:
        yield
    except FleetError as error:
        tell(error.as_dict(), as_json=as_json)
        raise typer.Exit(exit_code(error.as_dict())) from error
    except KeyboardInterrupt:
        complaints.print("\n[yellow]Interrupted[/]; what was accepted goes on without this command.")
        raise typer.Exit(130) from None


def tell(error: dict[str, Any], *, as_json: bool) -> None:
    """Say what went wrong, where, and what to do next."""
    if as_json:
        print_json({"error": error})
        return
    where = f" [dim](step {error['step']} on {error['host']})[/]" if error.get("step") else ""
    complaints.print(f"[red]Error[/] \\[{error['code']}]{where}: {escape(error['message'])}", soft_wrap=True)
    if error.get("hint"):
        complaints.print(f"  [cyan]→[/] {escape(error['hint'])}", soft_wrap=True)


def exit_code(error: dict[str, Any] | None) -> int:
    """The exit code that stands for an error."""
    if error is None:
        return FAILED
    if error.get("bad_input"):
        return BAD_INPUT
    return UNREACHABLE if error["code"] in {BrokerUnavailable.code, HostUnreachable.code} else FAILED


def exit_code_of(record: Record) -> int:
    """The exit code that stands for how an operation ended."""
    if record.state is State.SUCCEEDED:
        return OK
    if record.state is State.CANCELLED:
        return CANCELLED
    if record.state is State.REJECTED:
        return exit_code(record.error)
    code = exit_code(record.error)
    return FAILED if code == BAD_INPUT else code


def print_json(content: Any) -> None:
    """Print for programs."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows under their columns, or say that there are none."""
    if not rows:
        console.print(f"[dim]{empty}[/]")
        return
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def state_text(state: State) -> str:
    """A state in its colour."""
    colour = COLOURS.get(state)
    return f"[{colour}]{state.value}[/]" if colour else state.value


def when(seconds: float | None) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def duration(seconds: float | None) -> str:
    """A length of time for people."""
    return "" if seconds is None else f"{seconds:.2f} s"
