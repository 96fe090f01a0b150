"""Keeping the lease of a running step: a thread renews it and learns from each renewal whether to go on."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType

import structlog

from worker.engine.journal import Journal, Lease
from worker.engine.mirror import Copy, Mirror
from worker.engine.patience import patiently
from worker.engine.record import Record, parse
from worker.errors import BrokerUnavailable, Cancelled, FencedOff, FleetError, HandedOver
from worker.settings import get_settings

log = structlog.get_logger(__name__)

LOOK_AGAIN = 2.0
"""Seconds between two looks at what others have put down meanwhile."""

LISTEN = 0.5
"""Seconds between two renewals: so long a cancel takes to be heard at the most."""


class LeaseKeeper:
    """Renews a lease while its block runs; `check` says whether the step may still change anything.

    While Redis is away the step goes on: its lease is taken back afterwards if nobody else took the step over, and
    if somebody did, the higher fence refuses this one's commit.
    """

    def __init__(self, journal: Journal, lease: Lease) -> None:
        self.journal = journal
        self.lease = lease
        self._dump = lease.fields, lease.undo
        self._mirror = Mirror()
        self.silent = False
        """Whether Redis did not answer the last renewal."""
        self.irrevocable = False
        """Whether this execution has said that the operation cannot be taken back."""
        self._stop: FleetError | None = None
        self._heard_at = lease.asked_at
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {lease.step}", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._copy()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # Not joined without bound: a renewal that hangs in a dead socket ends by its own timeout.
        self._thread.join(timeout=1)

    def record(self) -> Record:
        """The operation's record as it was when the step was taken."""
        return parse(self.lease.operation, *self._dump)

    def check(self) -> None:
        """Raise `Cancelled` or `FencedOff` when the step must stop."""
        if not self._stop and not self.silent and time.monotonic() - self._heard_at > get_settings().lease_ttl / 2:
            self._ask_again()
        if self._stop:
            raise self._stop

    def _ask_again(self) -> None:
        """This process stood still, and its lease may be another's by now: ask before anything is changed."""
        try:
            self._renew()
        except BrokerUnavailable:
            self.silent = True

    def remember_undo(self, entry: str) -> None:
        """Keep in mind what the journal was told, in case Redis forgets it."""
        fields, undo = self._dump
        if entry not in undo:
            self._dump = fields, [*undo, entry]
        self._look_again()
        self._copy()

    def remember_irrevocable(self) -> None:
        """Keep in mind that the operation cannot be taken back, in case Redis forgets it."""
        self.irrevocable = True
        self._copy()

    def _look_again(self) -> None:
        """Learn what siblings have put down since; where Redis has lost it all, what is known here stands."""
        with suppress(BrokerUnavailable):
            fields, undo = self.journal.dump(self.lease.operation)
            if fields and set(undo) >= set(self._dump[1]):
                self._dump = fields, undo

    def refresh(self) -> None:
        """Bring the host's copy up to date with how the step ended."""
        fields, undo = patiently(self.journal.dump, self.lease.operation)
        if fields:
            self._dump = fields, undo
            self._mirror.keep(Copy(self.lease.operation, fields, undo))

    def _copy(self) -> None:
        fields, undo = self._dump
        if fields:
            self._mirror.keep(Copy(self.lease.operation, {**fields, **self._own()}, undo))

    def _own(self) -> dict[str, str]:
        field = f"step:{self.lease.step}:"
        known = {f"{field}state": "running", f"{field}fence": str(self.lease.fence)}
        return known | ({"irrevocable": "1"} if self.irrevocable else {})

    def restore(self) -> None:
        """Give Redis back the record that it has lost, and go on."""
        fields, undo = self._dump
        copy = self._mirror.find(self.lease.operation)
        if copy and set(copy.undo) >= set(undo):  # a sibling on this host has kept it later
            fields, undo = copy.fields, copy.undo
        if self.journal.restore(self.lease, {**fields, **self._own()}, undo):
            log.warning("Redis had lost this operation: restored from memory", operation=self.lease.operation)

    def _keep(self) -> None:
        # A step that was told to stop keeps its lease until it has: nothing may be undone beneath it before.
        looked_at = time.monotonic()
        while not self._ended.wait(LISTEN) and not isinstance(self._stop, FencedOff):
            try:
                self._renew()
                self.silent = False
                if time.monotonic() - looked_at > LOOK_AGAIN:
                    looked_at = time.monotonic()
                    self._look_again()
                    self._copy()
            except BrokerUnavailable as error:
                if not self.silent:
                    log.warning("cannot renew the lease; the step goes on", step=self.lease.step, error=str(error))
                self.silent = True
            except Exception:
                log.exception("renewing the lease failed", step=self.lease.step, ttl=get_settings().lease_ttl)

    def _renew(self) -> None:
        asked_at = time.monotonic()
        kept, cancel = self.journal.renew(self.lease)
        self._heard_at = asked_at
        if kept == "gone":
            self.restore()
        elif kept == "lost":
            self._stop = FencedOff(
                f"another worker has taken over step {self.lease.step!r}; this one stops where it is",
                fence=self.lease.fence,
            )
        elif kept == "leave":
            self._stop = HandedOver("the worker is being stopped; the step goes on once it, or another, is up")
        elif kept == "stop" or (cancel and not self.lease.step.startswith("undo:")):
            self._stop = Cancelled(f"operation {self.lease.operation} was asked to stop")
