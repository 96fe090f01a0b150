"""`virtfleet resize`."""

from __future__ import annotations

from tasks.resize import ResizeRequest
from worker.cli.options import (
    AsJson,
    Id,
    Instance,
    NewDisk,
    NewEphemeral,
    NewMemory,
    NewSwap,
    NewVcpus,
    NoWait,
    RetryInterval,
    Timeout,
    WaitIfBusy,
)
from worker.cli.submit import submit


def resize(
    instance: Instance,
    vcpus: NewVcpus = None,
    memory: NewMemory = None,
    disk: NewDisk = None,
    swap: NewSwap = None,
    ephemeral: NewEphemeral = None,
    timeout: Timeout = 60.0,
    retry_interval: RetryInterval = 10.0,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Give an instance other sizes on its host. It is shut down for that, and runs afterwards if it ran before."""
    submit(
        ResizeRequest,
        no_wait=no_wait,
        as_json=as_json,
        instance=instance,
        vcpus=vcpus,
        memory_mib=memory,
        disk_gib=disk,
        swap_mib=swap,
        ephemeral_gib=ephemeral or None,
        timeout=timeout,
        retry_interval=retry_interval,
        operation_id=operation_id,
        wait_if_busy=wait_if_busy,
    )
