"""A snapshot that lies on another host, as an image of this one: fetched file by file, proven, and flattened here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.compute import cargo
from worker.compute.local import LocalHost
from worker.compute.provision import fetch_image, image_cache
from worker.compute.snapshots.share import shares
from worker.context import Context, Watcher
from worker.errors import CommandFailed, SnapshotDamaged, SnapshotNotFound
from worker.images import qemu_img, remote, snapshots
from worker.images.checksum import seal, sha256_of
from worker.images.files import allocated_size, require_space
from worker.images.remote import Copying
from worker.images.sources import SNAPSHOT, Limits, Source, SourceRecord
from worker.models import BaseImage, Frozen, InstanceSpec, Peer, RootFile

_PARTLY = 23  # rsync(1), EXIT VALUES
_STATES = ("part", "proven")


class Elsewhere(Frozen):
    """A snapshot's root disk on another host: the files it consists of, each of which builds on the next."""

    id: str
    host: str
    layers: tuple[RootFile, ...]


@dataclass(frozen=True)
class Link:
    """The way to the host where the snapshot lies."""

    peer: Peer
    how: Copying


def fetch(local: LocalHost, spec: InstanceSpec, there: Elsewhere, link: Link, ctx: Context) -> BaseImage:
    """The snapshot from this host's image cache, brought there first if it is not; see `ImageCache.fetch`.

    What has arrived is kept and continued for as long as the operation is not over. Raises `SnapshotNotFound` when it
    has been deleted, `SnapshotDamaged`, `ConnectionMisconfigured`, and what `ImageCache.fetch` raises.
    """
    if snapshots.find(local.data, there.id):
        return fetch_image(local, spec, ctx)  # both hosts see the same folder
    source = _RootDisk(local, there, link, ctx)
    image = image_cache(local).bring(source, spec.sha256, ctx.operation, ctx)
    cargo.discard_arriving(local, source.key, ctx)
    return image


def lend(local: LocalHost, there: Elsewhere, how: Copying, is_over: Callable[[], bool], ctx: Context) -> None:
    """Lend the snapshot's files over NBD, for as long as the other host fetches them; as `cargo.lend`.

    Raises `SnapshotNotFound` when it has been deleted.
    """
    paths = [local.data.root / layer.path for layer in there.layers]
    if not all(path.exists() for path in paths):
        raise _gone(there.id, local.name)
    cargo.lend(local, paths, how, is_over, ctx)


class _RootDisk(Source):
    """The root disk of a snapshot on another host."""

    def __init__(self, local: LocalHost, there: Elsewhere, link: Link, ctx: Context) -> None:
        super().__init__(f"{SNAPSHOT}{there.id}", f"{SNAPSHOT}{there.id}")
        self._local, self._there, self._link, self._ctx = local, there, link, ctx
        sums = "".join(layer.checksum for layer in there.layers)
        self._version = hashlib.sha256(sums.encode()).hexdigest()  # an id may be used again

    def is_current(self, record: SourceRecord) -> bool:
        """Whether it is the same snapshot still."""
        return record.etag == self._version

    def retrieve(
        self,
        target: Path,
        known: SourceRecord | None,  # noqa: ARG002 - the other host is not asked: the fleet knows what it holds
        limits: Limits,
        watch: Watcher,
    ) -> SourceRecord:
        """Fetch its files, and make one standalone image of them."""
        self._ctx.undo("discard_fetched", key=self.key)
        self._require_space(limits)
        layers = self._there.layers
        watches = shares(watch, [layer.size for layer in layers], f"fetching from host {self._link.peer.name}")
        files = [self._layer(number, each) for number, each in enumerate(watches)]
        target.unlink(missing_ok=True)
        if len(files) == 1:
            target.hardlink_to(files[0])  # renamed, it would be fetched again by who takes over from a dead worker
        else:
            qemu_img.flatten(files, target, watch=watch, stall=limits.stall)
        return SourceRecord(
            source=self.name, sha256=sha256_of(target, watch), fetched_at=time.time(), etag=self._version
        )

    def _layer(self, number: int, watch: Watcher) -> Path:
        """One of its files, as its checksum says that it is."""
        layer, proven, part = self._there.layers[number], self._path(number, "proven"), self._path(number, "part")
        if not proven.exists():
            self._bring(layer, part, watch)
            if seal([part], watch, like=layer.checksum)[part] != layer.checksum:
                part.unlink()
                raise SnapshotDamaged(
                    f"{self.name}: {layer.path} of host {self._link.peer.name} is not what it was when it was taken",
                    hint="Look at that host's storage and log; take the snapshot again.",
                )
            part.rename(proven)
        return proven

    def _bring(self, layer: RootFile, part: Path, watch: Watcher) -> None:
        peer, how = self._link.peer, self._link.how
        try:
            remote.bring(peer, peer.data_dir / layer.path, part, how, watch, total=layer.size)
        except CommandFailed as error:
            if error.details["exit_code"] == _PARTLY and "No such file" in error.message:
                raise _gone(self._there.id, peer.name) from error
            raise

    def _require_space(self, limits: Limits) -> None:
        """All that is missing, and the image made of several files: of each cluster it has the newest."""
        layers = self._there.layers
        whole = sum(layer.allocated for layer in layers)
        here = sum(allocated_size(self._path(number, state)) for number in range(len(layers)) for state in _STATES)
        needed = max(0, whole - here) + (whole if len(layers) > 1 else 0)
        require_space(self._local.data.tmp, needed, limits.reserve_bytes)

    def _path(self, number: int, state: str) -> Path:
        return self._local.data.arriving(self._ctx.operation, f"{self.key}.{number}", state)


def _gone(snapshot: str, host: str) -> SnapshotNotFound:
    return SnapshotNotFound(
        f"snapshot: {snapshot} is not on host {host} any more", field="snapshot", given=snapshot, host=host
    )
