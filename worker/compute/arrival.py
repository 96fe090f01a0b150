"""The side of a move that an instance comes to: checked, prepared, filled, proven, started."""

from __future__ import annotations

import structlog

from worker.compute import accel, disks
from worker.compute.departure import Departure, Handover, handover_of, note
from worker.compute.local import LocalHost, LocalInstance
from worker.compute.provision import (
    METADATA_BYTES,
    domain_config,
    image_cache,
    remove_domain,
    remove_files,
    spec_of,
)
from worker.compute.resize import require_spec
from worker.context import Context
from worker.errors import ChecksumMismatch, InstanceExists, InvalidSpec, InvalidState, UnsupportedByHost
from worker.images import qemu_img, remote
from worker.images.digest import content_digest
from worker.images.files import (
    locked,
    publish,
    replace_json,
    size_of,
)
from worker.images.layout import ASIDE, DataDir
from worker.images.remote import Copying, Ssh
from worker.images.reserve import Ledger
from worker.images.swap import make_swap
from worker.models import MIB, BaseImage, Frozen, Peer, PowerState

log = structlog.get_logger(__name__)


class Place(Frozen):
    """What the destination found out: whether it sees the source's storage, so that nothing is copied."""

    shared: bool
    reserved: int


class Copied(Frozen):
    """A file that has arrived: its digest, read from this host's disk, and its size in bytes."""

    digest: str
    size: int
    allocated: int


def copying(local: LocalHost, bandwidth_mib: int | None = None) -> Copying:
    """How this host copies, by its settings; `bandwidth_mib` MiB per second at the most, if that is less."""
    chosen = local.settings
    limits = [limit for limit in (chosen.copy_bandwidth_mib, bandwidth_mib) if limit]
    return Copying(
        ssh=Ssh(chosen.ssh_user, chosen.ssh_port, chosen.ssh_key, chosen.ssh_known_hosts),
        slots=local.data.create().root,
        incoming=chosen.copies_in,
        stall=chosen.stall_timeout,
        bandwidth=min(limits) * MIB if limits else None,
    )


# --- before the guest is stopped --------------------------------------------------------------------------------------


def preflight(instance: LocalInstance, departure: Departure, peer: Peer, ctx: Context) -> Place:
    """Refuse, while the guest still runs at home, what this host cannot do; reserve the space it will need.

    Raises `InstanceExists`, `NetworkNotFound`, `UnsupportedByHost`, `InvalidSpec`, `NoSpace`,
    `ConnectionMisconfigured`, `TransferInterrupted`.
    """
    ctx.check()
    local = instance.local
    local.data.create()
    _check_host(instance, departure)
    if sees_our_storage(instance, departure, ctx):
        if departure.resized:
            raise InvalidSpec(
                "new sizes cannot be given in a move on shared storage, which could not be taken back",
                hint="Resize before or after the move: virtfleet resize",
                field="to",
            )
        if peer.data_dir != local.data.root:
            raise UnsupportedByHost(
                f"host {local.name} has the storage of host {peer.name} at {local.data.root}, not at {peer.data_dir}",
                hint="Disks name their base images by path: mount the storage at the same place on both hosts.",
            )
        return Place(shared=True, reserved=0)
    if instance.folder.files() or instance.aside.folder.path.exists():
        raise InstanceExists(
            f"host {local.name} has files of {instance.name} already, in {local.data.instances}",
            hint="Are they left from an earlier move? Confirm or revert that first, or look into them.",
        )
    remote.reach(peer, copying(local))
    ctx.undo("release_reservation")
    return Place(shared=False, reserved=_reserve(instance, departure, ctx))


def _check_host(instance: LocalInstance, departure: Departure) -> None:
    local = instance.local
    with local.libvirt() as host:
        for network in departure.networks:
            host.check_network(network)
        for found in (host.find(instance.name), host.find_uuid(instance.uuid)):
            if found is not None:
                raise InstanceExists(f"host {local.name} has a domain {found.name!r} (uuid {found.uuid}) already")
        able = host.require_definable(departure.xml)
        if able.accel == "kvm" and accel.choose(local, host, None) != "kvm":
            raise UnsupportedByHost(f"{instance.name} runs under KVM, and guests do not on host {local.name}")
        able.require_vcpus(departure.sizes.vcpus)


def sees_our_storage(instance: LocalInstance, departure: Departure, ctx: Context) -> bool:
    """Whether the directory that the source marked is this host's too."""
    try:
        return instance.folder.probe(ctx.operation).read_text() == departure.probe
    except FileNotFoundError:
        return False


def _reserve(instance: LocalInstance, departure: Departure, ctx: Context) -> int:
    """Have the space promised that is needed, the base image's included if it is not here; bytes."""
    data = instance.local.data
    has_base = departure.base is None or (data.images / departure.base).exists()
    needed = departure.allocated + (0 if has_base else departure.base_allocated) + METADATA_BYTES
    Ledger(data.root).reserve(ctx.operation, needed, instance.folder.path, instance.local.settings.reserve_bytes, ctx)
    return needed


def release(data: DataDir, operation: str) -> None:
    """Give back what was promised."""
    Ledger(data.root).release(operation)


# --- the copy ---------------------------------------------------------------------------------------------------------


def prepare(instance: LocalInstance, departure: Departure, peer: Peer, ctx: Context) -> None:
    """Make the directory, with the instance's spec and its base image, while the guest still runs at home."""
    ctx.undo("remove_arrival", name=instance.name, uuid=instance.uuid)
    local, link = instance.local, copying(instance.local)
    with instance.owned(ctx) as folder:
        home = peer.data_dir / "instances" / instance.uuid
        if spec_of(local, instance.uuid) is None:
            unfinished = folder.partial(folder.spec.name)
            remote.fetch(peer, home / folder.spec.name, unfinished, link, ctx)
            publish(unfinished, folder.spec)
        spec = departure.sizes.on(require_spec(instance))
        if spec.swap_mib:
            make_swap(folder.swap, spec.swap_mib, ctx)
    if departure.base:
        bring_base(local, departure.base, peer, ctx)


