"""The suite itself: it sees what it is there to see, and the same seed plays the same rounds."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tasks import steps
from tests.chaos import faults, scenarios
from tests.chaos.invariants import Played, executions
from tests.chaos.rounds import combinations, drawn
from tests.chaos.watch import PAUSE, Watch
from worker.engine import kinds, undo
from worker.engine.record import Record, Stages, State, StepPlan
from worker.engine.step import Step

OPERATION = "op-1"
NOBODY = 2**22 + 1  # above the largest pid of a 64-bit Linux


def complaints(
    tmp_path: Path, *events: tuple[Any, ...], deaths: dict[int, float] | None = None, stages: Stages = ()
) -> list[str]:
    """What is said of a log that tells of these events: name, fence, pid, time, and the step if it is another one."""
    log = tmp_path / "worker.log"
    lines = [
        {"event": name, "operation": OPERATION, "step": "".join(step) or "copy", "fence": fence, "pid": pid, "at": at}
        for name, fence, pid, at, *step in events
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = Record(OPERATION, "virtfleet.spawn", {}, "guest", "", "host", State.SUCCEEDED, stages)
    site: Any = SimpleNamespace(supervisor=SimpleNamespace(deaths=deaths or {}))
    return list(executions(site, Played(scenarios.SCENARIOS[0], None, "guest", record, {log: 0})))


def test_one_executor_after_the_other_is_fine(tmp_path: Path) -> None:
    assert (
        complaints(tmp_path, ("begins", 1, 10, 1), ("ends", 1, 10, 2), ("begins", 2, 11, 2), ("ends", 2, 11, 3)) == []
    )


def test_two_executors_at_once_are_seen(tmp_path: Path) -> None:
    found = complaints(tmp_path, ("begins", 1, 10, 1), ("begins", 2, 11, 2), ("ends", 1, 10, 3), ("ends", 2, 11, 4))
    assert "two executors at once" in found[0]


def test_a_killed_executor_counts_until_its_death(tmp_path: Path) -> None:
    events = [("begins", 1, NOBODY, 1.0), ("begins", 2, 11, 3.0), ("ends", 2, 11, 4.0)]
    assert complaints(tmp_path, *events, deaths={NOBODY: 2.0}) == []
    assert complaints(tmp_path, *events, deaths={NOBODY: 3.5}) != []


def test_only_steps_side_by_side_may_run_at_the_same_time(tmp_path: Path) -> None:
    beside = (StepPlan("copy", "copy", "chaosb", "disk"), StepPlan("lend", "lend", "chaos", "control"))
    events = [
        ("begins", 1, 10, 1.0),
        ("begins", 2, 11, 2.0, "lend"),
        ("ends", 1, 10, 3.0),
        ("ends", 2, 11, 4.0, "lend"),
    ]
    assert complaints(tmp_path, *events, stages=(beside,)) == []
    assert complaints(tmp_path, *events, stages=((beside[0],), (beside[1],))) != []
    again = ("begins", 3, 12, 2.5), ("ends", 3, 12, 2.7)
    assert complaints(tmp_path, *events, *again, stages=(beside,)) != []


def test_an_executor_that_outlives_the_others_is_seen(tmp_path: Path) -> None:
    assert complaints(tmp_path, ("begins", 1, os.getpid(), 1), ("begins", 2, 11, 2), ("ends", 2, 11, 3)) != []


def test_an_empty_log_proves_nothing(tmp_path: Path) -> None:
    assert complaints(tmp_path) == ["the operation succeeded, but no log tells of an executor"]


class Showing:
    """A host on which a guest's QEMU is, or is not, with each look."""

    def __init__(self, name: str, *pids: int | None) -> None:
        self.name = name
        self._pids = itertools.chain(pids, itertools.repeat(pids[-1]))

    def find_qemu(self, domain: str) -> int | None:
        return next(self._pids)


def seen_on(*hosts: Showing) -> list[str]:
    watched: Any = hosts
    with Watch(watched, "guest") as watch:
        time.sleep(2.5 * PAUSE)
    return watch.complaints()


def test_a_guest_on_two_hosts_at_once_is_seen() -> None:
    assert "QEMU ran guest on chaos and chaosb at once" in seen_on(Showing("chaos", 1), Showing("chaosb", 2))[0]


def test_a_guest_that_has_gone_from_one_host_to_the_other_is_not_complained_of() -> None:
    assert seen_on(Showing("chaos", 1, None), Showing("chaosb", 2)) == []
    assert seen_on(Showing("chaos", None), Showing("chaosb", 2)) == []


def test_the_same_seed_chooses_the_same_rounds() -> None:
    choices = combinations([], [], as_root=True)
    assert [drawn(7, number, choices) for number in range(20)] == [drawn(7, number, choices) for number in range(20)]
    assert drawn(7, 0, choices) != drawn(8, 0, choices)


def test_all_combinations_come_in_turn() -> None:
    choices = combinations([], [], as_root=True)
    rounds = [drawn(7, number, choices) for number in range(len(choices))]
    assert {(one.operation, one.fault, one.step) for one in rounds} == set(choices)


NOT_DISTURBED = {
    "undo": "a moment of every scenario that has something to be undone",
    "lend_snapshot": "needs a snapshot on another host; the lending is that of `lend`, which is disturbed",
}
"""Steps that are in no scenario, and why."""


def test_every_operation_and_every_step_is_disturbed() -> None:
    modules = [import_module(f"tasks.steps.{one.name}") for one in pkgutil.iter_modules(steps.__path__)]
    made = {one.name for module in (*modules, undo) for one in vars(module).values() if isinstance(one, Step)}
    assert {step.partition(":")[0] for one in scenarios.SCENARIOS for step in one.steps} == made - set(NOT_DISTURBED)
    operations = {name for name in kinds._kinds if name.startswith("virtfleet.")}
    assert {one.task for one in scenarios.SCENARIOS} == operations


def test_every_fault_meets_every_operation() -> None:
    choices = combinations([], [], as_root=True)
    for scenario in scenarios.SCENARIOS:
        met = {fault for operation, fault, _ in choices if operation == scenario.name}
        wanted = {fault.name for fault in faults.FAULTS if not fault.needs}
        assert met >= {name for name in wanted if scenario.journey or not faults.BY_NAME[name].between_hosts}
