"""Progress over several files: each reports of itself, and what users see is how far all of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.context import Watcher


@dataclass(frozen=True)
class Share:
    """The watcher of one file among several. Sizes in bytes."""

    watch: Watcher
    before: int
    size: int
    total: int
    note: str

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report this file's progress as a part of all."""
        part = min(done, self.size) if not total else self.size * min(done, total) // total
        self.watch.progress(self.before + part, self.total, note or self.note)

    def check(self) -> None:
        """As the whole work's watcher says."""
        self.watch.check()


def shares(watch: Watcher, sizes: Sequence[int], note: str = "extracting") -> list[Share]:
    """A watcher for each of several files, one after the other."""
    return [Share(watch, sum(sizes[:index]), size, sum(sizes), note) for index, size in enumerate(sizes)]
