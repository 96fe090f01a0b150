"""What a host keeps besides its instances: images, snapshots, and space that is promised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from worker.compute.doctor.leftovers import age, is_temporary, size
from worker.findings import Severity, Suspect, suspect
from worker.images import snapshots
from worker.images.files import human_size
from worker.images.layout import DataDir, SnapshotDir
from worker.images.reserve import Ledger

ADMITTED_WITHIN = 60.0
"""Seconds. An image is put in place before its note: without one for longer, whoever did that has died."""

_IMAGE = re.compile(r"^[0-9a-f]{64}\.(json|qcow2|raw)$")


def images(data: DataDir) -> Iterator[Suspect]:
    """What lies among the images and is none. An image may be what guests build on: nothing here removes one."""
    for path in sorted(data.images.glob("*")):
        if path == data.sources or is_temporary(path):
            continue
        if not _IMAGE.match(path.name):
            yield _stray(path, "no image of the cache: nothing of the fleet made or uses it")
        elif not path.with_suffix(".json").exists() and age(path) > ADMITTED_WITHIN:
            yield suspect(
                Severity.WARNING,
                "image_without_note",
                f"an image of which nothing is noted: new instances do not use it, older ones may"
                f" ({human_size(size(path))})",
                where=path,
                remedy="The next spawn from where it came from notes it again. To remove it, see first that no domain"
                f" builds on it: virsh list --all --name | xargs -n1 virsh dumpxml | grep {path.name}",
            )


def damaged_snapshots(data: DataDir) -> Iterator[Suspect]:
    """Folders that are no snapshots though they lie there, and snapshots that lack what they build on."""
    folders = sorted(data.snapshots.glob("[!.]*"))  # first: one that is published now is read below
    there = {data.snapshot(one.id).path: one for one in snapshots.every(data)}
    for path in folders:
        if path not in there and path.exists():
            yield _no_snapshot(path)
    for path, one in there.items():
        below = {data.snapshot(disk.backing).path for disk in one.disks if disk.backing}
        lacks = [disk.file for disk in one.disks if not (path / disk.file).exists()]
        lacks += [f"snapshot {folder.name}, which it builds on" for folder in below - there.keys()]
        if lacks:
            yield suspect(
                Severity.ERROR,
                "broken_snapshot",
                f"snapshot {one.id} of {one.instance} cannot be restored: it lacks {', '.join(lacks)}",
                where=path,
                remedy="Put that back from a backup; what cannot be had any more makes it, and all that build on it,"
                f" worthless: virtfleet snapshot delete {one.id}",
                owners=[one.instance, one.instance_uuid],
            )


def _no_snapshot(path: Path) -> Suspect:
    taken = human_size(size(path))
    if not SnapshotDir(path).manifest.exists():
        return _stray(path, f"no snapshot: it has no manifest, so it is neither listed nor used ({taken})")
    return suspect(
        Severity.WARNING,
        "unreadable_snapshot",
        f"a snapshot whose manifest this version cannot read ({taken})",
        where=path,
        remedy="Bring all workers to one version; should it be damaged, its disks are whole files all the same.",
        owners=[path.name],
    )


def promises(data: DataDir) -> Iterator[Suspect]:
    """Space that is kept for operations, each until that is over."""
    ledger = Ledger(data.root)
    for operation, held in ledger.promises().items():
        yield suspect(
            Severity.WARNING,
            "stale_promise",
            f"{human_size(held)} are kept for operation {operation!r}, which is not running",
            where=ledger.path(operation),
            remedy="virtfleet doctor --fix gives them back.",
            owners=[operation],
            repair=partial(ledger.release, operation),
        )


def _stray(path: Path, what: str) -> Suspect:
    return suspect(
        Severity.WARNING, "stray_file", what, where=path, remedy="Move it out of here, or remove it by hand."
    )
