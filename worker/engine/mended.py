"""What the libraries below Celery get wrong in a worker, mended from here until they do it themselves."""

from __future__ import annotations

import billiard.pool
from kombu.transport.redis import QoS


def end_soon() -> None:
    """Have processes of the pool end with their last step.

    Each waits until the main process has read all its answers; that stops reading as soon as it knows of no task any
    more, in every twentieth stop too early. All answers are in the journal; 30 s of waiting only hold up an upgrade.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 10  # times 0.1 s


def outlive_redis() -> None:
    """Have a worker get over the loss of Redis in the moment between a message's arrival and its acknowledgement.

    A channel that is closed puts such messages back. Celery closes it twice (Connection.collect, then .close), and
    where the first time has failed the second one finds no address to connect to any more: an AttributeError, which
    ends the worker (kombu 5.7). Nothing is lost by leaving it: the message has been acted upon, and Redis still has it.
    """
    QoS.restore_unacked = _restore_unless_gone  # type: ignore[method-assign, assignment]


_restore = QoS.restore_unacked


def _restore_unless_gone(qos: QoS, client: object = None) -> None:
    if qos.channel.connection.client is not None:
        _restore(qos, client)
