"""What a host has: its versions, its accelerator, and the instances that are really there."""

from __future__ import annotations

from typing import Any

import structlog

from worker.compute import accel
from worker.compute.departure import counts_here, move_of
from worker.compute.local import LocalHost
from worker.compute.provision import spec_of
from worker.errors import InstanceNotFound
from worker.images.snapshots import entry_of
from worker.images.snapshots import every as published_on
from worker.models import BY_SETTING, Instance, PowerState, SnapshotEntry
from worker.virt.guest import Guest
from worker.virt.host import Host

log = structlog.get_logger(__name__)


def versions(host: Host) -> dict[str, Any]:
    """The versions of the host's libvirt and QEMU."""
    return {
        "libvirt": ".".join(str(part) for part in host.libvirt_version),
        "qemu": ".".join(str(part) for part in host.qemu_version),
    }


def acceleration(local: LocalHost, host: Host) -> dict[str, Any]:
    """Which accelerator guests get by default, and why."""
    if local.settings.accel != "auto":
        return {"accel": local.settings.accel, "accel_reason": BY_SETTING}
    verdict = accel.probe(local, host)
    return {"accel": "kvm" if verdict.works else "qemu", "accel_reason": verdict.reason}


def instances(local: LocalHost, host: Host) -> list[Instance]:
    """The fleet's instances on this host, by the marks in their domains' metadata."""
    found = [_instance(local, guest) for guest in host.guests()]
    return [instance for instance in found if instance]


def snapshots(local: LocalHost) -> list[SnapshotEntry]:
    """The snapshots published on this host, by their manifests."""
    # One that was copied here, or lies on shared storage, is where it can be used: here.
    return [entry_of(local.data, one).model_copy(update={"host": local.name}) for one in published_on(local.data)]


def _instance(local: LocalHost, guest: Guest) -> Instance | None:
    try:
        owner, power = guest.owner(), guest.power()
    except InstanceNotFound:  # undefined since it was listed
        return None
    if owner is None or power is PowerState.MISSING:
        return None
    if not counts_here(local, owner.name, str(owner.uuid)):
        return None
    spec = spec_of(local, str(owner.uuid))
    return Instance(
        name=owner.name,
        uuid=owner.uuid,
        host=local.name,
        power=power,
        operation=owner.operation,
        vcpus=spec.vcpus if spec else 0,
        memory_mib=spec.memory_mib if spec else 0,
        files=local.data.instance(owner.uuid).files(),
        move=move_of(local, owner.name, str(owner.uuid)),
    )
