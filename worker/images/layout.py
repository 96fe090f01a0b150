"""Where a host keeps what: images, instances, snapshots, and the temporary files of operations."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import UUID

from worker.images.files import forget_former
from worker.models import DiskFormat

# QEMU runs as a user of its own: it must reach a file whose name it was given, but need not list a folder.
_TRAVERSABLE = 0o711
_DOWNLOAD = "download"
_UNFINISHED = ".unfinished"
ASIDE = "_resize"
"""How the name of a folder ends whose instance has moved to another host."""
_KEPT = re.compile(r"^(root\.(qcow2|raw)|ephemeral\d+\.qcow2|seed\.iso|nvram\.fd)$")
_KEEP_OWNERLESS = 86400.0  # seconds; a download may be continued by any operation until then


@dataclass(frozen=True)
class InstanceDir:
    """The folder of one instance."""

    path: Path

    def root(self, fmt: DiskFormat) -> Path:
        """The root disk."""
        return self.path / f"root.{fmt}"

    def ephemeral(self, index: int) -> Path:
        """The ephemeral disk of that number, from 0."""
        return self.path / f"ephemeral{index}.qcow2"

    @property
    def swap(self) -> Path:
        """The swap disk."""
        return self.path / "swap.raw"

    @property
    def seed(self) -> Path:
        """The cloud-init seed."""
        return self.path / "seed.iso"

    @property
    def nvram(self) -> Path:
        """The UEFI variables of a guest that boots by UEFI."""
        return self.path / "nvram.fd"

    @property
    def flat(self) -> Path:
        """The root disk without its base, made to be copied."""
        return self.path / ".root.qcow2.flat"

    def forget_flat(self) -> None:
        """Remove what was made to be copied, also what an earlier boot had begun."""
        for path in (self.flat, *self.path.glob(f".{self.flat.name}.*.part")):
            path.unlink(missing_ok=True)

    @property
    def console_log(self) -> Path:
        """What the guest wrote to its serial console."""
        return self.path / "console.log"

    @property
    def former_console_log(self) -> Path:
        """What it wrote before it left this host, where it has come back to."""
        return self.path / "console.log.former"

    @property
    def spec(self) -> Path:
        """What the instance is made of."""
        return self.path / "instance.json"

    def handover(self, host: str) -> Path:
        """What `host` knows of the move that its copy of the instance came from, or was left behind by.

        By host, because on shared storage both hosts have this folder.
        """
        return self.path / f".handover.{host}.json"

    def handovers(self) -> list[Path]:
        """What all hosts know of it, or knew before."""
        return [*self.path.glob(".handover.*")]

    @property
    def seal(self) -> Path:
        """There as long as the guest has not run on a copy that is set aside. To break it needs no space."""
        return self.path / ".sealed"

    def probe(self, operation: str) -> Path:
        """A mark by which another host's worker sees whether it has this folder too."""
        return self.path / f".probe.{operation}"

    def files(self) -> tuple[str, ...]:
        """Names of the files that cannot be made again: all disks but swap, and UEFI variables."""
        return tuple(sorted(path.name for path in self.path.glob("*") if _KEPT.match(path.name)))

    def partial(self, name: str) -> Path:
        """A copy of `name` on its way. What an earlier boot left is not continued: it may not be on the disk."""
        return self.path / f".{name}.{boot()}.part"

    def verified(self, name: str) -> Path:
        """A copy of `name` whose content is proven."""
        return self.path / f".{name}.verified"

    @property
    def before_resize(self) -> Path:
        """What the instance was before a resize that can still be taken back."""
        return self.path / ".before-resize.json"

    def forget_before_resize(self) -> None:
        """There is nothing to take back any more: the guest has its old sizes, or runs with the new ones."""
        self.before_resize.unlink(missing_ok=True)
        for path in (self.spec, self.swap):
            forget_former(path)

    @property
    def lock(self) -> Path:
        """The lock of whoever works on the instance."""
        return self.path / ".lock"

    def create(self) -> InstanceDir:
        """Make the folder, if it is not there."""
        _make(self.path)
        return self


@dataclass(frozen=True)
class SnapshotDir:
    """The folder of one snapshot, unfinished or published."""

    path: Path

    @property
    def manifest(self) -> Path:
        """What the snapshot is; written last."""
        return self.path / "manifest.json"

    @property
    def instant(self) -> Path:
        """While it is taken: what was caught, and when."""
        return self.path / ".instant.json"

    @property
    def intent(self) -> Path:
        """While it is taken: what is done to the guest right now that must be taken back."""
        return self.path / ".intent.json"

    @property
    def definition(self) -> Path:
        """While it is taken: the guest's libvirt XML at the instant."""
        return self.path / ".definition.xml"

    @property
    def nvram(self) -> Path:
        """The guest's UEFI variables."""
        return self.path / "nvram"

    def disk(self, target: str, fmt: DiskFormat) -> Path:
        """A disk as it is published."""
        return self.path / f"{target}.{fmt}"

    def taken(self, target: str) -> Path:
        """A disk as it was taken, still to be converted."""
        return self.path / f".{target}.taken"

    def converting(self, target: str) -> Path:
        """A disk that is being converted."""
        return self.path / f".{target}.converting"

    def create(self) -> SnapshotDir:
        """Make the folder, if it is not there."""
        _make(self.path)
        return self

    def create_empty(self) -> SnapshotDir:
        """Make the folder, without what a killed attempt or deletion may have left in it."""
        for path in self.create().path.iterdir():
            path.unlink()
        return self


