"""What many rounds have shown, as Markdown: a table of fault by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from tests.chaos import faults, scenarios
from tests.chaos.faults import Fault
from tests.chaos.rounds import Verdict
from tests.chaos.scenarios import ADMISSION, UNDO


def line(verdict: Verdict) -> str:
    """One round on one line."""
    took = f"recovered in {verdict.recovery:.1f} s" if verdict.recovery is not None else f"{verdict.seconds:.1f} s"
    remarks = ", slow" * verdict.slow + ", asked again" * verdict.asked_again + ", a worker ended" * verdict.restarts
    remarks += ", libvirt lost sight of a backup" * verdict.lost_backups
    outcome = "VIOLATED" if verdict.violations else verdict.state
    return f"{verdict.round.number:4d}  {outcome:<10} {verdict.round}: {took}{remarks}"


def table(verdicts: Sequence[Verdict]) -> str:
    """Fault by step: how many rounds, of them survived, and the median and longest recovery in seconds."""
    cells: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        cells[verdict.round.fault, verdict.round.step].append(verdict)
    steps = [step for step in _steps() if any(key[1] == step for key in cells)]
    kinds = [fault.name for fault in faults.FAULTS if any(key[0] == fault.name for key in cells)]
    rows = [["fault", *steps, "all"]]
    for kind in kinds:
        every = [verdict for verdict in verdicts if verdict.round.fault == kind]
        rows.append([kind, *(_cell(cells[kind, step]) for step in steps), _cell(every)])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def summary(verdicts: Sequence[Verdict]) -> str:
    """The numbers that count."""
    violated = sum(1 for verdict in verdicts if verdict.violations)
    lines = [f"{len(verdicts)} rounds, {violated} with a violation."]
    lines += [_speed(fault, [v for v in verdicts if v.round.fault == fault.name]) for fault in faults.FAULTS]
    again = sum(1 for verdict in verdicts if verdict.asked_again)
    if again:
        lines.append(f"{again} operations were forgotten with all of Redis before any step began, and asked for again.")
    if restarts := sum(verdict.restarts for verdict in verdicts):
        lines.append(f"{restarts} times a worker ended by itself as Redis went away, and was started again.")
    if lost := sum(verdict.lost_backups for verdict in verdicts):
        lines.append(f"{lost} times libvirt lost sight of a backup; the guest ran on, and the remedy was followed.")
    return "\n".join(f"- {line}" for line in lines if line)


def _speed(fault: Fault, verdicts: Sequence[Verdict]) -> str:
    """How fast it was got over, for a fault with a target."""
    times = [verdict.recovery for verdict in verdicts if verdict.recovery is not None]
    if not times or not (fault.limit or fault.by_lease):
        return ""
    slow = sum(verdict.slow for verdict in verdicts)
    text = f"{fault.name}: recovered in {median(times):.1f} s (median), {max(times):.1f} s at most; {slow} too slow"
    if back := [verdict.back for verdict in verdicts if verdict.back and verdict.back > 0]:
        text += f"; the worker itself was back after {median(back):.1f} s (median), {max(back):.1f} s at most"
    return f"{text}."


def _steps() -> list[str]:
    named = [step for scenario in scenarios.SCENARIOS for step in scenario.steps]
    return list(dict.fromkeys([ADMISSION, *named, UNDO]))


def _cell(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    survived = sum(1 for verdict in verdicts if not verdict.violations)
    times = [verdict.recovery for verdict in verdicts if verdict.recovery is not None]
    spread = f" · {median(times):.1f} / {max(times):.1f}" if times else ""
    return f"{survived}/{len(verdicts)}{spread}"
