"""`virtfleet migrate` and `virtfleet migration confirm|revert`."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.migrate import ConfirmRequest, MigrateRequest, RevertRequest
from worker.cli.options import Call, Instance, NewSizes, Readiness, Shutdown, grouped
from worker.settings import Transport

app = typer.Typer(no_args_is_help=True, help="Decide about the copy that a migration left behind.")


@grouped
def migrate(
    instance: Instance,
    to: Annotated[str, typer.Option(help="Host to move it to.")],
    auto_confirm: Annotated[bool, typer.Option("--auto-confirm", help="Confirm as soon as it is there.")] = False,
    bandwidth: Annotated[int | None, typer.Option(metavar="MIB", help="Most MiB per second for each disk.")] = None,
    transport: Annotated[Transport | None, typer.Option(help="How to copy. Default: VIRTFLEET_COPY_TRANSPORT.")] = None,
    flatten: Annotated[bool, typer.Option("--flatten", help="Make the root disk independent of its image.")] = False,
    *,
    sizes: NewSizes,
    shutdown: Shutdown,
    readiness: Readiness,
    call: Call,
) -> None:
    """Move an instance to another host. It is shut down for that; its former copy is kept until you confirm."""
    call.submit(
        MigrateRequest,
        instance=instance,
        to=to,
        auto_confirm=auto_confirm,
        bandwidth_mib=bandwidth,
        transport=transport,
        flatten=flatten,
        **vars(sizes),
        **vars(shutdown),
        **vars(readiness),
    )


@app.command()
@grouped
def confirm(
    instance: Instance,
    source_gone: Annotated[
        bool, typer.Option("--source-gone", help="The host that was left does not come back: nothing is removed there.")
    ] = False,
    *,
    call: Call,
) -> None:
    """Keep the instance where it is, and remove the copy that it left behind."""
    call.submit(ConfirmRequest, instance=instance, source_gone=source_gone)


@app.command()
@grouped
def revert(instance: Instance, shutdown: Shutdown, readiness: Readiness, call: Call) -> None:
    """Go back to the copy that was left behind. What the guest wrote since the migration is lost."""
    call.submit(RevertRequest, instance=instance, **vars(shutdown), **vars(readiness))
