"""Events for Flower: shown when Redis answers, and never waited for when it does not."""

from __future__ import annotations

from typing import Any

from worker.app import app
from worker.engine.connection import translated

# Celery's own dispatcher waits 6 s for a broker that is away (kombu's default_channel, measured), in the midst of a
# copy and at each of its reports. A connection of its own costs a few milliseconds every 5 s.
BRIEFLY = {"max_retries": 0, "socket_connect_timeout": 1, "socket_timeout": 1}


def tell(worker: str, event: str, task_id: str, **fields: Any) -> None:
    """Send one event of a task, as that worker. Raises `BrokerUnavailable` within about 1 s."""
    with (
        translated(),
        app.connection_for_write(transport_options=BRIEFLY) as connection,
        app.events.Dispatcher(connection, hostname=worker) as dispatcher,
    ):
        dispatcher.send(event, uuid=task_id, retry=False, **fields)
