"""The side of a move that an instance comes to: checked, prepared, filled, proven, started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from worker.compute import accel, disks
from worker.compute.cargo import Cargo, Part, discard_arriving
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
from worker.errors import (
    ChecksumMismatch,
    CommandFailed,
    ImageNotFound,
    ImageRejected,
    InstanceExists,
    InvalidSpec,
    InvalidState,
    SnapshotNotFound,
    Stalled,
    TransferInterrupted,
    UnsupportedByHost,
)
from worker.images import qemu_img, remote
from worker.images.checksum import checksum_of, is_current
from worker.images.files import locked, publish, replace_json, size_of
from worker.images.layout import DataDir, InstanceDir
from worker.images.remote import Copying
from worker.images.reserve import Ledger
from worker.images.swap import make_swap
from worker.models import Frozen, Peer, PowerState
from worker.virt.domain_xml import parse_firmware

NOT_TO_BE_HAD = (
    ImageNotFound,
    ImageRejected,
    SnapshotNotFound,
    InvalidSpec,
    ChecksumMismatch,
    TransferInterrupted,
    Stalled,
)
"""Why an image does not come from where it was once fetched: it may have been replaced there since."""

UNSOUND = (CommandFailed, ImageRejected, ChecksumMismatch)
"""Why an image does not come from the host whose guest runs on it."""


class Place(Frozen):
    """What the destination found out: whether it sees the source's storage, so that nothing is copied."""

    shared: bool
    reserved: int


class Base(Frozen):
    """The base image that the root disk will stand on here; none where it is to stand alone, and why."""

    name: str | None = None
    notes: tuple[str, ...] = ()


class Copied(Frozen):
    """A file that has arrived: its checksum, read from this host's disk, and its size in bytes."""

    digest: str
    size: int
    allocated: int


# --- before the guest is stopped --------------------------------------------------------------------------------------


def preflight(
    instance: LocalInstance, departure: Departure, peer: Peer, ctx: Context, *, how: Copying, flatten: bool = False
) -> Place:
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
        if flatten:
            raise InvalidSpec("flatten: allowed: no, on shared storage, where no disk is copied", field="flatten")
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
    remote.reach(peer, how, ctx)
    ctx.undo("release_reservation")
    return Place(shared=False, reserved=_reserve(instance, departure, ctx))


def _check_host(instance: LocalInstance, departure: Departure) -> None:
    local = instance.local
    with local.libvirt() as host:
        for network in departure.networks:
            host.check_network(network)
        for found in (host.find(instance.name), host.find_uuid(instance.uuid)):
            if found is not None:
                raise InstanceExists(
                    f"host {local.name} has a domain {found.name!r} (uuid {found.uuid}) already",
                    hint="Choose another host, or rename or remove that domain.",
                )
        able = host.require_definable(departure.xml)
        if able.accel == "kvm" and accel.choose(local, host, None) != "kvm":
            raise UnsupportedByHost(f"{instance.name} runs under KVM, and guests do not on host {local.name}")
        able.require_vcpus(departure.sizes.vcpus)
        host.require_memory(departure.sizes.memory_mib)
        firmware = parse_firmware(departure.xml)
        if firmware is not None and not firmware.exists():
            raise UnsupportedByHost(
                f"{instance.name} boots by the firmware {firmware}, which host {local.name} does not have",
                hint="Install it, on Debian and Ubuntu with: apt install ovmf",
            )


def sees_our_storage(instance: LocalInstance, departure: Departure, ctx: Context) -> bool:
    """Whether the directory that the source marked is this host's too."""
    try:
        return instance.folder.probe(ctx.operation).read_text() == departure.probe
    except FileNotFoundError:
        return False


def _reserve(instance: LocalInstance, departure: Departure, ctx: Context) -> int:
    """Have the space promised that is needed, the base image's included if it is not here; bytes."""
    data = instance.local.data
    has_base = departure.base is None or (not departure.flatten and (data.images / departure.base).exists())
    # Its base comes too, or it is flattened, and then takes more than that where the base is compressed.
    needed = departure.allocated + (0 if has_base else max(departure.base_allocated, departure.flat)) + METADATA_BYTES
    Ledger(data.root).reserve(ctx.operation, needed, instance.folder.path, instance.local.settings.reserve_bytes, ctx)
    return needed


