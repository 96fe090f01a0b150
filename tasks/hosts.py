"""Hosts: what a worker tells of its host when it starts, and making the registry equal to what is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import structlog

from tasks.steps.confirmation import confirm_when_due
from worker.app import app, host_queue
from worker.compute import survey
from worker.compute.comeback import ComebackWatch
from worker.compute.local import LocalHost
from worker.compute.snapshots import clean
from worker.compute.snapshots.watch import HoldWatch
from worker.engine import strays
from worker.engine.answers import await_end
from worker.engine.connection import translated
from worker.engine.journal import journal
from worker.engine.patience import patiently
from worker.engine.registry import HostRecord, registry
from worker.errors import FleetError, HostUnreachable
from worker.images.reserve import Ledger
from worker.settings import get_settings

log = structlog.get_logger(__name__)

_joined: set[str] = set()
"""Hosts that this process has entered into the registry before: one that is not there is not new, but forgotten."""


@app.task(name="virtfleet.sync_host", throws=(FleetError,))
def sync_host(host: str) -> dict[str, Any]:
    """Make the registry's entries of a host equal to what is really there; what was found."""
    local = LocalHost(host, get_settings())
    since = time.time()
    with local.libvirt() as connection:
        present, published = survey.instances(local, connection), survey.snapshots(local)
    registry().replace(host, present, since)
    registry().replace_snapshots(host, published, since)
    return {
        "host": host,
        "instances": [instance.model_dump(mode="json") for instance in present],
        "snapshots": [snapshot.model_dump(mode="json") for snapshot in published],
    }


def ask_to_sync(host: str, timeout: float) -> dict[str, Any]:
    """Have a host's control worker sync it; what it found. Raises `UnknownHost`, `HostUnreachable`."""
    registry().require_host(host)
    if "control" not in registry().alive(host):
        raise HostUnreachable(
            f"no control worker serves host {host!r} right now",
            hint=f"Start it on the host: virtfleet worker control --host {host}",
        )
    with translated():
        asked = app.send_task(sync_host.name, args=[host], queue=host_queue(host, "control"), expires=timeout)
    if not await_end(asked, timeout):
        raise HostUnreachable(f"the control worker of host {host!r} did not answer within {timeout:.0f} s")
    found: dict[str, Any] = asked.get()
    return found


def join(host: str) -> None:
    """Enter a host into the registry, and what a look at it finds: versions, accelerator, instances.

    A host that cannot be looked at is entered all the same, so that its operations are tried. Raises `HostUnreachable`.
    """
    settings, fleet, since = get_settings(), registry(), time.time()
    record = HostRecord(
        name=host,
        libvirt_uri=settings.uri_of(host),
        data_dir=str(settings.data_dir),
        address=settings.address or host,
        copies_out=settings.copies_out,
        seen_at=since,
    )
    local = LocalHost(host, settings)
    if not patiently(fleet.knows, host):
        if host in _joined or _has_instances(local):
            patiently(fleet.settle, host)
        _joined.add(host)
        patiently(fleet.put_host, record)  # the look may take a while (the first probe of KVM, a sick libvirtd)
    try:
        with local.libvirt() as connection:
            present = survey.instances(local, connection)
            patiently(fleet.replace, host, present, since)
            for instance in present:
                patiently(confirm_when_due, instance)  # Redis may have lost what it was to do
            patiently(fleet.replace_snapshots, host, survey.snapshots(local), since)
            found = survey.versions(connection) | survey.acceleration(local, connection)
            record = record.model_copy(update=found)
    finally:
        patiently(fleet.put_host, record)


def _has_instances(local: LocalHost) -> bool:
    return local.data.instances.is_dir() and any(local.data.instances.iterdir())


def sweep(host: str) -> None:
    """Remove temporary files of operations that are over."""
    local = LocalHost(host, get_settings())
    live = set(patiently(strays.owners, journal()))
    data = local.data.create()
    for path in (*data.sweep_tmp(live), *clean.sweep(local, live), *Ledger(data.root).sweep(live)):
        log.info("swept a leftover", path=str(path))


def watch_guests(hosts: Sequence[str]) -> None:
    """From now on, let go of guests that are held too long for a snapshot, and start those that are to come back."""
    local = [LocalHost(host, get_settings()) for host in hosts]
    HoldWatch(local).start()
    ComebackWatch(local).start()
