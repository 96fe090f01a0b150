"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Id = Annotated[str | None, typer.Option("--id", help="Operation id: the same id again attaches to the same operation.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the operation is accepted.")]
WaitIfBusy = Annotated[bool, typer.Option("--wait-if-busy", help="Queue behind the operation that owns the instance.")]
Instance = Annotated[str, typer.Argument(metavar="NAME", help="Name or uuid of an instance.")]