def release(data: DataDir, operation: str) -> None:
    """Give back what was promised."""
    Ledger(data.root).release(operation)


# --- the copy ---------------------------------------------------------------------------------------------------------


def prepare(instance: LocalInstance, departure: Departure, peer: Peer, ctx: Context, *, how: Copying) -> Base:
    """Make the directory, with the instance's spec and its base image, while the guest still runs at home."""
    ctx.undo("remove_arrival", name=instance.name, uuid=instance.uuid)
    local = instance.local
    with instance.owned(ctx) as folder:
        home = peer.data_dir / "instances" / instance.uuid
        if spec_of(local, instance.uuid) is None:
            unfinished = folder.partial(folder.spec.name)
            remote.fetch(peer, home / folder.spec.name, unfinished, how, ctx, total=departure.spec_size)
            publish(unfinished, folder.spec)
        given = require_spec(instance)
        spec = departure.sizes.on(given)
        if spec.swap_mib:
            make_swap(folder.swap, spec.swap_mib, ctx)
    if departure.base is None or departure.flatten:
        return Base()
    return bring_base(local, departure, given.image, peer, ctx, how=how)


def bring_base(local: LocalHost, departure: Departure, image: str, peer: Peer, ctx: Context, *, how: Copying) -> Base:
    """The base image from this host's cache, else from where the instance's was fetched, else from the other host."""
    name = departure.base or ""
    cache, sha256 = image_cache(local), name.partition(".")[0]
    if cache.find(sha256) is not None:
        discard_arriving(local, sha256, ctx)
        return Base(name=name, notes=("the base image was here",))
    notes = []
    try:
        cache.fetch(image, sha256, ctx.operation, ctx)
    except NOT_TO_BE_HAD as error:
        notes.append(f"the base image does not come from where it was once fetched: {error.message}")
    else:
        return Base(name=name, notes=("the base image came from where it was once fetched",))
    try:
        _bring_from(local, departure, peer, ctx, how=how)
    except UNSOUND as error:
        told = f"host {peer.name} has no sound base image {name}: {error.message}; so the root disk comes without one"
        return Base(notes=(*notes, told))
    return Base(name=name, notes=(*notes, f"the base image came from host {peer.name}"))


def _bring_from(local: LocalHost, departure: Departure, peer: Peer, ctx: Context, *, how: Copying) -> None:
    name = departure.base or ""
    sha256 = name.partition(".")[0]
    ctx.undo("discard_fetched", key=sha256)
    unfinished = local.data.arriving(ctx.operation, sha256)
    try:
        remote.fetch(peer, peer.data_dir / "images" / name, unfinished, how, ctx, total=departure.base_size)
        image_cache(local).adopt(unfinished, sha256, ctx)
    except UNSOUND:
        discard_arriving(local, sha256, ctx)
        raise
    discard_arriving(local, sha256, ctx)


def copy_file(instance: LocalInstance, name: str, part: Part, peer: Peer, ctx: Context, *, how: Copying) -> Copied:
    """Copy one file of the instance, which is set aside on the other host, and read back what has arrived."""
    folder = instance.folder
    done = next((path for path in (folder.path / name, folder.verified(name)) if path.exists()), None)
    if done is not None:
        digest = checksum_of(done, ctx)
    else:
        done = folder.partial(name)
        digest = remote.fetch(peer, peer.data_dir / part.path, done, how, ctx, total=part.size)
    found = done.stat()
    return Copied(digest=digest, size=found.st_size, allocated=found.st_blocks * 512)


