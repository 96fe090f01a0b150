"""What benchmarks share: interleaved samples, and one line per result with its target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Medians of the fleet and of its yardstick, and what their relation should not exceed, if told. Milliseconds."""

    name: str
    ours: float
    yardstick: float
    target: float | None = None
    unit: str = "ratio"

    @property
    def figure(self) -> float:
        """The number that is compared with the target."""
        return self.ours / self.yardstick if self.unit == "ratio" else self.ours - self.yardstick

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.target is None or self.figure <= self.target

    def __str__(self) -> str:
        unit = "×" if self.unit == "ratio" else f" {self.unit}"
        figures = f"{self.ours:.1f} ms against {self.yardstick:.1f} ms: {self.figure:.2f}{unit}"
        if self.target is None:
            return f"{self.name}: {figures}"
        return f"{self.name}: {figures} (target ≤ {self.target:g}{unit}: {'met' if self.met else 'MISSED'})"


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def take_memory(scratch: Path, mib: int) -> None:
    """Have as much free memory at hand as a copy of so many MiB fills, by a file that is written and removed.

    What a virtual machine has given back to its host, which it does some 2 s after it was freed, costs 2 s per GiB to
    get again (measured as system time): whoever comes first after a pause would pay for all.
    """
    with scratch.open("wb") as file:
        for _ in range(mib + mib // 4):
            file.write(bytes(1024**2))
    scratch.unlink()


def interleaved(rounds: int, *calls: Callable[[int], float]) -> list[float]:
    """Medians of each call's answers, the calls taking turns so that a noisy moment meets them all."""
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for call, taken in zip(calls, samples, strict=True):
            taken.append(call(number))
    return [statistics.median(taken) for taken in samples]


def report(results: Sequence[Result]) -> int:
    """Print results; the exit code: 1 when a target was missed."""
    for result in results:
        print(result)
    return 0 if all(result.met for result in results) else 1
