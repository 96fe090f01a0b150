"""`virtfleet instances` and `virtfleet hosts`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.options import AsJson
from worker.client import Fleet
from worker.errors import BrokerUnavailable, FleetError
from worker.models import Instance

hosts_app = typer.Typer(invoke_without_command=True, help="List hosts, or rebuild what is known of them.")


def instances(
    host: Annotated[str | None, typer.Option(help="Only those of one host.")] = None, as_json: AsJson = False
) -> None:
    """List instances: what runs where."""
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        if host:
            fleet.registry.require_host(host)
        found = fleet.registry.instances(host)
        if as_json:
            output.print_json({"instances": [instance.model_dump(mode="json") for instance in found]})
            return
        rows = [
            [one.name, str(one.uuid), _where(one), one.power.value, str(one.vcpus), f"{one.memory_mib} MiB"]
            for one in found
        ]
        output.table("", ["name", "uuid", "host", "power", "vcpus", "memory"], rows, empty="No instances yet.")


def _where(one: Instance) -> str:
    return f"{one.host} (from {one.move.leftover}: confirm or revert)" if one.move else one.host


@hosts_app.callback()
def hosts(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List hosts and the workers that serve them."""
    if ctx.invoked_subcommand:
        return
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        found = [_host(fleet, record.name, record.model_dump(mode="json")) for record in fleet.registry.hosts()]
        if as_json:
            output.print_json({"hosts": found})
            return
        rows = [
            [
                one["name"],
                "up" if one["control"] else "[red]down[/]",
                "up" if one["disk"] else "[red]down[/]",
                str(one["instances"]),
                one["accel"],
                f"libvirt {one['libvirt']}, QEMU {one['qemu']}" if one["libvirt"] else "[red]libvirt unseen[/]",
                one["libvirt_uri"].partition("?")[0],
            ]
            for one in found
        ]
        columns = ["host", "control", "disk", "instances", "accel", "versions", "libvirt URI"]
        output.table("", columns, rows, empty="No host has joined: virtfleet worker control --host NAME")


def _host(fleet: Fleet, name: str, record: dict[str, Any]) -> dict[str, Any]:
    alive = fleet.registry.alive(name)
    counted = len(fleet.registry.instances(name))
    return {**record, "control": "control" in alive, "disk": "disk" in alive, "workers": alive, "instances": counted}


@hosts_app.command()
def sync(
    ctx: typer.Context,
    host: Annotated[str | None, typer.Argument(help="One host. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild the list of instances from what is really on the hosts."""
    as_json = as_json or bool(ctx.parent and ctx.parent.params["as_json"])
    with output.errors_told(as_json=as_json):
        fleet = Fleet()
        found = [fleet.sync(host)] if host else [_synced(fleet, record.name) for record in fleet.registry.hosts()]
        if as_json:
            output.print_json({"hosts": found})
        else:
            _show_synced(found)
        errors = [one["error"] for one in found if "error" in one]
        if errors:
            raise typer.Exit(output.exit_code(errors[0]))


def _synced(fleet: Fleet, host: str) -> dict[str, Any]:
    """What was found on a host; or why nothing was, which must not keep the others from being looked at."""
    try:
        return fleet.sync(host)
    except BrokerUnavailable:
        raise
    except FleetError as error:
        return {"host": host, "error": error.as_dict()}


def _show_synced(found: list[dict[str, Any]]) -> None:
    for one in found:
        if "error" in one:
            output.tell(one["error"], as_json=False)
            continue
        listed = ", ".join(instance["name"] for instance in one["instances"]) or "no instances"
        output.console.print(f"{one['host']}: {listed}")
