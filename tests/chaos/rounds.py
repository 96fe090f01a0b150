"""One round: an operation, disturbed at a chosen moment, judged afterwards. Chosen by seed and number alone."""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass

from tests.chaos import faults, scenarios
from tests.chaos.faults import Fault, Target
from tests.chaos.invariants import Played, events_of, violations
from tests.chaos.scenarios import ADMISSION, UNDO, Scenario
from tests.chaos.site import HOME, PET, Site
from tests.chaos.watch import Watch
from tests.lab import LabError
from worker.engine.record import FINAL, Record, State, StepRecord, StepState
from worker.models import PowerState

BOUND = 90.0
"""Seconds within which every operation must have ended."""

FORGOTTEN = 8.0
"""Seconds after which a scheduler asks again for an operation of which nobody knows, though all workers are up."""

NONE = "none"


@dataclass(frozen=True)
class Round:
    """What is done to whom, and when: once the step has gone on for that share of the time that it takes.

    With `by_name` the request travels as a Celery task, as a scheduler sends it; else the client writes it down itself.
    """

    number: int
    operation: str
    fault: str
    step: str
    share: float
    by_name: bool = False

    def __str__(self) -> str:
        return f"{self.operation}: {self.fault}, {self.share:.0%} into {self.step}"


@dataclass(frozen=True)
class Verdict:
    """How a round went. `hit` is the step that really ran when the fault struck, `recovery` the seconds from there
    to the end of the operation, less what was left to do; `back` those until a killed worker had been started again.

    `restarts`: workers that ended by themselves. Celery 5.7 does when Redis goes away just between the delivery of a
    message and its acknowledgement; the supervisor is there for that, as systemd is in production.

    `lost_backups`: guests that libvirt held in a backup that it knew nothing of, until the remedy was followed.
    """

    round: Round
    state: str
    hit: str
    seconds: float
    recovery: float | None = None
    slow: bool = False
    asked_again: bool = False
    restarts: int = 0
    back: float | None = None
    lost_backups: int = 0
    violations: list[str] = dataclasses.field(default_factory=list)


def combinations(operations: list[str], kinds: list[str], *, as_root: bool) -> list[tuple[str, str, str]]:
    """Every operation, fault and moment that go together."""
    return [
        (scenario.name, fault.name, step)
        for scenario in scenarios.SCENARIOS
        for fault in faults.FAULTS
        for step in scenario.moments
        if (not operations or scenario.name in operations)
        and (not kinds or fault.name in kinds)
        and (as_root or not (fault.as_root or scenario.journey))
        and _makes_sense(scenario, fault, step)
    ]


def _makes_sense(scenario: Scenario, fault: Fault, step: str) -> bool:
    within_reach = fault.needs in {"", scenario.queue(step)} and (scenario.journey or not fault.between_hosts)
    return bool(within_reach) and not (step == UNDO and fault.name == "cancel")


def drawn(seed: int, number: int, choices: list[tuple[str, str, str]]) -> Round:
    """The round of that number: all combinations come in turn, shuffled anew each time."""
    turn, place = divmod(number, len(choices))
    deck = random.Random(f"{seed}:{turn}").sample(choices, len(choices))
    operation, fault, step = deck[place]
    dice = random.Random(f"{seed}#{number}")
    return Round(number, operation, fault, step, round(dice.random(), 4), by_name=dice.random() < 0.5)


