"""What the fleet talks about: instances, disks, networks. Frozen, validated, and the same in JSON everywhere."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    model_validator,
)

from worker.errors import InvalidSpec
from worker.settings import Accel, RootDisk

MIB = 1024**2
GIB = 1024**3
MAX_USER_DATA_BYTES = MIB
MAX_EXPLAINED = 20
"""Mistakes told at once: a request may have thousands of fields that do not exist."""

DISCREET_FIELDS = frozenset({"user_data", "network_config"})
"""What is passed to the guest often holds passwords: shown in no message and no record."""

BY_SETTING = "by setting"
"""Why a host's guests run under the accelerator they do, where nobody had to find out."""

NAME_RULE = "1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NETWORK = re.compile(r"none|(bridge|network):[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Frozen(BaseModel):
    """Base of all models: immutable, and unknown fields are errors rather than typos that pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_name(value: str) -> bool:
    """Whether hosts and instances may be called that."""
    return bool(_NAME.fullmatch(value))


def _checked_name(value: str) -> str:
    if not is_name(value):
        raise ValueError(f"allowed: {NAME_RULE}")
    return value


def _checked_sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("allowed: 64 hexadecimal digits")
    return value.lower()


def _checked_network(value: str) -> str:
    if not _NETWORK.fullmatch(value):
        raise ValueError("allowed: none, bridge:NAME or network:NAME")
    return value


def _checked_user_data(value: str) -> str:
    size = len(value.encode())
    if size > MAX_USER_DATA_BYTES:
        raise ValueError(f"allowed: at most {MAX_USER_DATA_BYTES} bytes; it has {size}")
    return value


def _checked_ssh_key(value: str) -> str:
    if not re.match(r"^(ssh|ecdsa|sk)-\S+ \S+( .*)?$", value.strip()) or "\n" in value.strip():
        raise ValueError("allowed: one public key in OpenSSH's format, such as 'ssh-ed25519 AAAA... comment'")
    return value.strip()


Name = Annotated[str, AfterValidator(_checked_name)]
Network = Annotated[str, AfterValidator(_checked_network)]
UserData = Annotated[str, AfterValidator(_checked_user_data)]
SshKey = Annotated[str, AfterValidator(_checked_ssh_key)]
Sha256 = Annotated[str, AfterValidator(_checked_sha256)]
Checksum = Annotated[str, StringConstraints(pattern=r"^(blake3:)?[0-9a-f]{64}$")]
# Strict: that pydantic takes "2" and true for numbers hides mistakes.
Vcpus = Annotated[int, Strict(), Field(ge=1, le=1024)]
MemoryMib = Annotated[int, Strict(), Field(ge=16, le=64 * 1024 * 1024)]
DiskGib = Annotated[int, Strict(), Field(ge=1, le=64 * 1024)]
SwapMib = Annotated[int, Strict(), Field(ge=0, le=1024 * 1024)]
DiskFormat = Literal["qcow2", "raw"]
Compression = Literal["zstd", "zlib"]
Firmware = Literal["bios", "efi"]
WaitFor = Literal["running", "agent", "console"]


def explain(error: ValidationError) -> InvalidSpec:
    """Say in plain words which fields are wrong, what was given and what is allowed."""
    found = []
    for one in error.errors(include_url=False, include_context=False)[:MAX_EXPLAINED]:
        field = ".".join(str(part) for part in one["loc"])
        unknown = one["type"] == "extra_forbidden"
        allowed = "there is no such field" if unknown else _rule(one["msg"])
        # A rule about several fields has the whole request as its input, secrets and all; it names its field itself.
        given = "not shown" if field in DISCREET_FIELDS or not field else _short(one["input"])
        if not field:
            field, _, allowed = allowed.partition(": ")
        found.append({"field": _printable(field), "given": given, "allowed": allowed})
    missing = "Field required"
    lines = [
        f"{one['field']}: {one['allowed']}" + ("" if one["allowed"] == missing else f" (given: {one['given']})")
        for one in found
    ]
    return InvalidSpec("; ".join(lines), fields=found, **found[0])


def _printable(name: str) -> str:
    """A name that somebody made up, fit to be stored and shown: half a UTF-16 pair can be neither."""
    return name.encode(errors="backslashreplace").decode()[:80]


def _rule(message: str) -> str:
    """The rule that pydantic, or a check of ours, says was broken."""
    if message.startswith("Input should be "):
        return "allowed: " + message.removeprefix("Input should be ")
    return message.removeprefix("Value error, ")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


class PowerState(StrEnum):
    """What a guest is doing, in the words users see."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    SAVED = "saved"
    CRASHED = "crashed"
    MISSING = "missing"


class InstanceSpec(Frozen):
    """What an instance is made of; kept beside its disks as instance.json."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    sha256: Sha256 | None = None
    vcpus: Vcpus = 1
    memory_mib: MemoryMib = 512
    disk_gib: DiskGib | None = None
    swap_mib: SwapMib = 0
    ephemeral_gib: tuple[DiskGib, ...] = Field((), max_length=16)
    networks: tuple[Network, ...] = Field((), max_length=16)
    firmware: Firmware = "bios"
    root_disk: RootDisk | None = None
    accel: Accel | None = None
    hostname: Name | None = None
    user_data: UserData = ""
    network_config: UserData = ""
    ssh_keys: tuple[SshKey, ...] = Field((), max_length=64)


class Sizes(Frozen):
    """What of an instance a resize can change."""

    vcpus: int
    memory_mib: int
    disk_gib: int | None
    swap_mib: int
    ephemeral_gib: tuple[int, ...]

    @classmethod
    def of(cls, spec: InstanceSpec) -> Sizes:
        """The sizes in a spec."""
        return cls.model_validate(spec.model_dump(include=set(cls.model_fields)))

    def on(self, spec: InstanceSpec) -> InstanceSpec:
        """A spec with these sizes."""
        return InstanceSpec.model_validate({**spec.model_dump(), **self.model_dump()})


class NewSizes(Frozen):
    """What of an instance is to change; None stays. Disks only grow, and `ephemeral_gib` names all of them."""

    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    disk_gib: DiskGib | None = None
    swap_mib: SwapMib | None = None
    ephemeral_gib: tuple[DiskGib, ...] | None = Field(None, max_length=16)

    def after(self, sizes: Sizes) -> Sizes:
        """The sizes as they are to be."""
        given = {name: getattr(self, name) for name in Sizes.model_fields}
        return sizes.model_copy(update={name: value for name, value in given.items() if value is not None})


class Disk(Frozen):
    """One disk of an instance, as it lies in the instance's directory. Sizes in bytes."""

    role: Literal["root", "ephemeral", "swap", "seed"]
    target: str
    path: Path
    format: DiskFormat
    virtual_size: int
    backing: Path | None = None

    @property
    def readonly(self) -> bool:
        """A seed is a CD: the guest reads it only."""
        return self.role == "seed"


class DiskSet(Frozen):
    """All disks of an instance, the root disk first."""

    disks: tuple[Disk, ...]


class GuestDisk(Frozen):
    """A disk as a domain has it, the fleet's or not; `role` is empty where it is not the fleet's."""

    target: str
    path: Path
    format: str
    backing: Path | None = None
    backing_format: str | None = None
    role: str = ""
    readonly: bool = False


class BaseImage(Frozen):
    """An image in a host's cache: immutable, inspected, standalone. Sizes in bytes."""

    path: Path
    sha256: str
    format: DiskFormat
    virtual_size: int
    actual_size: int


Quiesce = Literal["auto", "require", "never"]
Consistency = Literal["application", "filesystem", "crash"]
DiskTarget = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,8}$")]


