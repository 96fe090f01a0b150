"""Guests that were asked to shut down by an operation that was then cancelled, which nobody can take back.

The operation does not wait to see what they make of it: one that goes off later is started again by its host's control
worker, unless another operation has had to do with it by then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog
from pydantic import ValidationError

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.watching import HostWatch
from worker.context import Alone, Context
from worker.errors import FleetError, NoSpace
from worker.images.files import write_text_durably
from worker.models import Frozen, PowerState
from worker.virt.guest import Guest

log = structlog.get_logger(__name__)

LINGERS = 60.0
"""Seconds after which a guest that was asked to shut down, and by then has not, is taken not to."""


class Comeback(Frozen):
    """Who is to run again, by which operation, and until when (seconds since the epoch, by the host's clock)."""

    name: str
    uuid: str
    operation: str
    until: float


def expect(instance: LocalInstance, ctx: Context) -> None:
    """Have a running guest, which is marked as this operation's, started again should it go off in a while."""
    noted = Comeback(name=instance.name, uuid=instance.uuid, operation=ctx.operation, until=time.time() + LINGERS)
    path = instance.local.data.comeback(instance.local.name, instance.uuid)
    try:
        path.parent.mkdir(exist_ok=True)
        write_text_durably(path, noted.model_dump_json(), 0o600)
    except (NoSpace, OSError) as error:  # what it is cancelled for must not hang on this
        log.error("nobody starts the guest again should it go off", instance=instance.name, error=str(error))  # noqa: TRY400


class ComebackWatch(HostWatch):
    """One per control worker."""

    def __init__(self, hosts: Sequence[LocalHost]) -> None:
        super().__init__("comebacks", hosts)

    def look(self, host: LocalHost) -> None:
        """Start every guest that went off, and forget those that are not to come back any more."""
        for path in host.data.comebacks_of(host.name):
            try:
                noted = Comeback.model_validate_json(path.read_text())
                settled = time.time() > noted.until or _is_settled(host, noted)
            except (ValidationError, FileNotFoundError):
                settled = True
            except FleetError as error:  # another guest must not wait for this one, whose instance may be locked
                log.warning("cannot start a guest again yet", path=str(path), error=str(error))
                continue
            if settled:
                path.unlink(missing_ok=True)


def _is_settled(host: LocalHost, noted: Comeback) -> bool:
    """Whether nothing is left to be done for a guest; one that went off is started for that."""
    with host.libvirt() as connection:
        guest = connection.find_uuid(noted.uuid)
        if guest is None or not _is_still_its(guest, noted):
            return True
        if guest.power() is not PowerState.OFF:
            return False
    instance = LocalInstance(host, noted.name, noted.uuid)
    with instance.owned(Alone(noted.operation)), host.libvirt() as connection:
        guest = connection.guest(noted.uuid)
        if _is_still_its(guest, noted):
            guest.start()
            log.warning(
                "went off as an operation had asked before it was cancelled: started again", **noted.model_dump()
            )
    return True


def _is_still_its(guest: Guest, noted: Comeback) -> bool:
    mark = guest.owner()
    return mark is not None and mark.operation == noted.operation
