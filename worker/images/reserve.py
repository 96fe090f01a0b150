"""Space promised to operations that have not written it yet, so that no other operation is promised it too.

One small file per operation in the data directory: it holds with several workers, and over their deaths.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from worker.context import Watcher
from worker.images.files import locked, replace_json, require_space

LOCK_WAIT = 10.0  # seconds; it is held for milliseconds


@dataclass(frozen=True)
class Ledger:
    """The promises on one data directory."""

    root: Path

    @property
    def _folder(self) -> Path:
        return self.root / "reserved"

    def reserve(self, operation: str, needed: int, folder: Path, keep_free: int, watch: Watcher) -> None:
        """Promise `needed` bytes to an operation that writes them below `folder`; a new promise replaces its former.

        `keep_free`: bytes that stay free in any case. Raises NoSpace.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with locked(self.root / ".reserve.lock", operation=operation, wait=LOCK_WAIT, watch=watch):
            missing = max(0, needed - allocated(folder))
            require_space(self.root, missing, keep_free + self.outstanding(besides=operation))
            replace_json(self.path(operation), {"bytes": needed, "folder": str(folder)})

    def release(self, operation: str) -> None:
        """Give back what was promised; nothing is fine."""
        self.path(operation).unlink(missing_ok=True)

    def outstanding(self, besides: str = "") -> int:
        """Bytes promised and not written yet, except to one operation."""
        return sum(left for operation, left in self.promises().items() if operation != besides)

    def promises(self) -> dict[str, int]:
        """Bytes promised and not written yet, by operation."""
        return {unquote(path.stem): _left(path) for path in self._folder.glob("*.json")}

    def sweep(self, live_operations: Collection[str]) -> list[Path]:
        """Remove the promises to operations that are over."""
        swept = [path for path in self._folder.glob("*.json") if unquote(path.stem) not in live_operations]
        for path in swept:
            path.unlink(missing_ok=True)
        return swept

    def path(self, operation: str) -> Path:
        """Where it is noted what is promised to an operation."""
        return self._folder / f"{quote(operation, safe='')}.json"


def allocated(folder: Path) -> int:
    """Bytes that the files directly in a folder take on the disk."""
    try:
        return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())
    except FileNotFoundError:  # the folder or one of its files
        return 0


def _left(promise: Path) -> int:
    try:
        content = json.loads(promise.read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return max(0, int(content["bytes"]) - allocated(Path(content["folder"])))
