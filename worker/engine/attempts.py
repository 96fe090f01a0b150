"""What counts as an attempt of a step, how often it is tried again after which error, and how patiently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worker.engine.retries import FINISH_RETRIES, Retries
from worker.engine.step_context import StepContext
from worker.errors import (
    BrokerUnavailable,
    Cancelled,
    FleetError,
    HandedOver,
    InstanceLocked,
    NotItsTurn,
    NotOurs,
    TransferInterrupted,
)

STUBBORN = 6
"""Attempts where there is no way back, if the error is not worth trying again elsewhere: about a minute."""

LOCKED_PAUSE = 3.0
"""Seconds at the most until a step is tried again that met another process' lock."""

MOST_LOCKED = 120
"""Attempts that may meet another process' lock before the step fails: some 8 s each, a quarter of an hour in all."""

MOST_LOST = 5
"""How often more than it may be tried a step may end in silence, the worker having died, before it fails."""


@dataclass(frozen=True)
class Attempts:
    """The attempts of a step so far, the present one included, and how many its definition has for it."""

    ctx: StepContext
    defined: Retries

    @property
    def retries(self) -> Retries:
        """As defined, but more of them from when on what it does is not taken back any more."""
        one, other = self.defined, FINISH_RETRIES
        return max(one, other, key=lambda retries: retries.attempts) if self.ctx.is_irrevocable else one

    @property
    def were_lost(self) -> bool:
        """Whether the worker died in so many of them that another one would hardly end otherwise."""
        return self.ctx.step.lost > self.retries.attempts + MOST_LOST

    def may_follow(self, error: Exception) -> bool:
        """Whether the step may be tried again after that."""
        match error:
            case HandedOver() | NotItsTurn():
                return True
            case TransferInterrupted() if error.got_on:
                return True
            case InstanceLocked():
                return self.ctx.step.locked < self._most_locked
            case FleetError():
                return self.ctx.tries < self._most_after(error)
            case _:
                # What cannot be removed now (disk full, an I/O error) may be later, and to remove is repeatable.
                may = has_no_way_back(self.ctx) and isinstance(error, OSError)
                return may and self.ctx.tries < self.retries.attempts

    def pause_after(self, error: Exception | None) -> float:
        """Seconds until the next one."""
        pause = self.retries.pause(self.ctx.tries)
        match error:
            case HandedOver():
                return 0.0
            case TransferInterrupted() if error.got_on:
                return self.retries.pause(1)
            case InstanceLocked():  # of one that stood still, as a rule, and lets go as soon as it goes on
                return min(pause, LOCKED_PAUSE)
            case _:
                return pause

    def noted(self, error: FleetError | None) -> dict[str, int]:
        """What the journal has to put down of how this one counts."""
        step = self.ctx.step
        match error:
            case HandedOver() | NotItsTurn():
                return {"attempt": self.ctx.lease.attempt - 1}
            case TransferInterrupted() if error.got_on:
                return {"forgiven": step.forgiven + self.ctx.tries}
            case InstanceLocked():
                return {"locked": step.locked + 1}
            case _:
                return {}

    def told(self, error: FleetError) -> dict[str, Any]:
        """Which one of how many this was, for the error's reader."""
        if isinstance(error, InstanceLocked):
            return {"attempt": self.ctx.step.locked + 1, "attempts": self._most_locked}
        return {"attempt": self.ctx.tries, "attempts": self.retries.attempts}

    @property
    def _most_locked(self) -> int:
        return max(MOST_LOCKED, self.retries.attempts)

    def _most_after(self, error: FleetError) -> int:
        if error.retryable or isinstance(error, BrokerUnavailable):  # the work is sound, only Redis was away
            return self.retries.attempts
        # A full disk may have room again in a minute, and what is given up leaves a guest half way.
        hopeless = error.bad_input or isinstance(error, NotOurs | Cancelled)
        return STUBBORN if has_no_way_back(self.ctx) and not hopeless else 1


def has_no_way_back(ctx: StepContext) -> bool:
    """Whether nobody puts right what this step leaves undone."""
    return ctx.is_undo or ctx.is_irrevocable
