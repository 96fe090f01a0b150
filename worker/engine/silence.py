"""Whether Redis took no writes without having restarted: frozen, full, or cut off. Leases ran out then that somebody
held. That it answers reads says nothing."""

from __future__ import annotations

import math
import time

from worker.settings import get_settings

SILENT = 1 / 3
"""Of a lease's time to live: so long a silence may have let leases run out that somebody would have renewed."""


class Silence:
    """What this process has noticed of it."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._over = -math.inf

    def failed(self) -> None:
        """A call was not answered, or refused."""
        if self._since is None:
            self._since = time.monotonic()

    def answered(self) -> None:
        """A write was taken."""
        if self._since is None:
            return
        if time.monotonic() - self._since > get_settings().lease_ttl * SILENT:
            self._over = time.monotonic()
        self._since = None

    @property
    def over_for(self) -> float:
        """Seconds since the last silence ended; infinite when there was none."""
        return time.monotonic() - self._over


silence = Silence()
"""Of this process."""
