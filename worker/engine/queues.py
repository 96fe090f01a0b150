"""The queues of the hosts: whether messages wait there, and whether a worker is up that takes them."""

from __future__ import annotations

from worker.app import host_queue
from worker.engine.connection import Redis, translated
from worker.engine.decide import Traffic
from worker.engine.record import StepPlan
from worker.engine.registry import Registry


class QueueLook:
    """How it stands in each queue, looked up when it is first asked for, and not again."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._seen: dict[str, Traffic] = {}

    def __call__(self, plan: StepPlan) -> Traffic:
        """How it stands in the queue of that step."""
        queue = host_queue(plan.host, plan.queue)
        if queue not in self._seen:
            self._seen[queue] = self._look(queue, plan)
        return self._seen[queue]

    def _look(self, queue: str, plan: StepPlan) -> Traffic:
        with translated():
            if not self._redis.llen(queue):
                return Traffic.NONE
        return Traffic.FLOWS if plan.queue in Registry(self._redis).alive(plan.host) else Traffic.STANDS
