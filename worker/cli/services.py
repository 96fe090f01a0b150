"""`virtfleet worker control|disk` and `virtfleet flower`: the long-running parts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tasks.hosts import join, sweep, watch_guests
from worker import logs
from worker.cli import output
from worker.engine.worker import run_flower, run_worker
from worker.errors import InvalidSpec
from worker.models import NAME_RULE, is_name
from worker.settings import get_settings

workers = typer.Typer(no_args_is_help=True, help="Run a worker of this host.")

Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Host to serve; may be repeated. Default: this machine's name.")
]
Level = Annotated[str, typer.Option(help="debug, info, warning or error.")]


@workers.command()
def control(host: Hosts = None, loglevel: Level = "info") -> None:
    """Serve the short calls of a host, and take in operations."""
    names = _names(host)
    logs.configure(loglevel)
    watch_guests(names)
    run_worker("control", names, introduce=join, loglevel=loglevel)


@workers.command()
def disk(host: Hosts = None, loglevel: Level = "info") -> None:
    """Serve the copies, converts and snapshots of a host. Needs the host's files."""
    names = _names(host)
    logs.configure(loglevel)
    run_worker("disk", names, introduce=sweep, loglevel=loglevel)


def flower(
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5555,
    basic_auth: Annotated[
        str, typer.Option(envvar="FLOWER_BASIC_AUTH", help="USER:PASSWORD; needed on any other address than loopback.")
    ] = "",
) -> None:
    """Watch the fleet's tasks in a browser."""
    with output.errors_told(as_json=False):
        if not basic_auth and address not in {"127.0.0.1", "localhost", "::1"}:
            raise InvalidSpec(
                f"address: Flower shows and controls every task; on {address} it needs --basic-auth USER:PASSWORD",
                field="address",
                given=address,
            )
    logs.configure("warning")
    run_flower(address, port, basic_auth)


def _names(hosts: list[str] | None) -> list[str]:
    names = hosts or [get_settings().host]
    with output.errors_told(as_json=False):
        for name in names:
            if not is_name(name):
                raise InvalidSpec(f"--host: allowed: {NAME_RULE} (given: {name!r})", field="host", given=name)
    sys.argv = sys.argv[:1]  # Celery's command line must not find ours
    return names
