"""Looks all the time for what must not be for a moment: a guest on two hosts at once."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection
from typing import Self

from tests.lab import LabHost

PAUSE = 0.2
"""Seconds between two looks; one takes milliseconds."""


class Watch(threading.Thread):
    """Looks for a guest's QEMU while the `with` block runs, on the hosts themselves: no libvirtd that is disturbed
    meanwhile is asked."""

    def __init__(self, hosts: Collection[LabHost], guest: str) -> None:
        super().__init__(name="watch", daemon=True)
        self._pairs = list(itertools.combinations(hosts, 2))
        self._guest = guest
        self._ended = threading.Event()
        self._seen: dict[str, list[float]] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(10)

    def run(self) -> None:
        while self._pairs and not self._ended.wait(PAUSE):
            for one, other in self._pairs:
                if self._runs_on_both(one, other):
                    self._seen.setdefault(f"{one.name} and {other.name}", []).append(time.monotonic())

    def complaints(self) -> list[str]:
        """What was seen, with the machine's monotonic clock, as the workers' logs have it."""
        return [
            f"QEMU ran {self._guest} on {hosts} at once: seen {len(times)} times from {times[0]:.3f} to {times[-1]:.3f}"
            for hosts, times in self._seen.items()
        ]

    def _runs_on_both(self, one: LabHost, other: LabHost) -> bool:
        # The same process before and after the look at the other host: it was there in between.
        first = one.find_qemu(self._guest)
        return first is not None and other.find_qemu(self._guest) is not None and one.find_qemu(self._guest) == first
