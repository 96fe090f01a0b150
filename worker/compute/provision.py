"""Making an instance: its image, its disks, its seed, its domain; and unmaking exactly that."""

from __future__ import annotations

import json
import time
from pathlib import Path
from uuid import UUID

from worker.compute import accel
from worker.compute.local import LocalHost, LocalInstance, require_ours
from worker.context import Context
from worker.errors import CommandFailed, GuestNotReady, InstanceExists, InvalidSpec, UnsupportedByHost
from worker.images import qemu_img
from worker.images.files import (
    publish,
    remove_tree,
    removed_unless_renamed,
    replace_json,
    require_space,
    supports_direct_io,
)
from worker.images.layout import InstanceDir
from worker.images.reserve import Ledger
from worker.images.seed import build_seed as write_seed
from worker.images.store import ImageCache
from worker.images.swap import make_swap
from worker.models import (
    GIB,
    MIB,
    BaseImage,
    Disk,
    DiskFormat,
    DiskSet,
    DomainConfig,
    Frozen,
    InstanceSpec,
    Owner,
    PowerState,
    WaitFor,
)
from worker.settings import RootDisk
from worker.virt.guest import Guest
from worker.virt.host import Host
from worker.virt.jobs import NEEDS_NO_LOCKS

METADATA_BYTES = 16 * MIB
"""What an overlay, a seed and a definition take at the most before the guest writes anything."""

DISK_MODE = 0o600
"""What is on a guest's disk is nobody else's business; libvirt hands the file to QEMU's user while it is in use."""

POLL = 0.2
"""Seconds between two looks at a guest that is coming up (a look costs 0.5 ms)."""


def check_request(instance: LocalInstance, spec: InstanceSpec) -> None:
    """Refuse, before anything is made, what this host cannot give.

    Raises `NetworkNotFound`, `InstanceExists`, `UnsupportedByHost`, `InvalidSpec`, `HostUnreachable`.
    """
    local = instance.local
    with local.libvirt() as host:
        for network in spec.networks:
            host.check_network(network)
        require_free(instance, host)
        if instance.folder.spec.exists():
            raise _taken(instance, f"files of an instance in {instance.folder.path}")
        can = host.domain_capabilities(accel.choose(local, host, spec.accel))
        can.require_vcpus(spec.vcpus)
        host.require_memory(spec.memory_mib)
        if spec.firmware == "efi" and not can.efi:
            raise _no_efi(local)


def require_free(instance: LocalInstance, host: Host) -> None:
    """Raise `InstanceExists` for a domain of this name or id, before anything is made.

    Even one of this very id is not of this run: a spawn that is asked for again after its record is gone must not
    come to undo the guest that it made the first time.
    """
    there = host.find(instance.name) or host.find_uuid(instance.uuid)
    if there is not None:
        raise _taken(instance, f"a domain {there.name!r} (uuid {there.uuid})")


def _taken(instance: LocalInstance, what: str) -> InstanceExists:
    return InstanceExists(
        f"name: host {instance.local.name} has {what} already",
        field="name",
        given=instance.name,
        allowed="a name and an operation id that are free",
    )


def _no_efi(local: LocalHost) -> UnsupportedByHost:
    return UnsupportedByHost(
        f"firmware: host {local.name} has no UEFI firmware for guests",
        hint="Install it (Debian and Ubuntu: apt install ovmf), or use bios.",
        field="firmware",
    )


def image_cache(local: LocalHost) -> ImageCache:
    """The host's cache of images."""
    settings = local.settings
    return ImageCache(
        local.data,
        settings.image_roots,
        settings.image_max_bytes,
        settings.image_max_virtual_bytes,
        settings.reserve_bytes,
        settings.stall_timeout,
    )


def fetch_image(local: LocalHost, spec: InstanceSpec, ctx: Context) -> BaseImage:
    """The spec's image from the host's cache, brought there first if it is not; see `ImageCache.fetch`."""
    return image_cache(local).fetch(spec.image, spec.sha256, ctx.operation, ctx)


# --- disks ------------------------------------------------------------------------------------------------------------


def create_disks(instance: LocalInstance, spec: InstanceSpec, base: BaseImage, ctx: Context) -> DiskSet:
    """Make the instance's disks; those that an earlier attempt finished are kept.

    Raises `InvalidSpec` when the image is larger than the disk, `NoSpace`.
    """
    local, size = instance.local, _root_size(spec, base)
    kind = spec.root_disk or local.settings.root_disk
    needed = METADATA_BYTES + (0 if kind == "overlay" else _copy_bytes(base))
    promised = Ledger(local.data.create().root).outstanding(besides=ctx.operation)
    require_space(local.data.root, needed, local.settings.reserve_bytes + promised)
    ctx.undo("remove_files", uuid=instance.uuid)
    with instance.owned(ctx) as folder:
        disks = [_root_disk(instance, base, size, kind, ctx)]
        for index, gib in enumerate(spec.ephemeral_gib):
            disks.append(ephemeral_disk(folder, index, gib * GIB, disk_target(len(disks))))
        if spec.swap_mib:
            make_swap(folder.swap, spec.swap_mib, ctx)
            disks.append(plain_disk("swap", disk_target(len(disks)), folder.swap, "raw", spec.swap_mib * MIB))
        replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})
        return DiskSet(disks=tuple(disks))


