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

from tests.chaos.site import HOSTS, Site
from tests.lab import LabError, wait_until
from tests.lab.fleet import KINDS, WorkerKind
from tests.lab.process import Process, kill9, running
from worker.app import SHARED_QUEUE, host_queue
from worker.models import PowerState

QUEUES = {SHARED_QUEUE, *(host_queue(host, kind) for host in HOSTS for kind in KINDS)}


@dataclass(frozen=True)
class Target:
    """What a fault strikes: an operation, the host whose worker executes a step of it now, and all hosts that it is
    about."""

    operation: str
    host: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """One fault.

    With `harmless` the operation must succeed all the same. `early`: it begins before the operation. `may_leave` are
    states of the guest that it explains. `needs` names the queue of the steps that it can hit; empty for all.
    `limit`: seconds within which the operation shall have ended, beyond what it takes undisturbed; with `by_lease`,
    one and a half times its lease's time to live. `between_hosts`: it means nothing to operations on one host.
    """

    name: str
    strike: Callable[[Site, Target], None]
    harmless: bool = True
    early: bool = False
    may_leave: frozenset[PowerState] = frozenset()
    needs: str = ""
    as_root: bool = False
    limit: float | None = None
    by_lease: bool = False
    between_hosts: bool = False


def kill_control(site: Site, target: Target) -> None:
    _kill_workers(site, site.workers[target.host, "control"])


def kill_disk(site: Site, target: Target) -> None:
    _kill_workers(site, site.workers[target.host, "disk"])


def _kill_workers(site: Site, *workers: Process) -> None:
    for worker in workers:
        if not worker.alive:
            raise LabError(f"there is no {' '.join(worker.argv)} to kill")
    pids = [pid for worker in workers for pid in (worker.pid, *worker.children())]
    site.supervisor.expect(*pids)
    for worker in workers:
        worker.kill9()
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid), 5, f"pool child {pid} ends with its worker")  # type: ignore[misc]
    site.supervisor.died(*pids)


def stop_control(site: Site, target: Target) -> None:
    _stop_worker(site, target.host, "control")


def stop_disk(site: Site, target: Target) -> None:
    _stop_worker(site, target.host, "disk")


def _stop_worker(site: Site, host: str, kind: WorkerKind) -> None:
    """As an upgrade: the worker may end its steps or hand them over, and a new one starts."""
    worker = site.workers[host, kind]
    pids = [worker.pid, *worker.children()]
    site.supervisor.expect(*pids)
    worker.kill(signal.SIGTERM)
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid), 30, f"process {pid} of the {kind} worker of {host} ends")  # type: ignore[misc]
    site.supervisor.died(*pids)


def kill_pool_child(site: Site, target: Target) -> None:
    for pid in site.workers[target.host, "disk"].children():
        site.supervisor.expect(pid)
        kill9(pid)
        site.supervisor.died(pid)


def kill_libvirtd(site: Site, target: Target) -> None:
    site.hosts[target.host].libvirtd_kill9()
    time.sleep(0.5)
    site.hosts[target.host].libvirtd_start()


def freeze_libvirtd(site: Site, target: Target) -> None:
    with site.hosts[target.host].libvirtd_frozen():
        time.sleep(site.freeze_seconds)


def kill_redis(site: Site, target: Target) -> None:
    site.fleet.redis.kill9()
    time.sleep(1)
    site.fleet.redis.start()


def redis_away(site: Site, target: Target) -> None:
    """For so long that every lease runs out."""
    site.fleet.redis.kill9()
    time.sleep(2 * site.lease_ttl)
    site.fleet.redis.start()


def freeze_redis(site: Site, target: Target) -> None:
    """For so long that every lease runs out: whoever is heard first afterwards must not take it for dead."""
    with site.fleet.redis.paused():
        time.sleep(1.5 * site.lease_ttl)


def freeze_control(site: Site, target: Target) -> None:
    _freeze_worker(site, site.workers[target.host, "control"])


