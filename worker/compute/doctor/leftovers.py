"""Files that nobody owns: of operations that are over, and of instances that no domain uses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import UUID

from worker.compute.departure import handover_of
from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots.clean import forget
from worker.findings import Severity, Suspect, suspect
from worker.images.files import human_size, locked, remove_tree
from worker.images.layout import ASIDE, DataDir, InstanceDir
from worker.images.reserve import allocated
from worker.virt.kvm_probe import PREFIX as PROBE

PROBE_SECONDS = 60.0
"""A boot disk of a probe that is older than this has been left by one that died."""

REMOVED_WITH_ITS_FOLDER = {".lock"}

FILES_WITHOUT_DOMAIN = "files_without_domain"


def temporary(data: DataDir) -> Iterator[Suspect]:
    """Temporary files, each its operation's until that is over."""
    if not data.tmp.is_dir():
        return
    for path, operation in data.leftovers():
        if path.name.startswith(PROBE) and age(path) < PROBE_SECONDS:
            continue
        owner = f"operation {operation!r}, which is not running" if operation else "a download that nobody continues"
        yield suspect(
            Severity.WARNING,
            "temporary_file",
            f"a temporary file of {owner} ({human_size(size(path))})",
            where=path,
            remedy="virtfleet doctor --fix removes it.",
            owners=[operation],
            repair=partial(remove_tree, path, data.root),
        )


def snapshots(local: LocalHost) -> Iterator[Suspect]:
    """Snapshots that are not finished, each its operation's until that is over."""
    for path, operation in local.data.unfinished_snapshots().items():
        yield suspect(
            Severity.WARNING,
            "unfinished_snapshot",
            f"a snapshot of operation {operation!r}, which is not running ({human_size(allocated(path))})",
            where=path,
            remedy="virtfleet doctor --fix removes it, and lets go of its guest should that be frozen.",
            owners=[operation],
            repair=partial(forget, local, path),
        )


def folders(data: DataDir) -> list[Path]:
    """What lies in the folder of instances."""
    return sorted(data.instances.iterdir()) if data.instances.is_dir() else []


def without_domain(local: LocalHost, there: Iterable[Path], uuids: set[str]) -> Iterator[Suspect]:
    """Folders of instances that have no domain. Their disks may be the last copy: nothing here removes one."""
    for path in there:
        if path.name not in uuids and path.exists():
            yield _without_domain(local, path)


def _without_domain(local: LocalHost, path: Path) -> Suspect:
    uuid = path.name.removesuffix(ASIDE)
    if path.is_dir() and path.name.endswith(ASIDE) and _is_uuid(uuid):
        return _set_aside(local, path, uuid)
    if not (path.is_dir() and _is_uuid(path.name)):
        what = "no folder of an instance: nothing of the fleet made or uses it"
        remedy = "Move it out of here, or remove it by hand."
        return suspect(Severity.WARNING, "stray_file", what, where=path, remedy=remedy)
    held = sorted(one for one in path.iterdir() if one.name not in REMOVED_WITH_ITS_FOLDER)
    if not held:
        return suspect(
            Severity.WARNING,
            "empty_folder",
            "the empty folder of an instance that has no domain",
            where=path,
            remedy="virtfleet doctor --fix removes it.",
            owners=[path.name],
            repair=partial(_remove_empty, path),
        )
    listed = ", ".join(f"{one.name} ({human_size(size(one))})" for one in held)
    return suspect(
        Severity.WARNING,
        FILES_WITHOUT_DOMAIN,
        f"no domain of this host uses these files, which may be the last copy of a guest: {listed}",
        where=path,
        remedy=_rescue(path, held),
        owners=[path.name],
    )


def elsewhere(suspect: Suspect, host: str, instance: str) -> Suspect:
    """What `without_domain` told of the files of an instance that is on another host."""
    told = {
        "code": "files_of_another_host",
        "severity": Severity.INFO,
        "what": f"files of instance {instance!r}, which is on host {host}",
        "remedy": f"If {host} has this folder too, it runs on them: leave them alone. Else they are what is left of a"
        " move: move them out of here.",
    }
    return replace(suspect, finding=suspect.finding.model_copy(update=told))


