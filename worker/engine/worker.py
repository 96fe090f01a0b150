"""Running a Celery worker of one host, with its heartbeat and, in control workers, the reaper."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from celery.exceptions import SecurityWarning
from celery.signals import worker_ready, worker_shutting_down

from worker.app import SHARED_QUEUE, app, host_queue
from worker.engine import (
    intervention,  # noqa: F401 - makes its task, cancelling by name, known to every worker
    mended,
)
from worker.engine.journal import journal
from worker.engine.metrics import serve_metrics
from worker.engine.mirror import MirrorWatch
from worker.engine.patience import patiently
from worker.engine.reaper import Reaper
from worker.engine.registry import WorkerKind, registry
from worker.engine.succession import take_place
from worker.errors import BrokerUnavailable, FleetError
from worker.settings import get_settings

log = structlog.get_logger(__name__)


class Heartbeat(threading.Thread):
    """Says at regular intervals that this worker is alive, and has it introduce a host that Redis does not know."""

    def __init__(self, hosts: Sequence[str], kind: WorkerKind, introduce: Callable[[str], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.hosts = hosts
        self.kind = kind
        self._introduce = introduce
        self._introduced: dict[str, float] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Beat until stopped; a Redis that is away is met again at the next beat."""
        since = time.time()
        while True:
            try:
                for host in self.hosts:
                    self._beat(host, since)
            except BrokerUnavailable as error:
                log.warning("no heartbeat: Redis is away", error=str(error))
            except Exception:
                log.exception("a heartbeat failed")
            if self._ended.wait(get_settings().heartbeat_interval):
                return

    def _beat(self, host: str, since: float) -> None:
        registry().heartbeat(host, self.kind, {"pid": os.getpid(), "since": since})
        age = time.monotonic() - self._introduced.get(host, -math.inf)
        again = self.kind == "control" and (age > get_settings().survey_interval or not registry().knows(host))
        if again or host not in self._introduced:
            self._introduced[host] = time.monotonic()
            threading.Thread(target=self._look, args=[host], name=f"introduce {host}", daemon=True).start()

    def _look(self, host: str) -> None:
        try:
            self._introduce(host)
        except FleetError as error:
            log.warning("cannot look at the host; tried again at the next heartbeat", host=host, error=str(error))
            self._introduced.pop(host, None)

    def stop(self) -> None:
        """Say farewell, so that nobody waits for this worker."""
        self._ended.set()
        try:
            for host in self.hosts:
                registry().farewell(host, self.kind)
        except BrokerUnavailable as error:
            log.warning("no farewell: Redis is away", error=str(error))


def run_worker(kind: WorkerKind, hosts: Sequence[str], *, introduce: Callable[[str], None], loglevel: str) -> None:
    """Serve the queues of these hosts until told to stop. `introduce` tells the fleet of a host, beside the work."""
    name = f"{kind}@{hosts[0]}"
    beside: list[Heartbeat | Reaper | MirrorWatch]
    if kind == "control":
        watch = MirrorWatch()

        def settled(host: str) -> None:
            watch.settle()
            introduce(host)

        beside = [Heartbeat(hosts, kind, settled), Reaper(f"{name}:{os.getpid()}"), watch]
    else:
        # A control worker may serve a host from afar: the copies lie where the disk worker is.
        beside = [Heartbeat(hosts, kind, introduce), MirrorWatch()]

    def ready(**_: Any) -> None:
        for companion in beside:
            companion.start()
        if kind == "control":
            serve_metrics()

    def stopping(**_: Any) -> None:
        # In a thread: this runs within a signal handler, wherever the main thread happens to be.
        threading.Thread(target=_step_back, args=[name, beside], name="stopping", daemon=True).start()

    _stay(name)
    mended.end_soon()
    mended.outlive_redis()
    take_place(name)

    # libvirtd and the guests' disks are root's; messages are JSON only, so the danger it warns of is not there.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    worker_ready.connect(ready, weak=False)
    worker_shutting_down.connect(stopping, weak=False)
    app.worker_main(_arguments(kind, hosts, name, loglevel))


def _stay(name: str) -> None:
    """Steps may stay again, which a predecessor of that name was told to hand over; Redis may come up later than we."""
    threading.Thread(target=patiently, args=[journal().leave_from, name, None], name="stay", daemon=True).start()


def _step_back(name: str, beside: Sequence[Heartbeat | Reaper | MirrorWatch]) -> None:
    """Let running steps end, or hand over once the grace is over; Celery waits for them."""
    for companion in beside:
        companion.stop()
    patiently(journal().leave_from, name, get_settings().stop_grace)


def _arguments(kind: WorkerKind, hosts: Sequence[str], name: str, loglevel: str) -> list[str]:
    settings = get_settings()
    queues = [host_queue(host, kind) for host in hosts]
    if kind == "control":
        # Short calls that wait in libvirt, which releases the GIL: threads. Copies need processes to be killed with.
        pool, slots, queues = "threads", settings.control_slots, [*queues, SHARED_QUEUE]
    else:
        pool, slots = "prefork", settings.disk_slots
    return [
        "worker",
        f"--hostname={name}",
        f"--pool={pool}",
        f"--concurrency={slots}",
        f"--queues={','.join(queues)}",
        f"--loglevel={loglevel}",
        # Workers tell each other nothing: what is cancelled is in the journal. Mingling would delay each start by 1 s.
        "--without-gossip",
        "--without-mingle",
    ]


def run_flower(address: str, port: int, basic_auth: str) -> None:
    """Serve Flower until told to stop. Its tasks are kept in memory; the journal in Redis keeps the history."""
    columns = "name,state,kwargs,result,started,runtime,worker"
    arguments = [f"--address={address}", f"--port={port}", f"--tasks-columns={columns}", "--max-tasks=20000"]
    if basic_auth:
        arguments.append(f"--basic-auth={basic_auth}")
    app.start(["flower", *arguments])