def bring_base(local: LocalHost, name: str, peer: Peer, ctx: Context) -> BaseImage:
    """The base image of that file name, from this host's cache; brought from the other host if it is not there."""
    cache, sha256 = image_cache(local), name.partition(".")[0]
    found = cache.find(sha256)
    if found is None:
        unfinished = local.data.temporary(ctx.operation, name)
        remote.fetch(peer, peer.data_dir / "images" / name, unfinished, copying(local), ctx)
        found = cache.adopt(unfinished, sha256, ctx)
        unfinished.with_name(f"{unfinished.name}.lock").unlink(missing_ok=True)
    return found


def copy_file(instance: LocalInstance, name: str, peer: Peer, ctx: Context, *, size: int, how: Copying) -> Copied:
    """Copy one file of the instance, which is set aside on the other host, and read back what has arrived."""
    folder = instance.folder
    done = next((path for path in (folder.path / name, folder.verified(name)) if path.exists()), None)
    if done is None:
        done = folder.partial(name)
        source = peer.data_dir / "instances" / f"{instance.uuid}{ASIDE}" / name
        remote.fetch(peer, source, done, how, ctx, total=size)
    found = done.stat()
    return Copied(digest=content_digest(done, ctx), size=found.st_size, allocated=found.st_blocks * 512)


def verify(instance: LocalInstance, departure: Departure, pairs: dict[str, tuple[str, str]], ctx: Context) -> None:
    """Put the files in place whose content here is what it is at home; `pairs`: digests there and here, by name.

    Raises `ChecksumMismatch`: then nothing is put in place.
    """
    for name, (there, here) in pairs.items():
        if there != here:
            raise ChecksumMismatch(f"{name} of {instance.name} arrived with other content than it was sent with")
    with instance.owned(ctx) as folder:
        for name in pairs:
            if (folder.path / name).exists():
                continue
            verified = folder.verified(name)
            if not verified.exists():
                publish(folder.partial(name), verified, ctx)
            if departure.base and name == "root.qcow2":
                base = image_cache(instance.local).require(departure.base.partition(".")[0])
                qemu_img.rebase(verified, base.path, base.format)
            publish(verified, folder.path / name)
        for lock in folder.path.glob(".*.part.lock"):
            lock.unlink()
        spec = departure.sizes.on(require_spec(instance))
        disks.grow(folder, spec, ctx)
        if size_of(folder.spec):
            replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})
    release(instance.local.data, ctx.operation)


def remove_arrival(instance: LocalInstance, ctx: Context) -> None:
    """Remove what has arrived, after the last program that still writes to it has ended. Raises `InstanceLocked`."""
    for lock in instance.folder.path.glob(".*.part.lock"):
        with locked(lock, wait=20.0, watch=ctx):
            lock.unlink()
    remove_files(instance, ctx)


# --- the domain -------------------------------------------------------------------------------------------------------


def define(instance: LocalInstance, handover: Handover, ctx: Context) -> None:
    """Define the domain as it was at home, with this host's paths and its new sizes; the host's boot starts it not."""
    departure = handover.departure
    ctx.undo("remove_arrived_domain", name=instance.name, uuid=instance.uuid)
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        note(instance, handover)  # first: whoever looks through this host must not take the domain for the one
        spec = require_spec(instance)
        able = host.require_definable(departure.xml)
        same_accel = spec.model_copy(update={"accel": able.accel})
        config = domain_config(instance, host, same_accel, disks.present(folder, spec), instance.owner(ctx))
        host.redefine(departure.xml, config)


def remove_arrived_domain(instance: LocalInstance, ctx: Context) -> None:
    """Take the domain from this host; its files stay."""
    if instance.folder.path.exists():
        remove_domain(instance, ctx)
        note(instance, None)


def start(instance: LocalInstance, departure: Departure, ctx: Context) -> PowerState:
    """Start the guest if it ran at home; its power state then."""
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        guest.claim(instance.owner(ctx))
        if departure.power in (PowerState.RUNNING, PowerState.PAUSED):
            ctx.check()
            guest.start(paused=departure.power is PowerState.PAUSED)
        return guest.power()


def take_over(instance: LocalInstance, handover: Handover, ctx: Context) -> PowerState:
    """From here on this copy counts: note that beside it, and let the host start it at boot if it did so at home."""
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        guest.claim(instance.owner(ctx))
        note(instance, handover)
        guest.set_autostart(enabled=handover.departure.autostart)
        return guest.power()


def prove_here(instance: LocalInstance, migration: str, ctx: Context) -> Handover:
    """Make sure that this host has the copy that counts: its domain, all its files, sound. Raises `InvalidState`."""
    handover = handover_of(instance)
    came_here = handover is not None and (handover.operation, handover.phase) == (migration, "moved")
    if handover is None or not came_here or handover.authoritative != instance.local.name:
        raise InvalidState(f"host {instance.local.name} does not hold {instance.name} from migration {migration}")
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        missing = [path for path in guest.disk_paths().values() if not path.exists()]
        if missing or not set(handover.departure.files) <= set(folder.files()):
            raise InvalidState(f"{instance.name} lacks files on host {instance.local.name}: {missing}")
        return handover


def settle(instance: LocalInstance, ctx: Context) -> PowerState:
    """The move is over: nothing is noted of it any more."""
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        for handover in folder.handovers():
            handover.unlink()
        return host.guest(instance.uuid).power()
