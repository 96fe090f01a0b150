"""What the body of a step gets in hand: the engine's side of `worker.context.Context`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from worker.engine import events
from worker.engine.journal import Journal, Lease
from worker.engine.lease import LeaseKeeper
from worker.engine.patience import patiently
from worker.engine.progress import Meter
from worker.engine.record import UNDO_STEP, Record, UndoEntry
from worker.engine.registry import Registry, registry
from worker.errors import BrokerUnavailable, Cancelled, FencedOff
from worker.settings import get_settings

if TYPE_CHECKING:
    from worker.engine.step import Step

log = structlog.get_logger(__name__)
Returned = TypeVar("Returned")


class StepContext:
    """What a step's body gets: its place in the operation, and the means to report, to stop and to be undone."""

    def __init__(self, record: Record, lease: Lease, keeper: LeaseKeeper, book: Journal, task: Any) -> None:
        self.record = record
        self.lease = lease
        self._keeper = keeper
        self._book = book
        self._task = task
        self._meter = Meter(self._report, self._show)
        self.step = next(step for step in (*record.steps.values(), *record.undo_steps) if step.key == lease.step)
        self.plan = self.step.plan
        self.settings = get_settings()

    @property
    def operation(self) -> str:
        """Id of the operation."""
        return self.record.id

    @property
    def fence(self) -> int:
        """Number of this execution; higher ones take over from lower ones."""
        return self.lease.fence

    @property
    def tries(self) -> int:
        """How often the step was tried by now, since it last got on: neither a worker's death nor a lock counts."""
        return self.lease.attempt - self.step.lost - self.step.locked - self.step.forgiven

    @property
    def is_undo(self) -> bool:
        """Whether this step takes back what another did."""
        return self.lease.step.startswith(UNDO_STEP)

    @property
    def is_irrevocable(self) -> bool:
        """Whether the operation cannot be taken back any more."""
        return self.record.irrevocable or self._keeper.irrevocable

    @property
    def host(self) -> str:
        """Name of the host this step runs on."""
        return self.plan.host

    @property
    def instance(self) -> str:
        """Name of the instance."""
        return self.record.instance

    @property
    def uuid(self) -> str:
        """The instance's uuid."""
        return self.record.uuid

    @cached_property
    def registry(self) -> Registry:
        """What runs where."""
        return registry()

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report `done` of `total` bytes; see `worker.context.Watcher`."""
        self.check()
        self._meter.tick(done, total, note)

    def check(self) -> None:
        """Raise `Cancelled` or `FencedOff` when the step must stop."""
        self._keeper.check()

    def undo(self, action: str, **arguments: Any) -> None:
        """Put down how to undo what comes next, on this host. Durable before it returns."""
        self.undo_on(self.host, action, **arguments)

    def undo_on(self, host: str, action: str, **arguments: Any) -> None:
        """Put down how to undo what that host will do, before it may begin: so this host knows of it, too."""
        self.check()
        entry = UndoEntry(action, host, arguments)
        self._put_down(lambda: self._book.push_undo(self.lease, entry))
        self._keeper.remember_undo(entry.as_json())

    def make_irrevocable(self) -> None:
        """Say that what comes next cannot be taken back; see `worker.context.Context`. An undo never can."""
        if self.is_undo:
            return
        self.check()
        if self._put_down(lambda: self._book.make_irrevocable(self.lease)) == "cancel":
            raise Cancelled(f"operation {self.operation} was asked to stop")
        self._keeper.remember_irrevocable()

    def _put_down(self, write: Callable[[], str]) -> str:
        """What the journal answers to that; where Redis has lost the operation, once it knows of it again."""
        answer = patiently(write)
        if answer == "gone":
            self._keeper.restore()
            answer = patiently(write)
        if answer in {"gone", "refused"}:
            raise FencedOff(f"another worker has taken over step {self.lease.step!r}", fence=self.fence)
        return answer

    def result(self, step: Step[Returned], key: str | None = None) -> Returned:
        """What an earlier step of this operation returned; `key` tells several of one kind apart."""
        return step.returned.validate_python(self.record.steps[key or step.name].result)

    def flush(self) -> None:
        """Say the last progress that was held back."""
        self._meter.flush()

    def _report(self, report: dict[str, Any]) -> None:
        if self._keeper.silent:
            return  # to ask a silent Redis again and again would hold the work up
        try:
            self._book.report(self.operation, self.lease.step, report)
        except BrokerUnavailable as error:
            log.debug("progress not reported", error=str(error))  # the copy goes on; the next report says more

    def _show(self, line: str) -> None:
        if self._keeper.silent:
            return
        # Flower shows `result` of a custom task event in state PROGRESS; it ignores update_state (measured).
        try:
            events.tell(self._task.request.hostname, "task-progress", self._task.request.id, result=line)
        except BrokerUnavailable as error:
            log.debug("progress not shown in Flower", error=str(error))
