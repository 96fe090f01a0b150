"""Connections to libvirtd that always end: opening is bounded, and a peer that falls silent is noticed.

`virConnectOpen` has no timeout and no signal interrupts it; a call on an open connection is bounded only by
keepalive, which needs libvirt's event loop to run in this process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import libvirt
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from worker.context import check_watcher
from worker.errors import HostUnreachable
from worker.virt.faults import translated

OPEN_ATTEMPTS = 4
# A silent libvirtd is given up after interval * (count + 1) seconds: longer than any pause of a loaded host.
KEEPALIVE_SECONDS = 5
KEEPALIVE_COUNT = 2

HEED_SECONDS = 0.5
"""How often one who waits for a connection looks whether it is still wanted."""

_lock = threading.Lock()
_prepared: set[int] = set()  # pids: threads do not survive a fork
_kept: dict[tuple[int, str], libvirt.virConnect] = {}  # never shared with a forked child, hence the pid


@contextmanager
def connected(uri: str, *, name: str, timeout: float) -> Iterator[libvirt.virConnect]:
    """A connection to `uri`, open within `timeout` seconds, for the length of a `with`.

    ssh connections take some 0.4 s to open and are kept for the life of the process; all others are closed.
    Raises HostUnreachable or ConnectionMisconfigured. `name` is the host's name, for messages.
    """
    connection = _open_with_retries(uri, name, timeout)
    try:
        yield connection
    finally:
        if not _is_ssh(uri):
            # The work is done or has raised: that a broken connection cannot be closed says nothing more.
            with suppress(libvirt.libvirtError):
                connection.close()


def _open_with_retries(uri: str, name: str, timeout: float) -> libvirt.virConnect:
    _prepare_process()
    deadline = time.monotonic() + timeout
    attempts = Retrying(
        retry=retry_if_exception_type(HostUnreachable),
        stop=stop_after_attempt(OPEN_ATTEMPTS) | stop_before_delay(timeout),
        wait=wait_random_exponential(multiplier=0.2, max=1.0),
        reraise=True,
    )
    return attempts(lambda: _Opening(uri, name).result(deadline))


class _Opening:
    """One attempt to open, in a thread that may be abandoned."""

    def __init__(self, uri: str, name: str) -> None:
        self._uri, self._name = uri, name
        self._lock = threading.Lock()
        self._abandoned = False
        self._connection: libvirt.virConnect | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"open {uri}", daemon=True)

    def result(self, deadline: float) -> libvirt.virConnect:
        """The connection; raises HostUnreachable when `deadline` (monotonic seconds) passes first.

        A step that is cancelled waits no longer.
        """
        began = time.monotonic()
        self._thread.start()
        try:
            while self._thread.is_alive() and time.monotonic() < deadline:
                check_watcher()
                self._thread.join(min(HEED_SECONDS, max(0.0, deadline - time.monotonic())))
        finally:
            with self._lock:
                self._abandoned = self._connection is None
        if self._connection is not None:
            return self._connection
        if self._error is not None:
            raise self._error
        waited = time.monotonic() - began
        raise HostUnreachable(
            f"cannot connect to {self._uri} on host {self._name}: no answer within {waited:.1f} s",
            host=self._name,
            uri=self._uri,
        )

    def _run(self) -> None:
        try:
            with translated(f"connect to {self._uri}", self._name):
                connection = _open(self._uri)
        except Exception as error:  # noqa: BLE001 - handed over to the thread that waits
            with self._lock:
                self._error = error
            return
        with self._lock:
            self._connection = None if self._abandoned else connection
        if self._abandoned and not _is_ssh(self._uri):
            with suppress(libvirt.libvirtError):
                connection.close()


def _open(uri: str) -> libvirt.virConnect:
    if not _is_ssh(uri):
        return _open_new(uri)
    key = os.getpid(), uri
    with _lock:
        kept = _kept.get(key)
    if kept is not None and _answers(kept):
        return kept
    connection = _open_new(uri)
    with _lock:
        _kept[key] = connection
    return connection


def _open_new(uri: str) -> libvirt.virConnect:
    connection = libvirt.open(uri)
    if urlsplit(uri).scheme != "test":  # a driver that lives in this process: it has no peer to lose
        connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
    return connection


def _answers(connection: libvirt.virConnect) -> bool:
    # isAlive() goes on saying yes after libvirtd was restarted: only a call tells.
    try:
        connection.getLibVersion()
    except libvirt.libvirtError:
        return False
    return True


def _is_ssh(uri: str) -> bool:
    return urlsplit(uri).scheme.rpartition("+")[2] in {"ssh", "libssh", "libssh2"}


def _prepare_process() -> None:
    """Run libvirt's event loop and silence its printing to stderr; once per process, also after a fork."""
    with _lock:
        if os.getpid() in _prepared:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt events", daemon=True).start()
        _prepared.add(os.getpid())


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def version_of(number: int) -> tuple[int, int, int]:
    """A version as libvirt puts it: (9, 0, 0) for 9000000."""
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000
