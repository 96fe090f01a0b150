"""`virtfleet snapshot` and `virtfleet snapshots`."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from tasks.snapshot import SnapshotDeleteRequest, SnapshotRequest, SnapshotRestoreRequest
from worker.cli import output
from worker.cli.options import AsJson, Call, Instance, grouped
from worker.client import Fleet
from worker.images.files import human_size
from worker.models import Compression

TAKE = "take"


COMPRESS = "--compress"
DEFAULT_COMPRESSION: Compression = "zstd"


class _TakesByDefault(TyperGroup):
    """`virtfleet snapshot NAME` is short for `virtfleet snapshot take NAME`, `--compress` for `--compress zstd`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = [TAKE, *args]
        return super().parse_args(ctx, _with_compression(args))


def _with_compression(args: list[str]) -> list[str]:
    """Typer knows no option whose value may be left out: what follows it may be the instance's name."""
    if COMPRESS not in args:
        return args
    at = args.index(COMPRESS) + 1
    word = args[at] if at < len(args) else "-"
    named_before = not args[1].startswith("-")
    has_value = word in get_args(Compression) or (named_before and not word.startswith("-"))
    return args if has_value else [*args[:at], DEFAULT_COMPRESSION, *args[at:]]


app = typer.Typer(
    cls=_TakesByDefault,
    no_args_is_help=True,
    help="Take a snapshot of an instance (virtfleet snapshot NAME), delete one, or restore one.",
)

SnapshotId = Annotated[str, typer.Argument(metavar="ID", help="Id of a snapshot: virtfleet snapshots")]


@app.command()
@grouped
def take(
    instance: Instance,
    method: Annotated[
        str, typer.Option(help="backup, mirror or cold; auto: backup where libvirt can, else mirror.")
    ] = "auto",
    disk: Annotated[
        list[str] | None, typer.Option(metavar="vda", help="A disk to take; may be repeated. Default: all but swap.")
    ] = None,
    quiesce: Annotated[str, typer.Option(help="Freeze file systems: auto, require or never.")] = "auto",
    form: Annotated[str, typer.Option("--format", help="qcow2 or raw.")] = "qcow2",
    compress: Annotated[
        str | None, typer.Option(COMPRESS, metavar="[zstd|zlib]", help="Compress; with zstd unless told.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="MIB/S", help="Copy no faster than this.")] = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Only what changed since the last such one; the first is full.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="With --incremental: begin a new chain.")] = False,
    *,
    call: Call,
) -> None:
    """Take a snapshot of an instance; its id is the operation's."""
    call.submit(
        SnapshotRequest,
        instance=instance,
        method=method,
        disks=disk,
        quiesce=quiesce,
        format=form,
        compress=compress,
        limit_mib=limit,
        incremental=incremental,
        full=full,
    )


@app.command()
@grouped
def delete(snapshot: SnapshotId, call: Call) -> None:
    """Delete a snapshot. There is no way back."""
    call.submit(SnapshotDeleteRequest, snapshot=snapshot)


@app.command()
@grouped
def restore(
    snapshot: SnapshotId,
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Name of the new instance.")],
    host: Annotated[
        str | None,
        typer.Option(help="Host to run it on; it must have the snapshot's folder, too. Default: where that lies."),
    ] = None,
    *,
    call: Call,
) -> None:
    """Make a new instance from a snapshot, with all the disks it holds."""
    call.submit(SnapshotRestoreRequest, snapshot=snapshot, name=name, host=host)


def snapshots(
    host: Annotated[str | None, typer.Option(help="Only those on one host.")] = None,
    instance: Annotated[str | None, typer.Option(help="Only those of one instance, by name or uuid.")] = None,
    as_json: AsJson = False,
) -> None:
    """List snapshots, oldest first."""
    with output.errors_told(as_json=as_json):
        found = Fleet().registry.snapshots(host=host, instance=instance)
        if as_json:
            output.print_json({"snapshots": [one.model_dump(mode="json") for one in found]})
            return
        rows = [
            [
                one.id,
                one.instance,
                one.host,
                output.when(one.taken_at.timestamp()),
                one.method,
                one.consistency,
                ", ".join(one.disks),
                human_size(one.actual_size),
                one.parent or "",
            ]
            for one in found
        ]
        columns = ["id", "instance", "host", "taken (UTC)", "method", "consistent", "disks", "size", "builds on"]
        output.table("", columns, rows, empty="No snapshots yet.")
