"""How often, and how patiently, a step is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a step is tried again. Seconds; the pause doubles each time."""

    attempts: int = 6
    first_pause: float = 2.0
    longest_pause: float = 300.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after this attempt; with jitter, so that a sick host is not met by all at once."""
        pause = min(self.first_pause * 2.0 ** min(attempt - 1, 30), self.longest_pause)
        return pause * random.uniform(0.75, 1.25)


FINISH_RETRIES = Retries(attempts=100, first_pause=2.0, longest_pause=60.0)
"""What is not undone any more, as part of it is gone for good, is tried for an hour and a half."""