@dataclass(frozen=True)
class DataDir:
    """A host's data directory; one filesystem, since files are put in place by renaming."""

    root: Path

    @property
    def images(self) -> Path:
        """Immutable base images, by content."""
        return self.root / "images"

    @property
    def sources(self) -> Path:
        """What is known of the places images came from."""
        return self.images / "sources"

    @property
    def instances(self) -> Path:
        """One folder per instance, by uuid."""
        return self.root / "instances"

    @property
    def snapshots(self) -> Path:
        """One folder per snapshot."""
        return self.root / "snapshots"

    @property
    def tmp(self) -> Path:
        """What operations have not finished yet."""
        return self.root / "tmp"

    @property
    def comebacks(self) -> Path:
        """Notes of guests that are to be started again should they go off."""
        return self.root / "comebacks"

    def comeback(self, host: str, uuid: str) -> Path:
        """The note of a guest on `host`: several hosts may have this folder."""
        return self.comebacks / f"{uuid}.{host}.json"

    def comebacks_of(self, host: str) -> list[Path]:
        """The notes of all guests on `host`; a host's name may be the end of another's."""
        return [*self.comebacks.glob(f"{'?' * len(str(UUID(int=0)))}.{host}.json")]

    def create(self) -> DataDir:
        """Make the folders that are not there; each can be traversed by QEMU's user."""
        for folder in (self.root, self.images, self.sources, self.instances, self.snapshots, self.tmp):
            _make(folder)
        return self

    def instance(self, uuid: UUID | str) -> InstanceDir:
        """The folder of an instance, whether it is there or not."""
        return InstanceDir(self.instances / str(UUID(str(uuid))))

    def snapshot(self, snapshot: str) -> SnapshotDir:
        """The folder of a published snapshot, whether it is there or not."""
        return SnapshotDir(self.snapshots / quote(snapshot, safe=""))

    def unfinished_snapshot(self, snapshot: str) -> SnapshotDir:
        """The folder of a snapshot that is being taken; beside the finished ones, to which its files may refer."""
        return SnapshotDir(self.snapshots / f".{quote(snapshot, safe='')}{_UNFINISHED}")

    def unfinished_snapshots(self) -> dict[Path, str]:
        """The folders of all snapshots that are being taken, or were when somebody died, with their operations."""
        found = self.snapshots.glob(f".*{_UNFINISHED}")
        return {path: unquote(path.name.removeprefix(".").removesuffix(_UNFINISHED)) for path in found}

    def aside(self, uuid: UUID | str) -> InstanceDir:
        """Where the folder of an instance is kept that has moved to another host."""
        return InstanceDir(self.instances / f"{UUID(str(uuid))}{ASIDE}")

    def temporary(self, operation: str, name: str) -> Path:
        """A temporary file that is swept once `operation` has ended."""
        return self.tmp / f"{quote(operation, safe='')}@{name}"

    def arriving(self, operation: str, key: str, state: str = "part") -> Path:
        """A file on its way here from another host. What an earlier boot left is not continued, as `partial`."""
        return self.temporary(operation, f"{key}.{boot()}.{state}")

    def partial_download(self, name: str) -> Path:
        """A download any operation may continue; what `transfer` notes about it lies beside it."""
        return self.tmp / f"{_DOWNLOAD}@{name}.part"

    def sweep_tmp(self, live_operations: Collection[str]) -> list[Path]:
        """Remove the temporary files of operations that are not live, and downloads nobody continued for a day."""
        swept = [path for path, operation in self.leftovers() if operation not in live_operations]
        for path in swept:
            path.unlink(missing_ok=True)
        return swept

    def leftovers(self) -> list[tuple[Path, str]]:
        """Temporary files, each with the id of its operation; without one ("") those nobody touched for a day."""
        owned = [path for path in self.tmp.iterdir() if path.is_file()]
        ownerless = [path for path in owned if path.name.startswith(f"{_DOWNLOAD}@")]
        found = [(path, unquote(path.name.partition("@")[0])) for path in owned if path not in ownerless]
        # Written under a name of the moment by write_text_durably: only a crash leaves one.
        ownerless += [*self.images.glob(".*.tmp"), *self.sources.glob(".*.tmp")]
        return found + [(path, "") for path in ownerless if _age(path) > _KEEP_OWNERLESS]


def boot() -> str:
    """What tells this boot of the host from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _make(folder: Path) -> None:
    # A folder that is there already was made by somebody who chose its mode.
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(_TRAVERSABLE)
