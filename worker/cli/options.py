"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Id = Annotated[str | None, typer.Option("--id", help="Operation id: the same id again attaches to the same operation.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the operation is accepted.")]
WaitIfBusy = Annotated[bool, typer.Option("--wait-if-busy", help="Queue behind the operation that owns the instance.")]
Instance = Annotated[str, typer.Argument(metavar="NAME", help="Name or uuid of an instance.")]

Timeout = Annotated[float, typer.Option(metavar="S", help="Seconds to shut down in, then by force; 0: at once.")]
RetryInterval = Annotated[float, typer.Option(metavar="S", help="Ask the guest again every S seconds.")]

NewVcpus = Annotated[int | None, typer.Option("--vcpus", help="Virtual CPUs from now on.")]
NewMemory = Annotated[int | None, typer.Option("--memory", metavar="MIB", help="Memory in MiB from now on.")]
NewDisk = Annotated[int | None, typer.Option("--disk", metavar="GIB", help="Root disk in GiB; it never shrinks.")]
NewSwap = Annotated[int | None, typer.Option("--swap", metavar="MIB", help="Swap disk in MiB, made anew; 0: none.")]
NewEphemeral = Annotated[
    list[int] | None,
    typer.Option("--ephemeral", metavar="GIB", help="An ephemeral disk in GiB, once for each: grown, or added."),
]

WaitFor = Annotated[str, typer.Option(help="Ready when: running, agent or console.")]
ConsoleLine = Annotated[str, typer.Option(help="With --wait-for console: the text to wait for.")]
ReadyTimeout = Annotated[float, typer.Option(metavar="S", help="Seconds until it must be ready.")]
