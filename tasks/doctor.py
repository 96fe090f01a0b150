"""Doctor: each host is examined by its own control worker, or by this process where none runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from celery.result import AsyncResult

from tasks.hosts import sync_host
from worker.app import app, host_queue
from worker.compute import doctor, survey
from worker.compute.doctor import leftovers
from worker.compute.local import LocalHost
from worker.engine import checkup, strays
from worker.engine.answers import await_end
from worker.engine.connection import translated
from worker.engine.journal import journal
from worker.engine.mirror import Mirror
from worker.engine.registry import registry
from worker.errors import BrokerUnavailable, FleetError
from worker.findings import Finding, Severity, Suspect, settle
from worker.settings import get_settings

EXAMINE = "virtfleet.examine_host"


@app.task(name=EXAMINE, throws=(FleetError,))
def examine_host(host: str, *, fix: bool = False) -> list[dict[str, Any]]:
    """Examine the host that this worker serves, and repair what is safe to repair, if asked to."""
    return [finding.model_dump(mode="json") for finding in _examine(host, fix=fix)]


def examine_here(host: str, *, fix: bool) -> list[Finding]:
    """Examine the host this process stands on. While Redis is away, that is one more finding, and nothing is repaired:
    an operation that nobody here knows of may own what looks abandoned."""
    try:
        return _examine(host, fix=fix)
    except BrokerUnavailable as error:
        away = Finding(
            code=error.code,
            severity=Severity.ERROR,
            what=f"{error.message.rstrip('.')}: what operations own was judged by what this host remembers",
            host=host,
            remedy=error.hint,
        )
        local = LocalHost(host, get_settings())
        return [away, *settle(_look(local), strays.owners_by_host, fix=False, host=host)]


def examine_fleet(hosts: Sequence[str], *, fix: bool, timeout: float) -> list[Finding]:
    """Examine Redis, then each of these hosts by its control worker, all at once and within `timeout` seconds.

    Raises `UnknownHost`, `BrokerUnavailable`.
    """
    book, fleet = journal(), registry()
    for host in hosts:
        fleet.require_host(host)
    asked = {host: _ask(host, fix=fix, timeout=timeout) for host in hosts if "control" in fleet.alive(host)}
    findings = settle(checkup.look(book), frozenset, fix=fix)
    deadline = time.monotonic() + timeout
    for host in hosts:
        findings += settle(checkup.workers(fleet, host), frozenset, fix=False, host=host)
        if host in asked:
            findings += _answer(host, asked[host], deadline)
    return findings


def _examine(host: str, *, fix: bool) -> list[Finding]:
    book = journal()
    local = LocalHost(host, get_settings())
    suspects = chain([checkup.clock(book)], _knowing_others(_look(local), host), _registered(local))
    return settle(suspects, partial(strays.owners, book), fix=fix, host=host)


def _knowing_others(suspects: Iterable[Suspect], host: str) -> Iterator[Suspect]:
    """Hosts may share their storage, and each of them sees the files of the others' instances."""
    others = {str(one.uuid): one for one in registry().instances() if one.host != host}
    for one in suspects:
        there = next((others[uuid] for uuid in one.owners if uuid in others), None)
        is_without_domain = one.finding.code == leftovers.FILES_WITHOUT_DOMAIN
        yield leftovers.elsewhere(one, there.host, there.name) if there and is_without_domain else one


def _look(local: LocalHost) -> Iterator[Suspect]:
    yield from doctor.look(local)
    yield from checkup.copies(Mirror())


def _registered(local: LocalHost) -> Iterator[Suspect]:
    try:
        with local.libvirt() as connection:
            present = survey.instances(local, connection)
    except BrokerUnavailable:
        raise
    except FleetError:
        return  # the look at the host has told of it
    yield from checkup.registered(registry(), local.name, present, partial(sync_host, local.name))


def _ask(host: str, *, fix: bool, timeout: float) -> AsyncResult[Any]:
    with translated():
        # It expires: nobody wants a repair by a worker that comes up tomorrow.
        return app.send_task(
            EXAMINE, args=[host], kwargs={"fix": fix}, queue=host_queue(host, "control"), expires=timeout
        )


def _answer(host: str, asked: AsyncResult[Any], deadline: float) -> list[Finding]:
    if not await_end(asked, deadline - time.monotonic()):
        return [_silent(host, "its control worker did not answer in time")]
    answer: Any = asked.result
    failed = not asked.successful()  # revoked, when its clock is far ahead of ours
    with translated():
        asked.forget()
    if failed:
        return [_silent(host, f"its control worker could not examine it: {answer}")]
    return [Finding.model_validate(finding) for finding in answer]


def _silent(host: str, what: str) -> Finding:
    return Finding(
        code="host_not_examined",
        severity=Severity.ERROR,
        what=f"the host was not examined: {what}",
        host=host,
        where=f"control@{host}",
        remedy=f"Look into the log of control@{host}, or examine it there: virtfleet doctor --local --host {host}",
    )