def play(site: Site, what: Round) -> Verdict:
    """Prepare, disturb, judge, clean up. Raises LabError when the site itself is broken."""
    scenario, fault = scenarios.BY_NAME[what.operation], faults.BY_NAME.get(what.fault)
    site.wait_serving()
    if fault and scenario.name not in site.usual:
        undisturbed = play(site, Round(-1, what.operation, NONE, ADMISSION, 0))
        if undisturbed.violations:
            raise LabError(f"without any fault: {undisturbed.violations}")
    instance = _prepare(site, scenario)
    began, boots, checkpoints = time.time(), site.boots(), frozenset(site.checkpoints())
    with Watch(site.hosts.values() if scenario.journey else [], instance) as watch:
        with ExitStack() as relief:
            site.relief = relief
            attempt = Attempt(site, scenario, fault, what, instance)
            record = attempt.run()
        lost_backups = site.end_lost_backups()
        played = Played(
            *(scenario, fault, instance, record, attempt.logs, what.step == UNDO),
            forgotten=attempt.forgotten,
            lost_backups=lost_backups,
            boots=boots,
            checkpoints=checkpoints,
        )
        found = [*attempt.complaints, *violations(site, played)]
    found += watch.complaints()
    if not fault:
        site.usual[scenario.name] = _durations(record, began)
    if not found:  # else the site is given up
        _clean_up(site, scenario, instance)
    seconds = (record.ended_at or time.time()) - began
    recovery = attempt.recovery(record)
    back = site.ready_since() - attempt.struck if fault and fault.by_lease else None
    limit = _limit(site, fault, back or 0.0)
    slow = recovery is not None and limit is not None and recovery > limit
    restarts = site.supervisor.unexpected()
    return Verdict(
        *(what, record.state.value, attempt.hit, seconds, recovery, slow, attempt.asked_again, restarts, back),
        lost_backups=lost_backups,
        violations=found,
    )


def _durations(record: Record, submitted: float) -> dict[str, float]:
    """Seconds that the operation and each of its steps took."""
    ended = record.ended_at or time.time()
    steps = {key: (step.ended_at or ended) - (step.started_at or ended) for key, step in record.steps.items()}
    return {ADMISSION: ended - submitted, UNDO: sum(steps.values()) / 4, **steps}


def _limit(site: Site, fault: Fault | None, back: float) -> float | None:
    """A killed worker's step goes on when its lease has run out, and not before a worker is there."""
    if fault and fault.by_lease:
        return max(site.lease_ttl, back) + site.lease_ttl / 2
    return fault.limit if fault else None


