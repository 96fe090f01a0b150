"""`virtfleet power on|off|reboot|pause|resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.power import PauseRequest, PowerOnRequest, RebootRequest, ResumeRequest, ShutdownRequest
from worker.cli.options import Call, Instance, Shutdown, grouped

app = typer.Typer(no_args_is_help=True, help="Change an instance's power.")


@app.command()
@grouped
def on(instance: Instance, call: Call) -> None:
    """Start an instance."""
    call.submit(PowerOnRequest, instance=instance)


@app.command()
@grouped
def off(instance: Instance, shutdown: Shutdown, call: Call) -> None:
    """Shut an instance down: asked in time, or by force."""
    call.submit(ShutdownRequest, instance=instance, **vars(shutdown))


@app.command()
@grouped
def reboot(
    instance: Instance,
    hard: Annotated[bool, typer.Option("--hard", help="Do not ask the guest.")] = False,
    *,
    shutdown: Shutdown,
    call: Call,
) -> None:
    """Shut an instance down and start it again."""
    call.submit(RebootRequest, instance=instance, hard=hard, **vars(shutdown))


@app.command()
@grouped
def pause(instance: Instance, call: Call) -> None:
    """Stop an instance's CPUs; its memory stays."""
    call.submit(PauseRequest, instance=instance)


@app.command()
@grouped
def resume(instance: Instance, call: Call) -> None:
    """Let a paused instance run on."""
    call.submit(ResumeRequest, instance=instance)
