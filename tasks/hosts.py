"""Hosts: what a worker tells of its host when it starts, and making the registry equal to what is there."""

from __future__ import annotations

import time
from typing import Any

import structlog

from worker.app import app
from worker.compute import survey
from worker.compute.local import LocalHost
from worker.engine.journal import journal
from worker.engine.patience import patiently
from worker.engine.registry import HostRecord, registry
from worker.errors import FleetError
from worker.settings import get_settings

log = structlog.get_logger(__name__)


@app.task(name="virtfleet.sync_host", throws=(FleetError,))
def sync_host(host: str) -> dict[str, Any]:
    """Make the registry's entries of a host equal to what is really there; what was found."""
    local = LocalHost(host, get_settings())
    with local.libvirt() as connection:
        present = survey.instances(local, connection)
        registry().replace(host, present)
        return {"host": host, "instances": [instance.model_dump(mode="json") for instance in present]}


def join(host: str) -> None:
    """Enter a host into the registry, then add what takes longer to find out."""
    settings = get_settings()
    record = HostRecord(
        name=host,
        libvirt_uri=settings.uri_of(host),
        data_dir=str(settings.data_dir),
        seen_at=time.time(),
    )
    patiently(registry().put_host, record)
    local = LocalHost(host, settings)
    try:
        with local.libvirt() as connection:
            record = record.model_copy(update=survey.versions(connection))
            patiently(registry().put_host, record)
            patiently(registry().replace, host, survey.instances(local, connection))
            record = record.model_copy(update=survey.acceleration(local, connection))
            patiently(registry().put_host, record)
    except FleetError as error:
        log.warning("cannot survey the host; its operations are tried all the same", host=host, error=str(error))


def sweep(host: str) -> None:
    """Remove temporary files of operations that are over."""
    local = LocalHost(host, get_settings())
    live = {record.id for record in patiently(journal().latest, 100_000, unfinished=True)}
    for path in local.data.create().sweep_tmp(live):
        log.info("swept a leftover", path=str(path))
