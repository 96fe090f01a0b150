"""What Prometheus may ask of the fleet: read from Redis at each scrape, so any control worker can answer for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import cast

import structlog
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from worker.app import SHARED_QUEUE, host_queue
from worker.engine import keys
from worker.engine.connection import shared, translated
from worker.engine.journal import Journal
from worker.engine.registry import Registry
from worker.errors import BrokerUnavailable
from worker.settings import get_settings

log = structlog.get_logger(__name__)

UNFINISHED_SHOWN = 10_000
"""Unfinished operations that one scrape counts at the most."""


class FleetCollector(Collector):
    """Operations, steps, queues and hosts as metrics; only `virtfleet_up` when Redis is away."""

    def collect(self) -> Iterator[Metric]:
        """Everything, as of now."""
        try:
            found = [*self._operations(), *self._steps(), *self._queues(), *self._hosts()]
        except BrokerUnavailable as error:
            log.warning("no metrics: Redis is away", error=str(error))
            found = []
        yield GaugeMetricFamily("virtfleet_up", "Whether Redis answered.", value=float(bool(found)))
        yield from found

    def _operations(self) -> Iterator[Metric]:
        book = Journal(shared())
        records = book.unfinished(UNFINISHED_SHOWN)
        states = GaugeMetricFamily("virtfleet_operations_unfinished", "Operations by state.", labels=["state"])
        for state, number in Counter(record.state.value for record in records).items():
            states.add_metric([state], number)
        yield states
        oldest = max((book.now() - record.submitted_at for record in records), default=0.0)
        yield GaugeMetricFamily("virtfleet_oldest_unfinished_seconds", "Age of the oldest one.", value=oldest)
        yield GaugeMetricFamily(
            "virtfleet_operations_stuck", "Operations that could not be undone.", value=book.count_stuck()
        )

    def _steps(self) -> Iterator[Metric]:
        with translated():
            counted = cast("dict[str, str]", shared().hgetall(keys.COUNTERS))
        ended = CounterMetricFamily("virtfleet_steps", "Attempts of steps that ended.", labels=["step", "outcome"])
        reaped = CounterMetricFamily("virtfleet_reaper", "What the reaper had to do.", labels=["did"])
        for name, number in sorted(counted.items()):
            group, _, rest = name.partition(":")
            if group == "step":
                ended.add_metric(rest.split(":", 1), float(number))
            elif group == "reaper":
                reaped.add_metric([rest], float(number))
        yield from (ended, reaped)

    def _queues(self) -> Iterator[Metric]:
        hosts = [host.name for host in Registry(shared()).hosts()]
        queues = [SHARED_QUEUE, *(host_queue(host, kind) for host in hosts for kind in ("control", "disk"))]
        with translated():
            pipe = shared().pipeline(transaction=False)
            for queue in queues:
                pipe.llen(queue)
            lengths = pipe.execute()
        waiting = GaugeMetricFamily("virtfleet_queue_messages", "Messages that wait.", labels=["queue"])
        for queue, length in zip(queues, lengths, strict=True):
            waiting.add_metric([queue], length)
        yield waiting

    def _hosts(self) -> Iterator[Metric]:
        fleet = Registry(shared())
        alive = GaugeMetricFamily("virtfleet_worker_alive", "Whether a worker answers.", labels=["host", "worker"])
        for host in fleet.hosts():
            present = fleet.alive(host.name)
            for kind in ("control", "disk"):
                alive.add_metric([host.name, kind], float(kind in present))
        yield alive


def serve_metrics() -> None:
    """Answer Prometheus on the port of the settings, if there is one."""
    settings = get_settings()
    if settings.metrics_port is None:
        return
    registry = CollectorRegistry()
    registry.register(FleetCollector())
    start_http_server(settings.metrics_port, settings.metrics_address, registry=registry)
    log.info("serving metrics", address=settings.metrics_address, port=settings.metrics_port)