class Attempt:
    """The disturbed operation while it runs."""

    def __init__(self, site: Site, scenario: Scenario, fault: Fault | None, what: Round, instance: str) -> None:
        self.site, self.scenario, self.fault, self.what = site, scenario, fault, what
        self.logs = site.log_offsets()
        self.hit = ""
        self._usual = site.usual.get(scenario.name, {})
        self.asked_again = self.forgotten = False
        self.complaints: list[str] = []
        self.operation = f"chaos-{what.number}-{uuid.uuid4().hex[:8]}"
        self._arguments = {**scenario.request(site.ground(instance)), "operation_id": self.operation}
        self._began = self.struck = 0.0
        self._last: Record | None = None

    def run(self) -> Record:
        """Submit, strike at the moment, and wait for the end."""
        if self.fault and self.fault.early:
            self._strike()
        self._submit()
        if self.fault:
            self._await_moment()
            if not self.fault.early:
                self._strike()
        return self._await_end()

    def recovery(self, record: Record) -> float | None:
        """Seconds that the fault has cost."""
        if not self.struck or not record.ended_at or (self.fault and self.fault.early):
            return None
        left = 0.0 if self.what.fault == "cancel" else self._usual[ADMISSION]
        left = max(0.0, left - (self.struck - self._began))
        return max(0.0, record.ended_at - self.struck - left)

    def _submit(self) -> None:
        self._began = self._began or time.time()
        if self.what.by_name:
            self.site.send(self.scenario.task, **self._arguments)
        else:
            self.site.submit(self.scenario.task, **self._arguments)

    def _await_moment(self) -> None:
        if self.what.step == UNDO:
            self._await_step(self.scenario.cancel_at)
            self.site.client.cancel(self.operation)
        if self.what.step != ADMISSION:
            self._await_step(self.what.step)
        time.sleep(self.what.share * self._usual[self.what.step])

    def _await_step(self, key: str) -> None:
        deadline = time.monotonic() + BOUND
        while time.monotonic() < deadline:
            if (record := self._look()) and (record.state.final or any(map(_has_begun, _steps(record, key)))):
                return
            time.sleep(0.001)

    def _strike(self) -> None:
        assert self.fault
        record = self._look()
        step = _running_step(record, self.what.step) if record else None
        self.hit = _told(record, step) if record else "all"
        hosts = tuple(self.site.hosts) if self.scenario.journey else (HOME,)
        self.struck = time.time()
        self.fault.strike(self.site, Target(self.operation, step.plan.host if step else HOME, hosts))

    def _look(self) -> Record | None:
        record = self.site.client.journal.find(self.operation)
        self._last = record or self._last
        return record

    def _await_end(self) -> Record:
        deadline, missing_since = time.monotonic() + BOUND, 0.0
        while time.monotonic() < deadline:
            if record := self._look():
                missing_since = 0.0
                if record.state.final:
                    return record
            else:
                if not missing_since:
                    self.site.wait_serving()  # before, nobody is there who could remember it
                    missing_since = time.monotonic()
                if time.monotonic() - missing_since > FORGOTTEN:
                    if ended := self._ended_unseen():
                        return ended
                    self._ask_again()
            time.sleep(0.01)
        self.complaints.append(f"not final after {BOUND:g} s: {self._last and self._last.as_dict()}")
        return self._last or Record(self.operation, "", {}, "", "", "", State.STUCK)

    def _ended_unseen(self) -> Record | None:
        """The operation, if it ended just before Redis forgot it."""
        events = (event for log, offset in self.logs.items() for event in events_of(self.operation, log, offset))
        state = next((event["state"] for event in events if event["event"] == "ended"), None)
        self.forgotten = state is not None
        return dataclasses.replace(self._last, state=State(state)) if self._last and state else None

    def _ask_again(self) -> None:
        """As a scheduler does: the same id again, which attaches to the operation or begins it anew."""
        if self._last and any(map(_has_begun, self._last.steps.values())):
            self.complaints.append("Redis forgot an operation that had begun, and no host remembered it")
        self.asked_again = True
        self.site.wait_serving()
        self._submit()


def _steps(record: Record, key: str) -> list[StepRecord]:
    return list(record.undo_steps) if key == UNDO else [record.steps[key]]


def _has_begun(step: StepRecord) -> bool:
    return step.state is not StepState.PENDING


def _running_step(record: Record, aimed_at: str) -> StepRecord | None:
    """The step that runs now, or is next; of several side by side the one that is aimed at."""
    if record.state in FINAL:
        return None
    steps = reversed(record.undo_steps) if record.state is State.UNDOING else record.steps.values()
    left = [step for step in steps if step.state is not StepState.DONE]
    return next((step for step in left if step.key == aimed_at), left[0] if left else None)


def _told(record: Record, step: StepRecord | None) -> str:
    if record.state in FINAL:
        return "ended"
    if record.state is State.UNDOING:
        return UNDO
    return step.key if step else "end"


def _prepare(site: Site, scenario: Scenario) -> str:
    """Bring the operation's instance into its first state; its name."""
    if scenario.needs_snapshot:
        site.bring(PET, PowerState.RUNNING)
        site.wait_booted()
        site.keep_snapshot(PET)
    if scenario.subject == "pet":
        site.bring(PET, scenario.before)
        if scenario.task == "virtfleet.snapshot":
            site.wait_booted()
        return PET
    site.fresh_image()
    name = f"g{uuid.uuid4().hex[:6]}"
    if scenario.subject == "victim":
        site.spawn_victim(name, scenario)
    return name


def _clean_up(site: Site, scenario: Scenario, instance: str) -> None:
    known = site.client.registry.find(instance)
    if scenario.subject != "pet" and known:
        site.wait_serving()
        if known.move:
            site.run("virtfleet.confirm", instance=instance)
        site.run("virtfleet.destroy", instance=instance)
    site.drop_images()
    site.drop_snapshots()
