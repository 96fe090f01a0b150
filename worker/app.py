"""The Celery application: how work travels. Celery carries messages; what runs is decided by the journal.

The configuration follows measurements of Celery 5.7 on Redis: early acknowledgement and no prefetch, because a late
one runs long tasks twice and makes the worker exit when Redis restarts; no message with an ETA, for the same reason.
"""

from __future__ import annotations

from celery import Celery

from worker.settings import get_settings

SHARED_QUEUE = "virtfleet"
"""Where operations arrive by name; every control worker serves it."""


def host_queue(host: str, kind: str) -> str:
    """The queue of one host's `control` (short calls) or `disk` (copies, converts, snapshots) worker."""
    return f"host.{host}.{kind}"


app = Celery("virtfleet", broker=get_settings().redis_url, backend=get_settings().redis_url, include=["tasks"])
app.conf.update(
    task_default_queue=SHARED_QUEUE,
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    result_expires=86400,
    task_acks_late=False,
    worker_disable_prefetch=True,
    worker_prefetch_multiplier=1,
    task_track_started=True,
    worker_send_task_events=True,
    task_send_sent_event=True,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # What does not get through is published by the reaper: waiting longer here would only hold the step up.
    task_publish_retry_policy={
        "max_retries": 2,
        "interval_start": 0,
        "interval_step": 0.2,
        "interval_max": 0.5,
    },
    broker_transport_options={
        "visibility_timeout": 3600,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    },
    result_backend_transport_options={"retry_policy": {"max_retries": 3}},
    redis_socket_connect_timeout=5,
    redis_socket_keepalive=True,
)
