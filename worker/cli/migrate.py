"""`virtfleet migrate` and `virtfleet migration confirm|revert`."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.migrate import ConfirmRequest, MigrateRequest, RevertRequest
from worker.cli.options import (
    AsJson,
    ConsoleLine,
    Id,
    Instance,
    NewDisk,
    NewEphemeral,
    NewMemory,
    NewSwap,
    NewVcpus,
    NoWait,
    ReadyTimeout,
    RetryInterval,
    Timeout,
    WaitFor,
    WaitIfBusy,
)
from worker.cli.submit import submit

app = typer.Typer(no_args_is_help=True, help="Decide about the copy that a migration left behind.")


def migrate(
    instance: Instance,
    to: Annotated[str, typer.Option(help="Host to move it to.")],
    auto_confirm: Annotated[bool, typer.Option("--auto-confirm", help="Confirm as soon as it is there.")] = False,
    bandwidth: Annotated[int | None, typer.Option(metavar="MIB", help="Most MiB per second for each disk.")] = None,
    vcpus: NewVcpus = None,
    memory: NewMemory = None,
    disk: NewDisk = None,
    swap: NewSwap = None,
    ephemeral: NewEphemeral = None,
    timeout: Timeout = 60.0,
    retry_interval: RetryInterval = 10.0,
    wait_for: WaitFor = "running",
    console_line: ConsoleLine = "",
    ready_timeout: ReadyTimeout = 300.0,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Move an instance to another host. It is shut down for that; its former copy is kept until you confirm."""
    submit(
        MigrateRequest,
        no_wait=no_wait,
        as_json=as_json,
        instance=instance,
        to=to,
        auto_confirm=auto_confirm,
        bandwidth_mib=bandwidth,
        vcpus=vcpus,
        memory_mib=memory,
        disk_gib=disk,
        swap_mib=swap,
        ephemeral_gib=ephemeral or None,
        timeout=timeout,
        retry_interval=retry_interval,
        wait_for=wait_for,
        console_line=console_line,
        ready_timeout=ready_timeout,
        operation_id=operation_id,
        wait_if_busy=wait_if_busy,
    )


@app.command()
def confirm(
    instance: Instance,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Keep the instance where it is, and remove the copy that it left behind."""
    call = {"operation_id": operation_id, "wait_if_busy": wait_if_busy}
    submit(ConfirmRequest, no_wait=no_wait, as_json=as_json, instance=instance, **call)


@app.command()
def revert(
    instance: Instance,
    timeout: Timeout = 60.0,
    retry_interval: RetryInterval = 10.0,
    wait_for: WaitFor = "running",
    console_line: ConsoleLine = "",
    ready_timeout: ReadyTimeout = 300.0,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Go back to the copy that was left behind. What the guest wrote since the migration is lost."""
    submit(
        RevertRequest,
        no_wait=no_wait,
        as_json=as_json,
        instance=instance,
        timeout=timeout,
        retry_interval=retry_interval,
        wait_for=wait_for,
        console_line=console_line,
        ready_timeout=ready_timeout,
        operation_id=operation_id,
        wait_if_busy=wait_if_busy,
    )
