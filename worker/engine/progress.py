"""How far a step is: bytes, rate and time left, for watchers in Redis and for Flower."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

REPORT_EVERY = 0.5
"""Seconds between two reports to Redis (0.11 ms each, measured; more often shows nobody more)."""

EVENT_EVERY = 5.0
EVENT_STEP = 0.05
"""Flower hears of it every 5 s or every 5 percent."""

SMOOTHING = 0.3
"""Weight of the newest rate in the shown one."""


class Meter:
    """Turns "done of total" into reports that carry rate and time left. Bytes and seconds."""

    def __init__(self, report: Callable[[dict[str, Any]], None], event: Callable[[str], None]) -> None:
        self._report = report
        self._event = event
        self._last: dict[str, Any] | None = None
        self._reported_at = 0.0
        self._event_at = time.monotonic()
        self._event_part = 0.0
        self._rate = 0.0
        self._pending: dict[str, Any] | None = None
        self._finished = False

    def tick(self, done: int, total: int | None, note: str) -> None:
        """Take note; says it when enough time has passed, and always when all is done or the note is new."""
        now = time.monotonic()
        report = {"done": done, "total": total, "note": note, "rate": self._rate, "eta": None}
        finished = total is not None and done >= total
        was_finished, self._finished = self._finished, finished
        new_note = self._last is None or note != self._last["note"]
        if now - self._reported_at < REPORT_EVERY and (was_finished or not finished) and not new_note:
            self._pending = report
            return
        self._say(report, now)

    def flush(self) -> None:
        """Say what was held back."""
        if self._pending:
            self._say(self._pending, time.monotonic())

    def _say(self, report: dict[str, Any], now: float) -> None:
        if self._last and report["done"] > self._last["done"]:
            rate = (report["done"] - self._last["done"]) / max(now - self._reported_at, 1e-3)
            self._rate = rate if not self._rate else (1 - SMOOTHING) * self._rate + SMOOTHING * rate
        report["rate"] = round(self._rate)
        if report["total"] and self._rate:
            report["eta"] = round(max(report["total"] - report["done"], 0) / self._rate, 1)
        self._pending, self._last, self._reported_at = None, report, now
        self._report(report)
        part = report["done"] / report["total"] if report["total"] else 0.0
        if now - self._event_at >= EVENT_EVERY or abs(part - self._event_part) >= EVENT_STEP:
            self._event_at, self._event_part = now, part
            self._event(describe(report))


def describe(report: dict[str, Any]) -> str:
    """A report in one line, such as `52 %  120 of 230 MiB  48 MiB/s  2 s left`."""
    mib = 1024**2
    parts = []
    if report["total"]:
        parts.append(f"{100 * report['done'] / report['total']:.0f} %")
        parts.append(f"{report['done'] / mib:.0f} of {report['total'] / mib:.0f} MiB")
    if report["rate"]:
        parts.append(f"{report['rate'] / mib:.0f} MiB/s")
    if report["eta"] is not None:
        parts.append(f"{report['eta']:.0f} s left")
    if report["note"]:
        parts.append(report["note"])
    return "  ".join(parts)
