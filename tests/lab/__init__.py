"""The lab of the tests and the demo: real Redis servers, KVM hosts and workers, isolated and disposable."""

from __future__ import annotations

from tests.lab.fleet import Fleet
from tests.lab.guest import guest_image
from tests.lab.host import LabHost
from tests.lab.process import Keeper, LabError, Process, free_port, lab_folder, wait_until
from tests.lab.redis import Redis

__all__ = [
    "Fleet",
    "Keeper",
    "LabError",
    "LabHost",
    "Process",
    "Redis",
    "free_port",
    "guest_image",
    "lab_folder",
    "wait_until",
]