def freeze_disk(site: Site, target: Target) -> None:
    _freeze_worker(site, site.workers[target.host, "disk"])


def _freeze_worker(site: Site, worker: Process) -> None:
    """As a machine that swaps: it comes back when its lease has run out, and must not go on."""
    pids = [worker.pid, *worker.children()]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * site.lease_ttl)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def flush_redis(site: Site, target: Target) -> None:
    site.fleet.redis.flushall()


def flush_and_kill(site: Site, target: Target) -> None:
    """Nobody who remembers the operation is left: only the hosts' copies of its record can bring it back."""
    _kill_workers(site, *(site.workers[host, kind] for host in target.hosts for kind in KINDS))
    site.fleet.redis.flushall()


def flush_and_kill_one(site: Site, target: Target) -> None:
    """Whoever knows best what was done is away for a moment, while the other host still has an older copy."""
    _kill_workers(site, *(site.workers[target.host, kind] for kind in KINDS))
    site.fleet.redis.flushall()


def cut_cables(site: Site, target: Target) -> None:
    """Between the hosts nothing comes through for a while; Redis and libvirt are not reached by these cables."""
    cables = [cable for host in target.hosts if (cable := site.hosts[host].cable)]
    for cable in cables:
        cable.cut()
    time.sleep(site.freeze_seconds)
    for cable in cables:
        cable.plug()


def drop_connections(site: Site, target: Target) -> None:
    with site.fleet.redis.client() as client:
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


def deliver_twice(site: Site, target: Target) -> None:
    """Until the end of the round, every message comes again: at once, and a while later."""
    repeater = Repeater(site.fleet.redis.client(timeout=60), site.fleet.redis.client())
    repeater.start()
    site.relief.callback(repeater.stop)
    wait_until(repeater.listening.is_set, 5, "Redis tells which messages are sent")


def fill_disk(site: Site, target: Target) -> None:
    """Until the end of the round, the data directory has not one block left."""
    filler = site.hosts[target.host].data / ".filler"
    site.relief.callback(filler.unlink, missing_ok=True)
    with filler.open("wb") as file:
        for size in (1024**2, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.tell(), size)
                    file.seek(size, os.SEEK_CUR)


def kill_guest(site: Site, target: Target) -> None:
    """SIGKILL the QEMU of the operation's guest; of a new one, as soon as there is one."""
    with suppress(LabError):  # a guest that is off, or will never be on, has none
        kill9(_await_qemu(site, target))


def freeze_guest(site: Site, target: Target) -> None:
    """QEMU answers nobody for a while, as on a host whose storage hangs."""
    with suppress(LabError, ProcessLookupError):
        pid = _await_qemu(site, target)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(site.freeze_seconds)
        os.kill(pid, signal.SIGCONT)


def _await_qemu(site: Site, target: Target) -> int:
    """The QEMU of the operation's guest, wherever it runs."""
    name = site.client.journal.read(target.operation).instance

    def found() -> int | None:
        return next((pid for host in site.hosts.values() if (pid := host.find_qemu(name))), None)

    pid = wait_until(found, 3, f"QEMU of {name} runs")
    assert pid
    return pid


def cancel(site: Site, target: Target) -> None:
    site.client.cancel(target.operation)


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
    Fault("FLUSHALL, SIGKILL one host", flush_and_kill_one, between_hosts=True),
    Fault("cables cut", cut_cables, between_hosts=True),
    Fault("connections dropped", drop_connections),
    Fault("messages doubled", deliver_twice, early=True),
    Fault("disk full", fill_disk, as_root=True),
    Fault("SIGKILL QEMU", kill_guest, harmless=False, may_leave=OFF),
    Fault("SIGSTOP QEMU", freeze_guest, harmless=False),
    Fault("cancel", cancel, harmless=False, limit=2.0),
)

BY_NAME = {fault.name: fault for fault in FAULTS}
