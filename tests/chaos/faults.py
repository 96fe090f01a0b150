"""What can go wrong, one function per fault. Each returns when the worst is over; what it leaves to be taken back at
the end of the round it puts on `site.relief`."""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import redis

from tests.chaos.site import HOST, Site
from tests.lab import LabError, wait_until
from tests.lab.fleet import WorkerKind
from tests.lab.process import kill9, running
from worker.app import SHARED_QUEUE, host_queue
from worker.models import PowerState

QUEUES = {SHARED_QUEUE, host_queue(HOST, "control"), host_queue(HOST, "disk")}


@dataclass(frozen=True)
class Fault:
    """One fault.

    With `harmless` the operation must succeed all the same. `early`: it begins before the operation. `may_leave` are
    states of the guest that it explains. `needs` names the queue of the steps that it can hit; empty for all.
    `limit`: seconds within which the operation shall have ended, beyond what it takes undisturbed; with `by_lease`,
    one and a half times its lease's time to live.
    """

    name: str
    strike: Callable[[Site, str], None]
    harmless: bool = True
    early: bool = False
    may_leave: frozenset[PowerState] = frozenset()
    needs: str = ""
    as_root: bool = False
    limit: float | None = None
    by_lease: bool = False


def kill_control(site: Site, operation: str) -> None:
    _kill_worker(site, "control")


def kill_disk(site: Site, operation: str) -> None:
    _kill_worker(site, "disk")


def _kill_worker(site: Site, kind: WorkerKind) -> None:
    worker = site.workers[kind]
    if not worker.alive:
        raise LabError(f"there is no {kind} worker to kill")
    pids = [worker.pid, *worker.children()]
    site.supervisor.expect(*pids)
    worker.kill9()
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid), 5, f"pool child {pid} ends with its worker")  # type: ignore[misc]
    site.supervisor.died(*pids)


def stop_control(site: Site, operation: str) -> None:
    _stop_worker(site, "control")


def stop_disk(site: Site, operation: str) -> None:
    _stop_worker(site, "disk")


def _stop_worker(site: Site, kind: WorkerKind) -> None:
    """As an upgrade: the worker may end its steps or hand them over, and a new one starts."""
    worker = site.workers[kind]
    pids = [worker.pid, *worker.children()]
    site.supervisor.expect(*pids)
    worker.kill(signal.SIGTERM)
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid), 30, f"process {pid} of the {kind} worker ends")  # type: ignore[misc]
    site.supervisor.died(*pids)


def kill_pool_child(site: Site, operation: str) -> None:
    for pid in site.workers["disk"].children():
        kill9(pid)
        site.supervisor.died(pid)


def kill_libvirtd(site: Site, operation: str) -> None:
    site.host.libvirtd_kill9()
    time.sleep(0.5)
    site.host.libvirtd_start()


def freeze_libvirtd(site: Site, operation: str) -> None:
    with site.host.libvirtd_frozen():
        time.sleep(site.freeze_seconds)


def kill_redis(site: Site, operation: str) -> None:
    site.fleet.redis.kill9()
    time.sleep(1)
    site.fleet.redis.start()


def redis_away(site: Site, operation: str) -> None:
    """For so long that every lease runs out."""
    site.fleet.redis.kill9()
    time.sleep(2 * site.lease_ttl)
    site.fleet.redis.start()


def freeze_redis(site: Site, operation: str) -> None:
    """For so long that every lease runs out: whoever is heard first afterwards must not take it for dead."""
    with site.fleet.redis.paused():
        time.sleep(1.5 * site.lease_ttl)


def freeze_control(site: Site, operation: str) -> None:
    _freeze_worker(site, "control")


def freeze_disk(site: Site, operation: str) -> None:
    _freeze_worker(site, "disk")


def _freeze_worker(site: Site, kind: WorkerKind) -> None:
    """As a machine that swaps: it comes back when its lease has run out, and must not go on."""
    pids = [site.workers[kind].pid, *site.workers[kind].children()]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * site.lease_ttl)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def flush_redis(site: Site, operation: str) -> None:
    site.fleet.redis.flushall()


def flush_and_kill(site: Site, operation: str) -> None:
    """Nobody who remembers the operation is left: only the host's copy of its record can bring it back."""
    _kill_worker(site, "disk")
    _kill_worker(site, "control")
    site.fleet.redis.flushall()


def drop_connections(site: Site, operation: str) -> None:
    with site.fleet.redis.client() as client:
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


def deliver_twice(site: Site, operation: str) -> None:
    """Until the end of the round, every message comes again: at once, and a while later."""
    repeater = Repeater(site.fleet.redis.client(timeout=60), site.fleet.redis.client())
    repeater.start()
    site.relief.callback(repeater.stop)
    wait_until(repeater.listening.is_set, 5, "Redis tells which messages are sent")


