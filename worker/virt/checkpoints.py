"""Checkpoints: since when a guest's qcow2 disks note what changes, so that the next backup copies only that."""

from __future__ import annotations

import libvirt

from worker.errors import CheckpointMissing, HypervisorError, UnsupportedByHost
from worker.virt.bounded import asked
from worker.virt.domain_xml import parse
from worker.virt.faults import translated
from worker.virt.guest import Guest

KNOWS_CHECKPOINTS = (5, 6, 0)
"""libvirt's news: there are checkpoints since then. An older one has none, and does not know the calls."""


def names(guest: Guest) -> list[str]:
    """The guest's checkpoints, oldest first."""
    if guest.libvirt_version < KNOWS_CHECKPOINTS:
        return []
    with translated(f"list the checkpoints of {guest.name}", guest.host):
        found = guest.domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        return [str(checkpoint.getName()) for checkpoint in found]


def changed_bytes(guest: Guest, name: str) -> dict[str, int]:
    """About how many bytes of each disk changed since the checkpoint; without those of which libvirt cannot tell, as
    their bitmap went with a QEMU that was killed. Raises CheckpointMissing."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
    with translated(f"measure what changed in {guest.name} since {name}", guest.host):
        xml = asked(guest.domain, lambda domain: domain.checkpointLookupByName(name).getXMLDesc(flags))
    disks = parse(str(xml)).iterfind("./disks/disk[@checkpoint='bitmap']")
    return {str(disk.get("name")): int(str(disk.get("size"))) for disk in disks if disk.get("size")}


def delete(guest: Guest, name: str) -> bool:
    """Delete a checkpoint; what it noted goes into the one before it. False where libvirt needs the guest to run.

    Gone already is success.
    """
    if guest.libvirt_version < KNOWS_CHECKPOINTS:
        return True
    try:
        with translated(f"delete checkpoint {name} of {guest.name}", guest.host):
            asked(guest.domain, lambda domain: domain.checkpointLookupByName(name).delete())
    except CheckpointMissing:
        return True
    except UnsupportedByHost:  # libvirt 9: "cannot delete checkpoint for inactive domain"
        return False
    except HypervisorError as error:
        if "not found in backing chain" not in error.message:
            raise
        _forget(guest, name)
    return True


def _forget(guest: Guest, name: str) -> None:
    """Have libvirt forget a checkpoint whose bitmap went with a QEMU that was killed before it had written it out."""
    with translated(f"forget checkpoint {name} of {guest.name}", guest.host):
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        asked(guest.domain, lambda domain: domain.checkpointLookupByName(name).delete(flags))
