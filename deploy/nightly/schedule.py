"""Nightly incremental snapshots: an example of a scheduler, which knows of the fleet only Redis and names.

Full on Sundays, what changed in the other nights. Redbeat keeps the schedule in Redis behind a lock, so that beat may
run on several machines and each snapshot is asked for once.

    VIRTFLEET_NIGHTLY="web1 db1" VIRTFLEET_REDIS_URL=redis://... celery --app schedule beat
"""

from __future__ import annotations

import os

from celery import Celery
from celery.schedules import crontab

HOUR = int(os.environ.get("VIRTFLEET_NIGHTLY_HOUR", "2"))
INSTANCES = os.environ.get("VIRTFLEET_NIGHTLY", "").split()

WEEKLY = crontab(hour=str(HOUR), minute="0", day_of_week="sunday")
DAILY = crontab(hour=str(HOUR), minute="0", day_of_week="mon-sat")

app = Celery("nightly", broker=os.environ.get("VIRTFLEET_REDIS_URL", "redis://127.0.0.1:6379/0"))
app.conf.update(
    beat_scheduler="redbeat.RedBeatScheduler",
    redbeat_key_prefix="virtfleet-nightly:",
    timezone="UTC",
)


def entry(instance: str, schedule: crontab, *, full: bool) -> dict[str, object]:
    """One snapshot of one instance; it waits its turn when another operation owns the instance."""
    wanted = {"instance": instance, "incremental": True, "full": full, "quiesce": "auto", "wait_if_busy": True}
    return {
        "task": "virtfleet.snapshot",
        "schedule": schedule,
        "kwargs": wanted,
        # Nobody reads the answer; one asked for while the fleet is down must not be taken hours later, by day.
        "options": {"queue": "virtfleet", "ignore_result": True, "expires": 3600},
    }


app.conf.beat_schedule = {
    **{f"weekly-{instance}": entry(instance, WEEKLY, full=True) for instance in INSTANCES},
    **{f"nightly-{instance}": entry(instance, DAILY, full=False) for instance in INSTANCES},
}