def fill_disk(site: Site, operation: str) -> None:
    """Until the end of the round, the data directory has not one block left."""
    filler = site.host.data / ".filler"
    site.relief.callback(filler.unlink, missing_ok=True)
    with filler.open("wb") as file:
        for size in (1024**2, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.tell(), size)
                    file.seek(size, os.SEEK_CUR)


def kill_guest(site: Site, operation: str) -> None:
    """SIGKILL the QEMU of the operation's guest; of a new one, as soon as there is one."""
    name = site.client.journal.read(operation).instance
    with suppress(LabError):  # a guest that is off, or will never be on, has none
        wait_until(lambda: _qemu(site, name), 3, f"QEMU of {name} runs")
        site.host.kill_guest(name)


def freeze_guest(site: Site, operation: str) -> None:
    """QEMU answers nobody for a while, as on a host whose storage hangs."""
    name = site.client.journal.read(operation).instance
    with suppress(LabError, ProcessLookupError):
        pid = wait_until(lambda: _qemu(site, name), 3, f"QEMU of {name} runs")
        assert pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(site.freeze_seconds)
        os.kill(pid, signal.SIGCONT)


def _qemu(site: Site, name: str) -> int | None:
    with suppress(LabError):
        return site.host.qemu_pid(name)
    return None


def cancel(site: Site, operation: str) -> None:
    site.client.cancel(operation)


class Repeater(threading.Thread):
    """Sees by MONITOR what is pushed to the workers' queues, and pushes each message once more after each delay."""

    DELAYS = (0.0, 0.7)

    def __init__(self, eyes: redis.Redis, hands: redis.Redis) -> None:
        super().__init__(name="repeater", daemon=True)
        self.listening = threading.Event()
        self.repeated = 0
        self._eyes, self._hands = eyes, hands
        self._seen: set[str] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        with suppress(redis.RedisError, ValueError, OSError), self._eyes.monitor() as monitor:  # type: ignore[no-untyped-call]
            self.listening.set()
            while not self._ended.is_set():
                # redis-py's own parser does not undo MONITOR's escapes.
                self._look_at(monitor.connection.read_response(disable_decoding=True))

    def stop(self) -> None:
        self._ended.set()
        with suppress(redis.RedisError):
            self._hands.ping()  # wakes the monitor
        self.join(5)
        self._eyes.close()

    def _look_at(self, line: bytes) -> None:
        words = [_unescaped(word) for word in re.findall(rb'"((?:[^"\\]|\\.)*)"', line)]
        if len(words) != 3 or words[0].upper() != b"LPUSH" or words[1].decode() not in QUEUES:
            return
        message = json.loads(words[2])
        task = message["headers"]["id"] + message["properties"]["delivery_tag"]
        if task not in self._seen:
            self._seen.add(task)
            for delay in self.DELAYS:
                threading.Timer(delay, self._push, words[1:]).start()

    def _push(self, queue: bytes, message: bytes) -> None:
        with suppress(redis.RedisError):
            self._hands.lpush(queue, message)
            self.repeated += 1


def _unescaped(word: bytes) -> bytes:
    text, _ = codecs.escape_decode(word)
    return bytes(text)


OFF = frozenset({PowerState.OFF, PowerState.CRASHED})

FAULTS = (
    Fault("SIGKILL control worker", kill_control, by_lease=True),
    Fault("SIGKILL disk worker", kill_disk, needs="disk", by_lease=True),
    Fault("SIGTERM control worker", stop_control),
    Fault("SIGTERM disk worker", stop_disk, needs="disk"),
    Fault("SIGKILL pool child", kill_pool_child, needs="disk", by_lease=True),
    Fault("SIGKILL libvirtd", kill_libvirtd),
    Fault("SIGSTOP libvirtd", freeze_libvirtd),
    Fault("SIGKILL Redis", kill_redis),
    Fault("Redis away for long", redis_away),
    Fault("SIGSTOP Redis", freeze_redis),
    Fault("SIGSTOP control worker", freeze_control),
    Fault("SIGSTOP disk worker", freeze_disk, needs="disk"),
    Fault("FLUSHALL", flush_redis),
    Fault("FLUSHALL, SIGKILL both", flush_and_kill),
    Fault("connections dropped", drop_connections),
    Fault("messages doubled", deliver_twice, early=True),
    Fault("disk full", fill_disk, as_root=True),
    Fault("SIGKILL QEMU", kill_guest, harmless=False, may_leave=OFF),
    Fault("SIGSTOP QEMU", freeze_guest, harmless=False),
    Fault("cancel", cancel, harmless=False, limit=2.0),
)

BY_NAME = {fault.name: fault for fault in FAULTS}