def _root_size(spec: InstanceSpec, base: BaseImage) -> int:
    size = spec.disk_gib * GIB if spec.disk_gib else base.virtual_size
    if base.virtual_size > size:
        least = -(-base.virtual_size // GIB)
        raise InvalidSpec(
            f"disk_gib: the image is {base.virtual_size} bytes large and does not fit; allowed: at least {least} "
            f"(given: {spec.disk_gib})",
            field="disk_gib",
            given=spec.disk_gib,
            allowed=f"at least {least}",
        )
    return size


def _copy_bytes(base: BaseImage) -> int:
    # A raw copy is sparse: it takes what the image holds once unpacked, as a qcow2 would, not what it declares.
    return qemu_img.measure(base.path, base.format, "qcow2")


def _root_disk(instance: LocalInstance, base: BaseImage, size: int, kind: RootDisk, ctx: Context) -> Disk:
    form: DiskFormat = "raw" if kind == "raw" else "qcow2"
    path = instance.folder.root(form)
    backing = base.path if kind == "overlay" else None
    if not path.exists():
        # Made under another name and grown there, so that a file with the final name is always a finished disk.
        with removed_unless_renamed(
            instance.local.data.temporary(ctx.operation, f"{instance.uuid}-{path.name}")
        ) as new:
            if backing:
                qemu_img.create_overlay(new, backing, base.format, size)
            else:
                stall = instance.local.settings.stall_timeout
                qemu_img.convert(base.path, base.format, new, form, watch=ctx, stall=stall)
                _grow(new, form, size)
            new.chmod(DISK_MODE)
            publish(new, path)
    return Disk(role="root", target=disk_target(0), path=path, format=form, virtual_size=size, backing=backing)


def _grow(path: Path, form: DiskFormat, size: int) -> None:
    try:
        qemu_img.resize(path, form, size)
    except CommandFailed as error:
        if "File too large" not in error.message:
            raise
        given, allowed = f"{size // GIB} GiB", "what the data directory's file system can hold in one file"
        message = f"disk_gib: allowed: {allowed} (given: {given})"
        raise InvalidSpec(message, field="disk_gib", given=given, allowed=allowed) from error


def ephemeral_disk(folder: InstanceDir, index: int, size: int, target: str) -> Disk:
    """An empty disk of `size` bytes, made unless it is there."""
    path = folder.ephemeral(index)
    if not path.exists():
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.unlink(missing_ok=True)
        qemu_img.create(unfinished, "qcow2", size)
        unfinished.chmod(DISK_MODE)
        publish(unfinished, path)
    return plain_disk("ephemeral", target, path, "qcow2", size)


def plain_disk(role: str, target: str, path: Path, form: str, size: int) -> Disk:
    """A disk without a base."""
    return Disk.model_validate({"role": role, "target": target, "path": path, "format": form, "virtual_size": size})


def disk_target(index: int) -> str:
    """The name the guest's disk of that number has, from 0."""
    return f"vd{chr(ord('a') + index)}"


def build_seed(instance: LocalInstance, spec: InstanceSpec, ctx: Context) -> Disk:
    """Make the cloud-init seed (NoCloud) that tells the guest its name, keys, user-data and network."""
    with instance.owned(ctx) as folder:
        write_seed(
            folder.seed,
            instance_id=instance.uuid,
            hostname=spec.hostname or instance.name,
            ssh_keys=spec.ssh_keys,
            user_data=spec.user_data,
            network_config=spec.network_config,
        )
        return plain_disk("seed", "vdz", folder.seed, "raw", folder.seed.stat().st_size)


# --- domain -----------------------------------------------------------------------------------------------------------


def spawn(instance: LocalInstance, spec: InstanceSpec, disks: DiskSet, ctx: Context) -> PowerState:
    """Define the instance's domain and start it; one that runs already is left as it is. Its power state then.

    Raises `DomainRejected`, `FenceTooLow`, `HostUnreachable`, `OutOfMemory`.
    """
    ctx.undo("remove_domain", name=instance.name, uuid=instance.uuid)
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None and guest.is_active():
            guest.claim(instance.owner(ctx))
            return guest.power()
        accel.warn_of_none(instance.local, host, spec.accel)
        guest = host.define(domain_config(instance, host, spec, disks, instance.owner(ctx)))
        ctx.check()
        guest.start()
        return guest.power()


def domain_config(
    instance: LocalInstance, host: Host, spec: InstanceSpec, disks: DiskSet, owner: Owner
) -> DomainConfig:
    """All that the definition of the instance on this host is made from."""
    chosen = accel.choose(instance.local, host, spec.accel)
    can = host.domain_capabilities(chosen)
    return DomainConfig(
        name=instance.name,
        uuid=UUID(instance.uuid),
        owner=owner,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        disks=disks.disks,
        networks=spec.networks,
        firmware=spec.firmware,
        accel=chosen,
        emulator=can.emulator,
        machine=can.machine,
        console_log=instance.folder.console_log,
        nvram=instance.folder.nvram,
        iothread=host.qemu_version >= NEEDS_NO_LOCKS,  # before, to abort a backup of several disks may kill the guest
        disk_cache="none" if supports_direct_io(instance.folder.path) else "writeback",
    )


class Readiness(Frozen):
    """When a new guest counts as ready: it runs, its agent answers, or `console_line` appears on its console, within
    `timeout` seconds."""

    wait_for: WaitFor = "running"
    console_line: str = ""
    timeout: float = 300.0

    def __str__(self) -> str:
        return f"console line {self.console_line!r}" if self.wait_for == "console" else self.wait_for


def wait_ready(instance: LocalInstance, wanted: Readiness, ctx: Context) -> PowerState:
    """Wait until the guest is as far as wanted; its power state then.

    Raises `GuestNotReady` when that takes too long, or as soon as the guest stops.
    """
    deadline = time.monotonic() + wanted.timeout
    log = instance.folder.console_log
    with instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        while True:
            ctx.progress(0, None, f"waiting for the guest: {wanted}")
            if (state := guest.power()) not in (PowerState.RUNNING, PowerState.PAUSED):
                raise GuestNotReady(f"the guest is {state} instead of coming up", hint=_last_words(log))
            if _is_ready(guest, wanted, log):
                return state
            if time.monotonic() > deadline:
                raise GuestNotReady(
                    f"the guest was not ready ({wanted}) within {wanted.timeout:.0f} s", hint=_last_words(log)
                )
            time.sleep(POLL)


def _is_ready(guest: Guest, wanted: Readiness, log: Path) -> bool:
    if wanted.wait_for == "agent":
        return guest.agent_answers(timeout=1)
    if wanted.wait_for == "console":
        return wanted.console_line in _console(log)
    return True


def _console(log: Path) -> str:
    """What the guest wrote; virtlogd begins a new file after 2 MiB, and keeps the former one beside it."""
    parts = [log.with_name(f"{log.name}.0"), log]
    return "".join(part.read_text(errors="replace") for part in parts if part.exists())


def _last_words(log: Path) -> str:
    if not log.exists():
        return "It wrote nothing to its console."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"The last it wrote to its console: {lines[-1][:200]!r}" if lines else "It wrote nothing to its console."


# --- unmaking ---------------------------------------------------------------------------------------------------------


def remove_domain(instance: LocalInstance, ctx: Context, *, foreign: bool = False) -> bool:
    """Power off and forget the domain, with its saved memory and snapshot records; False when it is gone.

    Its files stay, its NVRAM among them: on shared storage they may be another host's by now.

    Raises `NotOurs` for a domain without the fleet's mark, `FenceTooLow`.
    """
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is None:
            return False
        require_ours(guest, foreign=foreign)
        guest.check_fence(instance.owner(ctx))
        guest.destroy()
        guest.undefine(keep_nvram=True)
        return True


def destroy(instance: LocalInstance, ctx: Context, *, foreign: bool = False) -> tuple[bool, bool]:
    """Remove domain and files for good; whether there was a domain, and whether there were files.

    The definition goes last: as long as it is there, whoever tries again finds what is left by its name.
    Raises `NotOurs` for a domain without the fleet's mark, `FenceTooLow`.
    """
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.find_uuid(instance.uuid)
        if guest is not None:
            require_ours(guest, foreign=foreign)
            guest.check_fence(instance.owner(ctx))
        ctx.make_irrevocable()
        if guest is not None:
            guest.destroy()
        files = any(entry != folder.lock for entry in folder.path.iterdir())
        remove_tree(folder.path, instance.local.data.instances)
        if guest is not None:
            guest.undefine()
        return guest is not None, files


def uuid_of(local: LocalHost, name: str) -> str | None:
    """The uuid of the domain of that name on this host, if there is one."""
    with local.libvirt() as host:
        guest = host.find(name)
        return str(guest.uuid) if guest else None


def remove_files(instance: LocalInstance, ctx: Context) -> bool:
    """Remove the instance's directory; False when it was gone. Raises `InstanceLocked`."""
    for unfinished in instance.local.data.tmp.glob(f"{ctx.operation}@{instance.uuid}-*"):
        unfinished.unlink(missing_ok=True)
    if not instance.folder.path.exists():
        return False
    with instance.owned(ctx) as folder:
        remove_tree(folder.path, instance.local.data.instances)
    return True


def spec_of(local: LocalHost, uuid: str) -> InstanceSpec | None:
    """What an instance is made of, as its directory says; None where it does not say."""
    try:
        return InstanceSpec.model_validate(json.loads(local.data.instance(uuid).spec.read_text())["spec"])
    except (FileNotFoundError, KeyError, ValueError):
        return None
