"""`virtfleet resize`."""

from __future__ import annotations

from tasks.resize import ResizeRequest
from worker.cli.options import Call, Instance, NewSizes, Shutdown, grouped


@grouped
def resize(instance: Instance, sizes: NewSizes, shutdown: Shutdown, call: Call) -> None:
    """Give an instance other sizes on its host. It is shut down for that, and runs afterwards if it ran before."""
    call.submit(ResizeRequest, instance=instance, **vars(sizes), **vars(shutdown))
