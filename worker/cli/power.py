"""`virtfleet power on|off|reboot|pause|resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.power import PauseRequest, PowerOnRequest, RebootRequest, ResumeRequest, ShutdownRequest
from worker.cli.options import AsJson, Id, Instance, NoWait, RetryInterval, Timeout, WaitIfBusy
from worker.cli.submit import submit

app = typer.Typer(no_args_is_help=True, help="Change an instance's power.")


@app.command()
def on(
    instance: Instance,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Start an instance."""
    call = {"operation_id": operation_id, "wait_if_busy": wait_if_busy}
    submit(PowerOnRequest, no_wait=no_wait, as_json=as_json, instance=instance, **call)


@app.command()
def off(
    instance: Instance,
    timeout: Timeout = 60.0,
    retry_interval: RetryInterval = 10.0,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Shut an instance down: asked in time, or by force."""
    submit(
        ShutdownRequest,
        no_wait=no_wait,
        as_json=as_json,
        instance=instance,
        timeout=timeout,
        retry_interval=retry_interval,
        operation_id=operation_id,
        wait_if_busy=wait_if_busy,
    )


@app.command()
def reboot(
    instance: Instance,
    hard: Annotated[bool, typer.Option("--hard", help="Do not ask the guest.")] = False,
    timeout: Timeout = 60.0,
    retry_interval: RetryInterval = 10.0,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Shut an instance down and start it again."""
    submit(
        RebootRequest,
        no_wait=no_wait,
        as_json=as_json,
        instance=instance,
        hard=hard,
        timeout=timeout,
        retry_interval=retry_interval,
        operation_id=operation_id,
        wait_if_busy=wait_if_busy,
    )


@app.command()
def pause(
    instance: Instance,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Stop an instance's CPUs; its memory stays."""
    call = {"operation_id": operation_id, "wait_if_busy": wait_if_busy}
    submit(PauseRequest, no_wait=no_wait, as_json=as_json, instance=instance, **call)


@app.command()
def resume(
    instance: Instance,
    operation_id: Id = None,
    no_wait: NoWait = False,
    wait_if_busy: WaitIfBusy = False,
    as_json: AsJson = False,
) -> None:
    """Let a paused instance run on."""
    call = {"operation_id": operation_id, "wait_if_busy": wait_if_busy}
    submit(ResumeRequest, no_wait=no_wait, as_json=as_json, instance=instance, **call)
