"""What a move carries from host to host: files that are final, flattened where they must be, lent where asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from worker.compute import disks
from worker.compute.local import LocalHost, LocalInstance
from worker.context import Context, Watcher
from worker.errors import ConnectionMisconfigured, InternalError
from worker.images import nbd, qemu_img, remote
from worker.images.checksum import checksum_of
from worker.images.files import locked, publish, require_space
from worker.images.layout import InstanceDir
from worker.images.nbd import Nbd
from worker.images.remote import Copying, Ssh
from worker.models import MIB, Frozen
from worker.settings import Transport


class Part(Frozen):
    """A file to be copied: where its content lies, below the source's data directory, and its length in bytes."""

    path: Path
    size: int


class Cargo(Frozen):
    """All that is to be copied, by the names that it gets; the root disk has its `base`, or none if it is flat."""

    parts: dict[str, Part] = Field(default_factory=dict)
    base: str | None = None


class Fingerprint(Frozen):
    """The checksum of what is sent, and of what is kept for a way back: the same unless it is flattened."""

    sent: str
    kept: str


def copying(
    local: LocalHost, transport: Transport = "ssh", session: str = "", bandwidth_mib: int | None = None
) -> Copying:
    """How this host copies, by its settings; `bandwidth_mib` MiB per second at the most, if that is less.

    `session` sets what is lent over NBD for one purpose, such as an operation, apart from the rest.
    """
    chosen = local.settings
    limits = [limit for limit in (chosen.copy_bandwidth_mib, bandwidth_mib) if limit]
    tls = None if chosen.nbd_plain else chosen.nbd_tls_dir
    return Copying(
        ssh=Ssh(chosen.ssh_user, chosen.ssh_port, chosen.ssh_key, chosen.ssh_known_hosts),
        slots=local.data.create().root,
        incoming=chosen.copies_in,
        stall=chosen.stall_timeout,
        bandwidth=min(limits) * MIB if limits else None,
        nbd=Nbd(chosen.nbd_port_range(), tls, session) if transport == "nbd" else None,
    )


def load(instance: LocalInstance, names: Collection[str], ctx: Context, *, flat: bool) -> Cargo:
    """The files of the copy that is set aside, as they are now that nothing writes to them any more.

    With `flat` a root disk with a base is written out beside itself first, for as long as the move is not over.
    Raises `NoSpace`.
    """
    home = instance.local.data.root
    with instance.aside.owned(ctx) as folder:
        base = disks.root(folder).backing
        flattened = _flattened(instance, folder, ctx) if flat and base else None
        paths = {name: folder.path / name for name in names}
        if flattened:
            paths["root.qcow2"] = flattened
        parts = {name: Part(path=path.relative_to(home), size=path.stat().st_size) for name, path in paths.items()}
        return Cargo(parts=parts, base=base.name if base and not flattened else None)


def require_room_to_flatten(folder: InstanceDir, keep_free: int) -> None:
    """Raise `NoSpace` unless the root disk can be written out beside itself."""
    root = disks.root(folder)
    if root.backing:
        require_space(folder.path, qemu_img.measure(root.path, root.format, root.format), keep_free)


def _flattened(instance: LocalInstance, folder: InstanceDir, ctx: Context) -> Path:
    root, settings = disks.root(folder), instance.local.settings
    if not folder.flat.exists():
        unfinished = folder.partial(folder.flat.name)
        unfinished.unlink(missing_ok=True)
        require_room_to_flatten(folder, settings.reserve_bytes)
        qemu_img.convert(root.path, "qcow2", unfinished, "qcow2", watch=ctx, stall=settings.stall_timeout)
        publish(unfinished, folder.flat, ctx)
    return folder.flat


def fingerprint(instance: LocalInstance, name: str, cargo: Cargo, ctx: Context) -> Fingerprint:
    """The checksums of a file of the copy that is set aside."""
    kept, sent = instance.aside.folder.path / name, instance.local.data.root / cargo.parts[name].path
    checksum = checksum_of(kept, ctx)
    return Fingerprint(sent=checksum if sent == kept else checksum_of(sent, ctx), kept=checksum)


# --- lent -------------------------------------------------------------------------------------------------------------


class _Over(Exception):
    """Nobody needs what is lent any more."""


@dataclass(frozen=True)
class _UntilOver:
    """Whoever watches the step, and whether those are done who fetch."""

    watch: Watcher
    is_over: Callable[[], bool]

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self.watch.progress(done, total, note)

    def check(self) -> None:
        self.watch.check()
        if self.is_over():
            raise _Over


def lend(local: LocalHost, paths: Collection[Path], how: Copying, is_over: Callable[[], bool], ctx: Context) -> None:
    """Lend files below this host's data directory over NBD, for as long as somebody fetches them.

    Raises `ConnectionMisconfigured`, `TransferInterrupted` (no slot for outgoing copies, or no port, is free).
    """
    if how.nbd is None:
        raise InternalError("files are lent over NBD only")
    if is_over():
        return
    settings, link = local.settings, how.nbd
    files = {link.export_of(path, local.data.root): path for path in paths}
    watch = _UntilOver(ctx, is_over)
    with remote.outgoing_slots(local.data.root, settings.copies_out, len(files)) as held:
        ctx.progress(0, None, f"lending {len(files)} files")
        try:
            nbd.lend(files, _listens_on(settings.address), link, watch, clients=len(held), held=held)
        except _Over:
            return


def discard_arriving(local: LocalHost, key: str, ctx: Context) -> None:
    """Remove what the operation has fetched, after the last program that still writes to it has ended.

    Raises `InstanceLocked`.
    """
    own = local.data.temporary(ctx.operation, key)
    for lock in own.parent.glob(f"{own.name}.*.part.lock"):
        with locked(lock, wait=20.0, watch=ctx):
            lock.unlink()
    for path in own.parent.glob(f"{own.name}.*"):
        path.unlink(missing_ok=True)


def _listens_on(address: str | None) -> str:
    """Where files are lent. A name may lead to 127.0.1.1 on the very host that it stands for (Debian's /etc/hosts)."""
    try:
        return str(ipaddress.ip_address(address or ""))
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - clients show a certificate, unless plain connections are allowed explicitly


def require_lendable(local: LocalHost, how: Copying) -> None:
    """Raise `ConnectionMisconfigured` unless this host has what it needs to lend files over NBD."""
    if how.nbd is None or how.nbd.tls is None:
        return
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        if not (how.nbd.tls / name).exists():
            raise ConnectionMisconfigured(f"host {local.name} has no {how.nbd.tls / name}", hint=nbd.HINT)