def _set_aside(local: LocalHost, path: Path, uuid: str) -> Suspect:
    """A copy that a move has set aside. Until that is over it may be the one that counts."""
    noted = handover_of(LocalInstance(local, uuid, uuid, is_aside=True))
    if noted is not None and noted.authoritative == local.name:
        return suspect(
            Severity.ERROR,
            "copy_set_aside",
            f"the copy that counts of an instance that does not run: operation {noted.operation} has set it aside and"
            f" neither handed it over nor brought it back ({human_size(size(path))})",
            where=path,
            remedy=f"See what stands in the way: virtfleet operation {noted.operation}; remove that, then bring it"
            f" back: virtfleet operation retry-undo {noted.operation}",
            owners=[uuid],
        )
    return suspect(
        Severity.INFO,
        "former_copy",
        f"the former copy of an instance that has moved, kept until the move is confirmed ({human_size(size(path))})",
        where=path,
        remedy=f"virtfleet migration confirm {uuid} removes it, virtfleet migration revert {uuid} goes back to it."
        " Only if they say that no migration waits for that (it was confirmed with --source-gone) is it of no use any"
        " more: then undefine its domain by hand (virsh undefine --nvram), and remove this folder.",
        owners=[uuid],
    )


def _rescue(path: Path, held: list[Path]) -> str:
    drop = f"If nobody needs them, and no other host has this folder, remove them by hand: rm -r {path}"
    root = next((one for one in held if one.stem == "root"), None)
    if root is None:
        return drop
    form = root.suffix.removeprefix(".")
    keep = f"qemu-img convert -f {form} -O qcow2 {root} COPY.qcow2, and spawn from the copy"
    return f"To have the guest back: {keep}. {drop}"


def _remove_empty(path: Path) -> None:
    try:
        with locked(InstanceDir(path).lock, operation="doctor"):
            if not [one for one in path.iterdir() if one.name not in REMOVED_WITH_ITS_FOLDER]:
                remove_tree(path, path.parent)
    except FileNotFoundError:
        return


def unknown_in(folder: InstanceDir, used: set[Path], owners: list[object]) -> Iterator[Suspect]:
    """Files in the folder of an instance that its domain does not use."""
    if not folder.path.is_dir():
        return
    for path in sorted(folder.path.iterdir()):
        if path in used or _is_known(folder, path):
            continue
        if is_temporary(path):
            yield suspect(
                Severity.WARNING,
                "temporary_file",
                f"an unfinished file in an instance's folder ({human_size(size(path))})",
                where=path,
                remedy="virtfleet doctor --fix removes it.",
                owners=owners,
                repair=partial(_remove_locked, folder, path),
            )
        else:
            yield suspect(
                Severity.WARNING,
                "stray_file",
                f"a file in an instance's folder that its domain does not use ({human_size(size(path))})",
                where=path,
                remedy="Look what it is; move it out of here, or remove it by hand.",
                owners=owners,
            )


def _is_known(folder: InstanceDir, path: Path) -> bool:
    # virtlogd keeps full logs as console.log.0, .1, ...
    log = path.name.startswith(f"{folder.console_log.name}.") or path == folder.console_log
    return log or path in {folder.lock, folder.spec, folder.seed, folder.nvram, *folder.handovers()}


def _remove_locked(folder: InstanceDir, path: Path) -> None:
    with locked(folder.lock, operation="doctor"):
        path.unlink(missing_ok=True)


def _is_uuid(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False


def is_temporary(path: Path) -> bool:
    """Whether it is what a file is called until it is whole."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def size(path: Path) -> int:
    """Bytes that a file, or all that is in a folder, takes on the disk."""
    try:
        if path.is_dir():
            return sum(size(one) for one in path.iterdir())
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def age(path: Path) -> float:
    """Seconds since it was written to."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
