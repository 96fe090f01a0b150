"""What a verb needs to know of whoever called it: where to report, whether to go on, how to be undone.

The engine's step context is one of these; a plain script uses `Alone`. So verbs and nouns know no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Watcher(Protocol):
    """Somebody who watches a long piece of work."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report `done` of `total` bytes; cheap enough to be called often. Raises what `check` raises."""

    def check(self) -> None:
        """Raise `Cancelled` or `FencedOff` when the work must stop; called at least once a second."""


class Context(Watcher, Protocol):
    """The watcher of a step that changes things on a host."""

    @property
    def operation(self) -> str:
        """Id of the operation this work belongs to."""

    @property
    def fence(self) -> int:
        """Number of this execution: a higher one has taken over from a lower one."""

    def undo(self, action: str, **arguments: Any) -> None:
        """Put down how to undo what is about to be done; durable before it returns. JSON-able arguments."""

    def make_irrevocable(self) -> None:
        """Say that what comes next cannot be taken back: from then on the operation goes forward only.

        A cancel is too late then. Raises `Cancelled` when one came before, `FencedOff`.
        """


class Alone:
    """A context for work that nobody watches: scripts, benchmarks and tests of verbs."""

    def __init__(self, operation: str = "alone", fence: int = 1) -> None:
        self.operation = operation
        self.fence = fence
        self.undone_by: list[tuple[str, dict[str, Any]]] = []
        self.last_progress: tuple[int, int | None, str] = (0, None, "")

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Remember the last report."""
        self.last_progress = (done, total, note)

    def check(self) -> None:
        """Nobody stops this work."""

    def undo(self, action: str, **arguments: Any) -> None:
        """Remember how to undo."""
        self.undone_by.append((action, arguments))

    def make_irrevocable(self) -> None:
        """Nobody stops this work."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """What waits in this block, and was handed no watcher because it changes nothing, heeds this one."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def check_watcher() -> None:
    """Raise what the watcher of the block around raises when the work must stop."""
    watcher = _watcher.get()
    if watcher:
        watcher.check()
