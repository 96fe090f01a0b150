"""The engine's small parts: canvases read as stages, records read as written, progress and pauses as promised."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from hypothesis import given
from hypothesis import strategies as st

import tasks  # noqa: F401 - its import makes the operations known
from worker.app import app
from worker.engine import kinds
from worker.engine.canvas import Canvas, remaining, stages_of, step_signature
from worker.engine.intervention import cancel_by_name, retry_undo_by_name
from worker.engine.patience import patiently
from worker.engine.progress import Meter, describe
from worker.engine.record import State, StepPlan, StepState, UndoEntry, parse
from worker.engine.retries import Retries
from worker.errors import BrokerUnavailable, InvalidSpec

MIB = 1024**2


# --- canvases -----------------------------------------------------------------------------------------------------


@app.task(name="test.part")
def part(**_: str) -> None:
    """A step that is never executed."""


def s(key: str) -> Canvas:
    return step_signature(part, StepPlan(key, "test.part", "h1", "disk"), "op", "vm")


def keys_of(canvas: Canvas) -> list[list[str]]:
    return [[plan.key for plan in stage] for stage in stages_of(canvas)]


CANVASES: list[tuple[Callable[[], Canvas], list[list[str]]]] = [
    (lambda: s("a"), [["a"]]),
    (lambda: chain(s("a"), s("b"), s("c")), [["a"], ["b"], ["c"]]),
    (lambda: chain(s("a")), [["a"]]),
    (lambda: group(s("a"), s("b")), [["a", "b"]]),
    (lambda: group(s("a"), group(s("b"), s("c"))), [["a", "b", "c"]]),
    (lambda: chain(group(s("a"), s("b")), s("c")), [["a", "b"], ["c"]]),
    (lambda: chain(s("a"), group(s("b"), s("c"))), [["a"], ["b", "c"]]),
    (lambda: chain(s("a"), group(s("b"), s("c")), s("d"), s("e")), [["a"], ["b", "c"], ["d"], ["e"]]),
    (lambda: chain(group(s("a"), s("b")), group(s("c"), s("d"))), [["a", "b"], ["c", "d"]]),
    (lambda: chord([s("a"), s("b")], s("c")), [["a", "b"], ["c"]]),
    (lambda: chord([s("a"), s("b")], chain(s("c"), s("d"))), [["a", "b"], ["c"], ["d"]]),
    (lambda: chain(s("a"), group(s("b"))), [["a"], ["b"]]),
]


@pytest.mark.parametrize(("canvas", "stages"), CANVASES)
def test_a_canvas_reads_as_the_stages_in_which_it_runs(canvas: Callable[[], Canvas], stages: list[list[str]]) -> None:
    assert keys_of(canvas()) == stages


@pytest.mark.parametrize(("canvas", "stages"), CANVASES)
@given(data=st.data())
def test_what_is_left_of_a_canvas_keeps_its_order(
    canvas: Callable[[], Canvas], stages: list[list[str]], data: st.DataObject
) -> None:
    every = [key for stage in stages for key in stage]
    wanted = data.draw(st.sets(st.sampled_from(every)))
    left = remaining(stages_of(canvas()), wanted, "op", "vm")
    expected = [kept for stage in stages if (kept := [key for key in stage if key in wanted])]
    assert (keys_of(left) if left is not None else []) == expected


def test_a_message_names_its_step_and_goes_to_the_queue_of_its_host() -> None:
    (stage,) = stages_of(s("a"))
    assert stage == (StepPlan("a", "test.part", "h1", "disk"),)
    assert s("a").options["queue"] == "host.h1.disk"
    assert s("a").immutable, "what a step needs of another it finds in the journal"


def test_a_group_of_chains_is_refused() -> None:
    with pytest.raises(TypeError, match="single steps only"):
        stages_of(group(chain(s("a"), s("b")), s("c")))


# --- records ------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
facts = st.dictionaries(st.text(max_size=5), json_values, max_size=2)
moments = st.none() | st.floats(1e9, 2e9).map(lambda seconds: round(seconds, 6))


@given(
    state=st.sampled_from(State),
    step_state=st.sampled_from(StepState),
    request=facts,
    result=json_values,
    error=facts,
    arguments=facts,
    moment=moments,
    attempt=st.integers(0, 99),
)
def test_a_record_reads_as_it_was_written(
    *,
    state: State,
    step_state: StepState,
    request: dict[str, Any],
    result: Any,
    error: dict[str, Any],
    arguments: dict[str, Any],
    moment: float | None,
    attempt: int,
) -> None:
    plan = StepPlan("copy", "copy_disk", "h1", "disk")
    entry = UndoEntry("remove", "h2", arguments)
    head = {"schema": 1, "kind": "k", "request": request, "instance": "vm", "uuid": "u", "host": "h1"}
    fields = {
        "head": json.dumps(head),
        "plan": json.dumps([[plan.as_dict()]]),
        "state": state.value,
        "submitted_at": "5.5",
        "error": json.dumps(error),
        "step:copy:state": step_state.value,
        "step:copy:attempt": str(attempt),
        "step:copy:result": json.dumps(result),
        "step:undo:0:state": "done",
        **({"step:copy:due": f"{moment:.6f}", "cancel": f"{moment:.6f}"} if moment else {}),
    }
    record = parse("op", fields, [entry.as_json()])
    assert (record.id, record.kind, record.request, record.state) == ("op", "k", request, state)
    assert (record.instance, record.uuid, record.host, record.submitted_at) == ("vm", "u", "h1", 5.5)
    assert (record.error, record.cancel, record.stages) == (error, moment, ((plan,),))
    step = record.steps["copy"]
    assert (step.plan, step.state, step.attempt, step.due, step.result) == (plan, step_state, attempt, moment, result)
    assert record.undo == (entry,)
    assert record.undo_steps[0].state is StepState.DONE
    assert (record.undo_steps[0].plan.host, record.undo_steps[0].plan.queue) == ("h2", "control")
    json.dumps(record.as_dict())


def test_equal_undo_entries_are_equal_text() -> None:
    one, other = UndoEntry("a", "h1", {"x": 1, "y": 2}), UndoEntry("a", "h1", {"y": 2, "x": 1})
    assert one.as_json() == other.as_json()


def test_a_record_does_not_show_user_data() -> None:
    head = {"kind": "k", "request": {"user_data": "password: secret"}, "instance": "", "uuid": "", "host": ""}
    record = parse("op", {"head": json.dumps(head), "state": "queued"}, [])
    assert "secret" not in json.dumps(record.as_dict())


# --- progress -----------------------------------------------------------------------------------------------------


class Watch:
    """A meter with a clock of its own, and all that it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.reports: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.meter = Meter(self.reports.append, self.events.append)

    def tick(self, after: float, done: int, total: int | None = 100 * MIB, note: str = "") -> None:
        self.now += after
        self.meter.tick(done, total, note)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_rate_and_time_left_follow_from_what_moved(watch: Watch) -> None:
    watch.tick(0, 0)
    for second in range(1, 6):
        watch.tick(1, second * 10 * MIB)
    assert watch.reports[-1]["rate"] == 10 * MIB
    assert watch.reports[-1]["eta"] == 5.0
    watch.tick(1, 80 * MIB)
    assert 10 * MIB < watch.reports[-1]["rate"] < 30 * MIB, "smoothed"


