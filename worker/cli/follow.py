"""Following an operation: a live bar per step on a terminal, a line per change elsewhere."""

from __future__ import annotations

from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from worker.cli import output
from worker.client import Fleet, Sight
from worker.engine.record import Record, State, StepRecord, StepState

MIB = 1024**2
SIGNS = {
    StepState.PENDING: "[dim]·[/]",
    StepState.RUNNING: "[cyan]▸[/]",
    StepState.RETRY: "[yellow]↻[/]",
    StepState.DONE: "[green]✓[/]",
    StepState.FAILED: "[red]✗[/]",
}


def follow(fleet: Fleet, operation_id: str, *, as_json: bool) -> int:
    """Show an operation until it ends; the exit code that stands for its end."""
    if as_json:
        record = fleet.wait(operation_id)
        output.print_json(record.as_dict())
        return output.exit_code_of(record)
    record = _live(fleet, operation_id) if output.console.is_terminal else _lines(fleet, operation_id)
    _summary(record)
    return output.exit_code_of(record)


def _live(fleet: Fleet, operation_id: str) -> Record:
    bars = Bars()
    with Live(bars.progress, console=output.console, refresh_per_second=8):
        for sight in fleet.watch(operation_id):
            bars.show(sight)
    return sight.record


def _lines(fleet: Fleet, operation_id: str) -> Record:
    """For logs and pipes: each change of a step once."""
    seen: dict[str, tuple[StepState, int]] = {}
    for sight in fleet.watch(operation_id):
        for step in (*sight.record.steps.values(), *reversed(sight.record.undo_steps)):
            if step.state is not StepState.PENDING and seen.get(step.key) != (step.state, step.attempt):
                seen[step.key] = (step.state, step.attempt)
                output.console.print(f"{SIGNS[step.state]} {_label(sight.record, step)}  {_details(step, {})}")
    return sight.record


class Bars:
    """The steps of an operation as bars."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.fields[sign]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[details]}"),
            console=output.console,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, sight: Sight) -> None:
        """Make the bars equal to what is seen."""
        for step in (*sight.record.steps.values(), *reversed(sight.record.undo_steps)):
            undoing = step in sight.record.undo_steps
            if undoing and sight.record.verdict is None and step.state is StepState.PENDING:
                continue  # what could be undone is of interest only once something is
            self._show_step(sight, step)

    def _show_step(self, sight: Sight, step: StepRecord) -> None:
        report = sight.progress.get(step.key, {})
        if step.key not in self._tasks:
            label = _label(sight.record, step)
            self._tasks[step.key] = self.progress.add_task(label, total=1, sign="", details="")
        done = step.state is StepState.DONE
        total = report.get("total") or (1 if step.state is not StepState.RUNNING or done else None)
        self.progress.update(
            self._tasks[step.key],
            total=1 if done else total,
            completed=1 if done else report.get("done", 0),
            sign=SIGNS[step.state],
            details=_details(step, report),
        )


def _label(record: Record, step: StepRecord) -> str:
    if step in record.undo_steps:
        return f"undo: {record.undo[record.undo_steps.index(step)].action}"
    return step.key


def _details(step: StepRecord, report: dict[str, Any]) -> str:
    if step.state is StepState.DONE:
        took = (step.ended_at or 0) - (step.started_at or 0)
        return f"[dim]{took:.2f} s[/]"
    if step.state is StepState.RETRY and step.error:
        attempts = f"attempt {step.error.get('attempt', step.attempt)} of {step.error.get('attempts', '?')}"
        return f"[yellow]{attempts} failed, next {output.when(step.due)[11:]} UTC: {escape(step.error['message'])}[/]"
    if step.state is StepState.FAILED and step.error:
        return f"[red]{escape(step.error['message'])}[/]"
    return _moving(report) if step.state is StepState.RUNNING else ""


def _moving(report: dict[str, Any]) -> str:
    parts = []
    if report.get("total"):
        parts.append(f"{report['done'] / MIB:.0f}/{report['total'] / MIB:.0f} MiB")
    if report.get("rate"):
        parts.append(f"{report['rate'] / MIB:.0f} MiB/s")
    if report.get("eta") is not None:
        parts.append(f"{report['eta']:.0f} s left")
    if report.get("note"):
        parts.append(str(report["note"]))
    return "[cyan]" + escape("  ".join(parts)) + "[/]"


def _summary(record: Record) -> None:
    took = (record.ended_at or 0) - (record.started_at or record.submitted_at)
    what = f"{record.kind.removeprefix('virtfleet.')} of {record.instance}"
    state = output.state_text(record.state)
    output.console.print(f"{state}: {what} on {record.host} in {took:.2f} s  [dim]({record.id})[/]")
    if isinstance(record.result, dict) and record.result.get("note"):
        output.console.print(f"  {escape(record.result['note'])}")
    if record.error:
        output.tell(record.error, as_json=False)
        tell_undone(record)


def tell_undone(record: Record) -> None:
    """What was taken back, and of a stuck operation what was not and why."""
    undo = list(reversed(list(zip(record.undo, record.undo_steps, strict=True))))
    undone = [entry.action for entry, step in undo if step.state is StepState.DONE]
    output.complaints.print(f"  Undone: {', '.join(undone) or ('nothing had to be' if not undo else 'nothing')}.")
    if record.state is not State.STUCK:
        return
    for entry, step in undo:
        if step.state is not StepState.DONE:
            why = f": {escape(step.error['message'])}" if step.error else ""
            output.complaints.print(f"  [red]Remains[/]: {entry.action} ({entry.subject}) on host {entry.host}{why}")
    output.complaints.print(f"  [cyan]→[/] Mend that, then: virtfleet operation retry-undo {record.id}")
