"""KVM or not: decided by a guest that booted under it, once per boot of the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import structlog

from worker.compute.local import LocalHost
from worker.images.files import locked, replace_json
from worker.images.layout import boot
from worker.models import Frozen
from worker.settings import Accel
from worker.virt.host import Host
from worker.virt.kvm_probe import kvm_works

log = structlog.get_logger(__name__)

PROBE_TIMEOUT = 8.0
"""Seconds: the probe's boot sector powers off in well under one where KVM works; where it does not, it hangs."""


class Verdict(Frozen):
    """What the probe found, and in which boot of the host."""

    boot: str
    works: bool
    reason: str


def choose(local: LocalHost, host: Host, wanted: Accel | None) -> Literal["kvm", "qemu"]:
    """The accelerator for a guest: what is asked for, or by default KVM where a guest really runs under it."""
    wanted = wanted or local.settings.accel
    if wanted != "auto":
        return wanted
    verdict = probe(local, host)
    return "kvm" if verdict.works else "qemu"


def warn_of_none(local: LocalHost, host: Host, wanted: Accel | None) -> None:
    """Say in the log that a guest for which KVM would have been chosen runs without it, and why."""
    if (wanted or local.settings.accel) == "auto" and not (verdict := probe(local, host)).works:
        log.warning("guests run without KVM, many times slower", host=local.name, reason=verdict.reason)


def probe(local: LocalHost, host: Host) -> Verdict:
    """Whether guests run under KVM here; probed once per boot, then remembered in the data directory."""
    data = local.data.create()
    memory = data.root / "kvm-probe.json"
    with locked(data.root / ".kvm-probe.lock", wait=3 * PROBE_TIMEOUT):
        known = _recall(memory)
        if known:
            return known
        found = kvm_works(host, data.tmp, PROBE_TIMEOUT)
        verdict = Verdict(boot=boot(), works=found.works, reason=found.reason)
        replace_json(memory, verdict.model_dump())
        return verdict


def _recall(memory: Path) -> Verdict | None:
    try:
        known = Verdict.model_validate(json.loads(memory.read_text()))
    except (FileNotFoundError, ValueError):
        return None
    return known if known.boot == boot() else None