class SnapshotSpec(Frozen):
    """How a snapshot is to be taken. No `disks`: all that the guest can write to."""

    method: Literal["auto", "backup", "mirror", "cold"] = "auto"
    disks: tuple[DiskTarget, ...] = Field((), max_length=64)
    quiesce: Quiesce = "auto"
    format: DiskFormat = "qcow2"
    compress: Compression | None = None
    limit_mib: Annotated[int, Field(ge=1, le=1024 * 1024)] | None = None
    incremental: bool = False
    full: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> SnapshotSpec:
        if self.compress and self.format != "qcow2":
            raise ValueError("compress: allowed: only with format qcow2")
        if self.incremental and (self.format != "qcow2" or self.method not in {"auto", "backup"}):
            raise ValueError("incremental: allowed: only with format qcow2 and method auto or backup")
        if self.incremental and self.compress:
            raise ValueError("incremental: allowed: only without compress")
        if self.full and not self.incremental:
            raise ValueError("full: allowed: only with incremental, to begin a new chain")
        if self.method == "cold" and self.quiesce == "require":
            raise ValueError("quiesce: allowed: auto or never, when method is cold: its guest cannot thaw while saved")
        return self

    @property
    def bytes_per_second(self) -> int | None:
        """The limit on copying."""
        return self.limit_mib * MIB if self.limit_mib else None


