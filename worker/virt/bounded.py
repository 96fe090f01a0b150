"""Calls that QEMU itself has to answer, bounded: libvirt waits for a QEMU that hangs as long as it takes.

libvirtd goes on answering keepalives meanwhile (seen with a QEMU under SIGSTOP), so the connection's bound is none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import libvirt

from worker.context import check_watcher
from worker.errors import GuestHung

ANSWER_SECONDS = 15.0
"""How long QEMU may take to answer; a healthy one does within milliseconds, a busy one within a second or two."""

START_SECONDS = 600.0
"""How long a guest may take to start that has no saved memory to read: a healthy one is up within seconds."""

HEED_SECONDS = 0.5
"""How often one who waits looks whether the answer is still wanted."""

Answer = tuple[Any, Exception | None]

ANSWERED_BY_QEMU = frozenset(
    {
        *("shutdownFlags", "reboot", "reset", "suspend", "resume", "pMWakeup"),
        *("blockJobInfo", "blockJobAbort", "blockJobSetSpeed", "blockCopy"),
        *("backupBegin", "jobStats", "abortJob"),
    }
)
"""Calls of a domain that end at QEMU's monitor, and soon. Those that take their time there (save, destroy) have a
bound of libvirt's own, or somebody who follows them."""


class _Bounded:
    """A domain that raises GuestHung when QEMU leaves a call unanswered; else as libvirt made it."""

    def __init__(self, domain: libvirt.virDomain, host: str) -> None:
        self._domain = domain
        self._host = host

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._domain, name)
        return partial(self.ask, attribute) if name in ANSWERED_BY_QEMU else attribute

    def ask(self, call: Callable[..., Any], *arguments: Any, within: float = ANSWER_SECONDS) -> Any:
        """Make the call in a thread that may be left behind: it ends with QEMU, or with its connection."""
        outcome: queue.SimpleQueue[Answer] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((call(*arguments), None))
            except Exception as error:  # noqa: BLE001 - handed over to the thread that waits
                outcome.put((None, error))

        threading.Thread(target=run, name=f"ask {self._domain.name()}", daemon=True).start()
        answer, error = self._await(outcome, within)
        if error is not None:
            raise error
        return answer

    def _await(self, outcome: queue.SimpleQueue[Answer], within: float) -> Answer:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            try:
                return outcome.get(timeout=HEED_SECONDS)
            except queue.Empty:
                check_watcher()
        raise GuestHung(f"QEMU of {self._domain.name()} on host {self._host} did not answer within {within:.0f} s")


def asked(domain: libvirt.virDomain, call: Callable[..., Any], *arguments: Any, within: float = ANSWER_SECONDS) -> Any:
    """What a function answers that takes a `bounded` domain, such as those of libvirt_qemu. Raises GuestHung.

    For calls on what belongs to a domain, too: `asked(domain, lambda domain: domain.checkpointLookupByName(...)...)`.
    """
    return cast("_Bounded", domain).ask(call, domain, *arguments, within=within)


def bounded(domain: libvirt.virDomain, host: str) -> libvirt.virDomain:
    """The domain, with its calls to QEMU bounded."""
    return cast("libvirt.virDomain", _Bounded(domain, host))
