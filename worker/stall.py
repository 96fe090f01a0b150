"""When to give up on what moves nothing any more: by its state, never by how long it takes."""

from __future__ import annotations

import time
from typing import Any

from worker.errors import Stalled


class StallDeadline:
    """Raises `Stalled` once what it is shown has stayed the same for `seconds`; `what` is that, as a noun."""

    def __init__(self, what: str, seconds: float) -> None:
        self._what, self._seconds = what, seconds
        self._last: Any = None
        self._moved_at = time.monotonic()

    def see(self, state: Any) -> None:
        """Look at the state that things are in now; one that is not known (None) has not moved."""
        now = time.monotonic()
        if state is not None and state != self._last:
            self._last, self._moved_at = state, now
        if now - self._moved_at > self._seconds:
            raise Stalled(f"{self._what} has moved nothing for {self._seconds:g} s", seconds=self._seconds)
