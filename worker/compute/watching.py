"""Watching over a host's guests beside the work: a thread of each control worker, for as long as that lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import structlog

from worker.compute.local import LocalHost
from worker.errors import FleetError

log = structlog.get_logger(__name__)

LOOK_EVERY = 1.0  # seconds; a look is a directory listing


class HostWatch(threading.Thread):
    """Looks at each host again and again; whatever a look meets, there is a next one."""

    def __init__(self, name: str, hosts: Sequence[LocalHost]) -> None:
        super().__init__(name=name, daemon=True)
        self._hosts = hosts

    def look(self, host: LocalHost) -> None:
        """See to what there is to do on a host. Raises `FleetError`, `OSError`: it is tried again."""
        raise NotImplementedError

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            for host in self._hosts:
                try:
                    self.look(host)
                except (FleetError, OSError) as error:
                    log.warning("tried again in a moment", watch=self.name, host=host.name, error=str(error))
                except Exception:
                    log.exception("a look failed", watch=self.name, host=host.name)
            time.sleep(LOOK_EVERY)
