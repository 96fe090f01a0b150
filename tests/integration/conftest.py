"""Workers of the engine with trivial steps, on a Redis that tests may take down; a host that has files."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import settings
from tests.integration.engine_tasks import HOST, Asked
from tests.lab import LabHost
from tests.lab.process import Keeper, LabError, Process, lab_folder, tail, wait_until
from tests.lab.redis import Redis
from worker.engine.journal import Journal, journal
from worker.engine.operation import submit
from worker.engine.record import Record, StepState
from worker.engine.registry import WorkerKind, registry
from worker.models import Peer

PATIENCE = 90.0
"""Seconds: Celery's consumer may take most of a minute to notice that its connection died with a Redis."""

KINDS: tuple[WorkerKind, ...] = ("control", "disk")
RUN = "from tests.integration.engine_tasks import main; main()"
IMPATIENT = {
    "lease_ttl": 2,
    "reaper_interval": 0.2,
    "publish_grace": 1,
    "heartbeat_interval": 0.5,
    "control_slots": 4,
    "disk_slots": 4,
}


class Events:
    """What steps wrote down on the host, whatever Redis remembers of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, what: str | None = None, step: str | None = None) -> list[dict[str, Any]]:
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that is being written may be seen in part
        lines = [json.loads(line) for line in whole.splitlines()]
        return [one for one in lines if what in (None, one["what"]) and step in (None, one["step"])]

    def begun(self) -> list[str]:
        """Steps in the order in which they were begun."""
        return [line["step"] for line in self.lines("begin")]

    def undone(self) -> list[str]:
        return [line["thing"] for line in self.lines("undo")]

    def wait(self, what: str, step: str | None = None, number: int = 1) -> dict[str, Any]:
        """The line that says so for the `number`-th time, once it is there."""
        wait_until(
            lambda: len(self.lines(what, step)) >= number, PATIENCE, f"{what} no. {number} of {step or 'any step'}"
        )
        return self.lines(what, step)[number - 1]

    def require_no_overlap(self) -> None:
        """No step was executed by two at a time: one's first sign of life comes after the last one of another."""
        signs: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in self.lines():
            signs[line["operation"], line["step"]][line["fence"]].append(line["at"])
        for step, executions in signs.items():
            in_turn = [executions[fence] for fence in sorted(executions)]
            for one, after in pairwise(in_turn):
                assert max(one) < min(after), f"two executed {step} at the same time"


class EngineFleet:
    """A Redis and the two workers of one host, with their files in `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.redis = Redis(folder / "redis")
        self.settings = {**IMPATIENT, "redis_url": self.redis.url, "data_dir": folder / "data"}
        self.workers: dict[WorkerKind, Process] = {}
        self._folder = folder
        self._options = options
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(self.redis)
            keeper = Keeper(self._folder / "workers.log")
            self._stack.callback(keeper.end)
            env = {f"VIRTFLEET_{name.upper()}": str(value) for name, value in self.settings.items()}
            for kind in KINDS:
                argv = [sys.executable, "-c", RUN, kind, *self._options]
                self.workers[kind] = Process(keeper, argv, self._folder / f"{kind}.log", env)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def in_use(self) -> Iterator[Self]:
        """This process is a client of the fleet in the `with` block, and all is up as it begins."""
        with settings(**self.settings):
            self.heal()
            yield self

    def heal(self) -> None:
        """Have everything up, whatever a test has done to it."""
        if not self.redis.processes():
            self.redis.start()
        for worker in self.workers.values():
            if not worker.alive:
                worker.start()
        for kind, worker in self.workers.items():
            wait_until(partial(self._serves, kind), PATIENCE, f"the {kind} worker serves", worker.log)

    def _serves(self, kind: WorkerKind) -> bool:
        self.workers[kind].require_alive()
        return registry().alive(HOST).get(kind, {}).get("pid") == self.workers[kind].pid

    @property
    def journal(self) -> Journal:
        return journal()

    def ended(self, operation_id: str, timeout: float = PATIENCE) -> Record:
        """The record of an operation once it has ended."""

        def ended() -> bool:
            record = self.journal.find(operation_id)
            return record is not None and record.state.final

        try:
            wait_until(ended, timeout, f"operation {operation_id} ends")
        except LabError as error:
            logs = "\n".join(tail(worker.log, 40) for worker in self.workers.values())
            raise LabError(f"{error}\n{self.journal.find(operation_id)}\n{logs}") from None
        return self.journal.read(operation_id)

    def run(self, request: Asked, timeout: float = PATIENCE) -> Record:
        return self.ended(submit(request).id, timeout)

    def reaches(self, operation_id: str, step: str, state: StepState) -> None:
        """Wait until a step is in that state."""
        wait_until(lambda: self.journal.read(operation_id).steps[step].state is state, 20, f"{step} is {state}")


@pytest.fixture(scope="module")
def engine_fleet() -> Iterator[EngineFleet]:
    with lab_folder() as folder, EngineFleet(folder) as fleet:
        yield fleet


@pytest.fixture
def fleet(engine_fleet: EngineFleet) -> Iterator[EngineFleet]:
    """Redis and the workers, all up."""
    with engine_fleet.in_use():
        yield engine_fleet


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(tmp_path / "events")


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    """A host at the end of a cable, from which others fetch files."""
    with lab_folder() as folder, LabHost("hosta", folder, networked=True) as host:
        yield host


@pytest.fixture
def peer(host: LabHost) -> Peer:
    """That host as who fetches from it sees it."""
    assert host.cable
    return Peer(name="hosta", address=host.cable.address, data_dir=host.data, copies_out=1)
