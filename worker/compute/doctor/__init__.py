"""The host's side of the doctor: is the host fit for guests, and has anything been left behind on it?"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from worker.compute.doctor import environment, guests, leftovers, stores
from worker.compute.local import LocalHost
from worker.errors import FleetError
from worker.findings import Severity, Suspect, suspect


def look(local: LocalHost) -> Iterator[Suspect]:
    """All that there is to say of a host, found without a change to it."""
    has_files = not urlsplit(local.settings.uri_of(local.name)).netloc
    if has_files:
        yield from environment.files(local)
        yield from leftovers.temporary(local.data)
        yield from leftovers.snapshots(local)
        yield from stores.promises(local.data)
        yield from stores.images(local.data)
        yield from stores.damaged_snapshots(local.data)
    else:
        yield suspect(
            Severity.INFO,
            "files_elsewhere",
            "libvirt is reached over the network: files were not looked at",
            where=local.settings.uri_of(local.name),
            remedy="Run this on the host itself: virtfleet doctor --local",
        )
    try:
        yield from _beside_libvirt(local, has_files=has_files)
    except FleetError as error:
        yield suspect(
            Severity.ERROR,
            error.code,
            f"the host could not be examined to the end: {error.message}",
            where=local.settings.uri_of(local.name),
            remedy=error.hint,
        )


def _beside_libvirt(local: LocalHost, *, has_files: bool) -> Iterator[Suspect]:
    # Folders before domains: a folder whose domain is defined in between is then not taken for an orphan.
    folders = leftovers.folders(local.data) if has_files else []
    with local.libvirt() as host:
        yield from environment.hypervisor(local, host, has_files=has_files)
        everyone = host.guests()
        yield from leftovers.without_domain(local, folders, {str(guest.uuid) for guest in everyone})
        for guest in everyone:
            yield from guests.examine(local, guest, has_files=has_files)
