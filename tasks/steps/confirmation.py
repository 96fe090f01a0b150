"""The confirmation of a move that the fleet asks for itself."""

from __future__ import annotations

import time
from uuid import uuid5

from worker.engine import deferred
from worker.engine.requests import NAMESPACE, is_operation_id
from worker.models import Instance


def confirm_when_due(instance: Instance) -> None:
    """Have the move of an instance confirmed when its note says, if it says so; asking again changes nothing.

    Raises `BrokerUnavailable`.
    """
    move = instance.move
    if move is not None and move.confirm_at is not None:
        request = {"instance": instance.name, "migration": move.operation, "wait_if_busy": True}
        seconds = max(0.0, move.confirm_at - time.time())
        deferred.defer(_confirmation_of(move.operation), "virtfleet.confirm", request, seconds)


def _confirmation_of(operation: str) -> str:
    plain = f"confirm-{operation}"
    return plain if is_operation_id(plain) else f"confirm-{uuid5(NAMESPACE, operation)}"  # ids have a longest length