def verify(
    instance: LocalInstance, departure: Departure, cargo: Cargo, pairs: dict[str, tuple[str, str]], ctx: Context
) -> None:
    """Put the files in place whose content here is what it is at home; `pairs`: checksums there and here, by name.

    Raises `ChecksumMismatch`: then nothing is put in place.
    """
    for name, (there, here) in pairs.items():
        if there != here:
            of_one_kind = is_current(there) == is_current(here)
            raise ChecksumMismatch(
                f"{name} of {instance.name} arrived with other content than it was sent with",
                hint="" if of_one_kind else "The hosts' workers differ in version: upgrade both.",
            )
    with instance.owned(ctx) as folder:
        for name in pairs:
            if (folder.path / name).exists():
                continue
            verified = folder.verified(name)
            if not verified.exists():
                _require_here(folder.partial(name), instance.local.name)
                publish(folder.partial(name), verified, ctx)
            if cargo.base and name == "root.qcow2":
                base = image_cache(instance.local).require(cargo.base.partition(".")[0])
                qemu_img.rebase_unsafely(verified, str(base.path), base.format)
            publish(verified, folder.path / name)
        for beside in folder.path.glob(".*.part*"):  # those of an earlier boot, too
            beside.unlink()
        old = require_spec(instance)
        spec = departure.sizes.on(old)
        disks.grow(folder, spec, disks.kept(folder, old), ctx)
        if size_of(folder.spec):
            replace_json(folder.spec, {"spec": spec.model_dump(mode="json"), "operation": ctx.operation})
    release(instance.local.data, ctx.operation)


def _require_here(path: Path, host: str) -> None:
    if not path.exists():
        raise InvalidState(
            f"host {host} was started anew after {path} had arrived: it need not have been on its disk yet",
            hint="Migrate it again.",
        )


def remove_arrival(instance: LocalInstance, ctx: Context) -> None:
    """Remove what has arrived, after the last program that still writes to it has ended. Raises `InstanceLocked`.

    Its domain first, if there is one: where Redis lost its memory, the entry that removes it may be lost, too.
    """
    remove_arrived_domain(instance, ctx)
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
    """Take the domain from this host, also where its folder is not to be seen; its files stay."""
    remove_domain(instance, ctx)
    note(instance, None)


def start(instance: LocalInstance, departure: Departure, ctx: Context) -> PowerState:
    """Start the guest if it ran at home; its power state then."""
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        guest.claim(instance.owner(ctx))
        if departure.power in (PowerState.RUNNING, PowerState.PAUSED):
            ctx.check()
            if not guest.is_active():
                _begin_console_anew(folder)
            guest.start(paused=departure.power is PowerState.PAUSED)
        return guest.power()


def _begin_console_anew(folder: InstanceDir) -> None:
    """Who waits for a line must not find that of an earlier boot, in the log of a copy that comes back or is shared."""
    with suppress(FileNotFoundError):
        folder.console_log.rename(folder.former_console_log)
    for older in folder.path.glob(f"{folder.console_log.name}.[0-9]*"):  # virtlogd's
        older.unlink()


def take_over(instance: LocalInstance, handover: Handover, ctx: Context) -> PowerState:
    """From here on this copy counts: note that beside it, and let the host start it at boot if it did so at home."""
    with instance.owned(ctx), instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        guest.claim(instance.owner(ctx))
        note(instance, handover)
        guest.set_autostart(enabled=handover.departure.autostart)
        return guest.power()


def prove_here(instance: LocalInstance, migration: str, ctx: Context) -> Handover:
    """Make sure that this host has the copy that counts: its domain, its files, and its base. Raises `InvalidState`.

    Their content was compared as they arrived; since then the guest has changed it.
    """
    handover = handover_of(instance)
    came_here = handover is not None and (handover.operation, handover.phase) == (migration, "moved")
    if handover is None or not came_here or handover.authoritative != instance.local.name:
        raise InvalidState(f"host {instance.local.name} does not hold {instance.name} from migration {migration}")
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        guest = host.guest(instance.uuid)
        wanted = {*guest.files(), *(folder.path / name for name in handover.departure.files)}
        backing = disks.root(folder).backing
        missing = sorted(str(path) for path in {*wanted, *([backing] if backing else [])} if not path.exists())
        if missing:
            raise InvalidState(
                f"{instance.name} lacks files on host {instance.local.name}: {', '.join(missing)}",
                hint=f"Bring them back, or go back to the former copy: virtfleet migration revert {instance.name}",
            )
        return handover


def settle(instance: LocalInstance, ctx: Context) -> PowerState:
    """The move is over: nothing is noted of it any more."""
    with instance.owned(ctx) as folder, instance.local.libvirt() as host:
        ctx.make_irrevocable()
        for handover in folder.handovers():
            handover.unlink()
        return host.guest(instance.uuid).power()
