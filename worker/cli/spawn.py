"""`virtfleet spawn` and `virtfleet destroy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tasks.destroy import DestroyRequest
from tasks.spawn import SpawnRequest
from worker.cli import output
from worker.cli.options import Call, Instance, Readiness, grouped
from worker.client import Fleet
from worker.errors import InvalidSpec
from worker.models import BY_SETTING, MAX_USER_DATA_BYTES

SETTING = "Default: the host's setting."


@grouped
def spawn(
    name: Annotated[str, typer.Argument(help="Name of the new instance.")],
    host: Annotated[str, typer.Option(help="Host to run it on.")],
    image: Annotated[str, typer.Option(help="Image: a path on the host, an http(s) address, or snapshot:ID.")],
    sha256: Annotated[str | None, typer.Option(help="What the image's content must hash to.")] = None,
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs.")] = 1,
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory in MiB.")] = 512,
    disk: Annotated[
        int | None, typer.Option(metavar="GIB", help="Root disk in GiB. Default: as large as the image.")
    ] = None,
    swap: Annotated[int, typer.Option(metavar="MIB", help="Swap disk in MiB.")] = 0,
    ephemeral: Annotated[
        list[int] | None, typer.Option(metavar="GIB", help="An empty disk in GiB; may be repeated.")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="none, bridge:NAME or network:NAME; may be repeated.")
    ] = None,
    firmware: Annotated[str, typer.Option(help="bios or efi.")] = "bios",
    accel: Annotated[str | None, typer.Option(help=f"kvm, qemu or auto. {SETTING}")] = None,
    root_disk: Annotated[str | None, typer.Option(help=f"overlay, copy or raw. {SETTING}")] = None,
    hostname: Annotated[str | None, typer.Option(help="Host name inside. Default: NAME.")] = None,
    user_data: Annotated[Path | None, typer.Option(help="File with cloud-init user-data.")] = None,
    network_config: Annotated[Path | None, typer.Option(help="File with cloud-init network config.")] = None,
    ssh_key: Annotated[list[Path] | None, typer.Option(help="File with a public key; may be repeated.")] = None,
    *,
    readiness: Readiness,
    call: Call,
) -> None:
    """Make an instance from an image and start it."""
    with output.errors_told(as_json=call.as_json):
        texts = {
            "user_data": _read("user-data", user_data),
            "network_config": _read("network-config", network_config),
            "ssh_keys": [key for path in ssh_key or [] for key in _keys(path)],
        }
        if not call.as_json:
            _warn_without_kvm(host, accel)
    call.submit(
        SpawnRequest,
        name=name,
        host=host,
        image=image,
        sha256=sha256,
        vcpus=vcpus,
        memory_mib=memory,
        disk_gib=disk,
        swap_mib=swap,
        ephemeral_gib=ephemeral,
        networks=network,
        firmware=firmware,
        accel=accel,
        root_disk=root_disk,
        hostname=hostname,
        **vars(readiness),
        **texts,
    )


def _warn_without_kvm(host: str, accel: str | None) -> None:
    found = next((one for one in Fleet().registry.hosts() if one.name == host), None)
    if accel in {None, "auto"} and found and found.accel == "qemu" and found.accel_reason != BY_SETTING:
        why = escape(found.accel_reason)
        output.complaints.print(f"[yellow]Guests on host {host} run without KVM, many times slower[/]: {why}")


def _keys(path: Path) -> list[str]:
    lines = _read("ssh-key", path).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _read(option: str, path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_USER_DATA_BYTES + 1)  # one byte more shows that it is too long
        if len(content) > MAX_USER_DATA_BYTES:
            size = max(len(content), path.stat().st_size)  # a pipe has none
            raise _unreadable(option, path, f"it has {size} bytes", allowed=f"at most {MAX_USER_DATA_BYTES} bytes")
        return content.decode()
    except OSError as error:
        raise _unreadable(option, path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _unreadable(option, path, "it is no UTF-8 text") from None


def _unreadable(option: str, path: Path, why: str, *, allowed: str = "a readable file of UTF-8 text") -> InvalidSpec:
    message = f"--{option}: cannot read {path}: {why}; allowed: {allowed}"
    return InvalidSpec(message, field=option, given=str(path), allowed=allowed)


@grouped
def destroy(
    instance: Instance,
    host: Annotated[str | None, typer.Option(help="Where to look when the registry does not know it.")] = None,
    foreign: Annotated[bool, typer.Option("--foreign", help="Also a domain without the fleet's mark.")] = False,
    *,
    call: Call,
) -> None:
    """Remove an instance with its disks. There is no way back."""
    call.submit(DestroyRequest, instance=instance, host=host, foreign=foreign)