def test_nothing_is_foretold_before_something_moved(watch: Watch) -> None:
    watch.tick(0, 0)
    watch.tick(1, 0)
    assert [(report["rate"], report["eta"]) for report in watch.reports] == [(0, None), (0, None)]


def test_reports_are_few_however_often_a_step_ticks(watch: Watch) -> None:
    for tick in range(1000):
        watch.tick(0.01, tick)
    assert 19 <= len(watch.reports) <= 22
    watch.meter.flush()
    assert watch.reports[-1]["done"] == 999, "what was held back is said in the end"
    watch.meter.flush()
    assert sum(report["done"] == 999 for report in watch.reports) == 1


def test_the_end_and_a_new_note_are_told_at_once_and_once(watch: Watch) -> None:
    watch.tick(0, 0, note="reading")
    watch.tick(0.01, 1, note="writing")
    watch.tick(0.01, 100 * MIB, note="writing")
    assert [(report["done"], report["note"]) for report in watch.reports] == [
        (0, "reading"),
        (1, "writing"),
        (100 * MIB, "writing"),
    ]
    for _ in range(100):
        watch.tick(0.001, 100 * MIB, note="writing")
        watch.tick(0.001, 0, total=0, note="writing")
    assert len(watch.reports) <= 4


def test_flower_hears_every_five_percent_or_five_seconds(watch: Watch) -> None:
    for percent in range(101):
        watch.tick(0.6, percent * MIB)
    assert 15 <= len(watch.events) <= 21
    before = len(watch.events)
    for _ in range(10):
        watch.tick(1, 100 * MIB)
    assert len(watch.events) - before == 2
    watch.tick(1, 0)
    assert watch.events[-1].startswith("0 %"), "a second disk begins at 0 %"


def test_a_report_reads_in_one_line() -> None:
    report = {"done": 120 * MIB, "total": 230 * MIB, "rate": 48 * MIB, "eta": 2.3, "note": ""}
    assert describe(report) == "52 %  120 of 230 MiB  48 MiB/s  2 s left"
    assert describe({"done": 5, "total": None, "rate": 0, "eta": None, "note": "waiting"}) == "waiting"
    assert describe({"done": 0, "total": 0, "rate": 0, "eta": None, "note": ""}) == ""


# --- patience -----------------------------------------------------------------------------------------------------


@given(attempt=st.integers(1, 100_000), first=st.floats(0.01, 60), longest=st.floats(60, 3600))
def test_pauses_double_within_bounds_and_differ(attempt: int, first: float, longest: float) -> None:
    retries = Retries(first_pause=first, longest_pause=longest)
    expected = min(first * 2 ** min(attempt - 1, 30), longest)
    assert 0.75 * expected <= retries.pause(attempt) <= 1.25 * expected


def test_hosts_that_failed_together_do_not_come_back_together() -> None:
    assert len({Retries().pause(3) for _ in range(20)}) > 1


def test_celery_notes_nothing_down_between_taking_a_request_and_its_admission() -> None:
    """Were Redis to die as it does, the request would fail and be gone; admission itself waits for Redis."""
    by_name = [*kinds._kinds, cancel_by_name.name, retry_undo_by_name.name]
    assert [name for name in by_name if app.tasks[name].track_started] == []


def test_patience_is_for_a_redis_that_is_away_only() -> None:
    answers: list[Exception | str] = [BrokerUnavailable("away"), BrokerUnavailable("away"), "here"]

    def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask) == "here"
    answers.append(InvalidSpec("no"))
    with pytest.raises(InvalidSpec):
        patiently(ask)