class Moment(Frozen):
    """The instant a snapshot shows, and what was achieved at it. Seconds."""

    method: Literal["backup", "mirror", "cold"]
    taken_at: AwareDatetime
    power: PowerState
    consistency: Consistency
    frozen_filesystems: int = 0
    held_seconds: float = 0.0
    """How long the guest was kept from writing: frozen, paused, or (cold) until its memory was saved."""
    parent: str | None = None
    checkpoint: str | None = None
    notes: tuple[str, ...] = ()


class TakenDisk(Frozen):
    """A disk's content on its way into a snapshot."""

    target: str
    role: str
    path: Path
    format: DiskFormat
    virtual_size: int


class Taken(Moment):
    """What was caught at the instant, and where it lies until it is published."""

    disks: tuple[TakenDisk, ...]
    began: float | None = None
    """When libvirt was asked for a backup, in seconds since the epoch by the host's clock."""
    boot: str = ""
    """Of the host: nothing of it need be on the disk before it is published. Earlier versions did not say."""


class SnapshotDisk(Frozen):
    """A disk of a published snapshot; `backing` is the snapshot that holds what did not change since."""

    target: str
    role: str
    file: str
    format: DiskFormat
    virtual_size: int
    actual_size: int
    checksum: Checksum
    """As `worker.images.checksum` defines it."""
    backing: str | None = None


class Snapshot(Moment):
    """A published snapshot: its manifest.json. Sizes in bytes."""

    version: Literal[1] = 1
    id: str
    instance: str
    instance_uuid: UUID
    host: str
    spec: InstanceSpec | None
    definition: str
    """The guest's libvirt XML."""
    nvram: str | None = None
    """File with the UEFI variables."""
    disks: tuple[SnapshotDisk, ...]


class RootFile(Frozen):
    """The file of a snapshot's root disk: where it lies below its host's data directory, and its sizes in bytes.

    `backing` is the snapshot that holds what did not change since, `checksum` as in `SnapshotDisk`.
    """

    path: Path
    format: DiskFormat
    size: int
    allocated: int
    checksum: Checksum
    backing: str | None


class SnapshotEntry(Frozen):
    """An entry of the registry: which snapshot lies where. Sizes in bytes, all disks together.

    `root` is None where the snapshot was taken without the root disk.
    """

    id: str
    instance: str
    instance_uuid: UUID
    host: str
    taken_at: AwareDatetime
    method: str
    consistency: Consistency
    parent: str | None
    disks: tuple[str, ...]
    root: RootFile | None = None
    virtual_size: int
    actual_size: int
    updated_at: float = 0.0


class Owner(Frozen):
    """Whose a domain is: kept in the domain's metadata, so that the host itself can refuse a stale owner.

    `started` is set in the mark of a guest that this operation itself has started.
    """

    name: str
    uuid: UUID
    operation: str
    fence: int
    started: bool = False


class DomainConfig(Frozen):
    """All that the domain's XML is made from; policy is decided before, the XML only writes it down."""

    name: str
    uuid: UUID
    owner: Owner
    vcpus: int
    memory_mib: int
    disks: tuple[Disk, ...]
    networks: tuple[Network, ...] = ()
    mac_addresses: tuple[str, ...] = ()
    firmware: Firmware = "bios"
    accel: Literal["kvm", "qemu"]
    emulator: Path
    machine: str = "q35"
    console_log: Path
    nvram: Path | None = None
    disk_cache: Literal["none", "writeback"] = "none"
    iothread: bool = True


class Peer(Frozen):
    """Another host, as copies see it: its address, its data directory, and how many copies at a time it sends."""

    name: str
    address: str
    data_dir: Path
    copies_out: int


class Move(Frozen):
    """An instance has moved, and its former copy is kept aside until that is confirmed.

    `confirm_at`: when the fleet does so by itself, in seconds since the epoch by the host's clock.
    """

    operation: str
    authoritative: str
    leftover: str
    shared: bool
    confirm_at: float | None = None


class Instance(Frozen):
    """An entry of the registry: what runs where."""

    name: str
    uuid: UUID
    host: str
    power: PowerState
    operation: str | None = None
    vcpus: int = 0
    memory_mib: int = 0
    files: tuple[str, ...] = ()
    move: Move | None = None
    updated_at: float = 0.0


class Outcome(Instance):
    """The entry that an operation leaves, and what whoever asked for it should know."""

    note: str = ""

    @classmethod
    def of(cls, entry: Instance, *notes: str) -> Outcome:
        """That entry with these notes; empty ones do not count."""
        return cls(**dict(entry), note="; ".join(filter(None, notes)))
