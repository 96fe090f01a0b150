"""A domain's XML from its `DomainConfig`, and the fleet's mark in it. Policy is decided elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from lxml import etree
from lxml.builder import ElementMaker  # type: ignore[import-not-found]  # lxml-stubs lacks it

from worker.errors import InvalidSpec, NotOurs
from worker.models import Disk, DomainConfig, GuestDisk, Owner

if TYPE_CHECKING:
    from lxml.etree import _Element

NAMESPACE = "urn:virtfleet:instance:1"
PREFIX = "virtfleet"
AGENT_CHANNEL = "org.qemu.guest_agent.0"
IMAGE_FORMATS = {".qcow2": "qcow2", ".raw": "raw"}


class _Maker(Protocol):
    """lxml's ElementMaker, which has no annotations of its own."""

    def __call__(self, tag: str, *children: object, **attributes: str) -> _Element: ...

    def __getattr__(self, tag: str) -> Callable[..., _Element]: ...


E: _Maker = ElementMaker()
_mark: _Maker = ElementMaker(namespace=NAMESPACE, nsmap={PREFIX: NAMESPACE})


def parse(xml: str) -> _Element:
    """XML from libvirt as a tree, without entities, DTDs or network access."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    return etree.fromstring(xml.encode(), parser)


def domain_xml(config: DomainConfig) -> str:
    """The definition of `config`: the same config always gives the same text. Raises InvalidSpec."""
    try:
        return etree.tostring(_domain(config), encoding="unicode", pretty_print=True)
    except ValueError as error:  # lxml refuses control characters
        raise InvalidSpec(f"domain {config.name!r} cannot be written as XML: {error}") from error


def redefined(xml: str, config: DomainConfig) -> str:
    """The definition `xml` with what `config` sizes and places anew.

    All else stays as it was first defined: machine type, CPU, firmware with its NVRAM, MAC addresses, other software's
    metadata, and the devices' PCI addresses, after which guests name their network interfaces.
    """
    old = parse(xml)
    new = _domain(config.model_copy(update={"iothread": old.find("iothreads") is not None}))
    for path in ("name", "memory", "vcpu", "cpu/topology", "devices/emulator"):
        _replace(old, new, path)
    for outdated in old.findall("currentMemory"):
        old.remove(outdated)
    nvram = old.find("os/nvram")
    # One that lies where libvirt puts them stays there: it has been so since before the fleet chose the place.
    if nvram is not None and config.nvram and Path(str(nvram.text)).name == config.nvram.name:
        nvram.text = str(config.nvram)
    _set_owner(old, config.owner)
    _replace_disks(_found(old, "devices"), new.findall("devices/disk"))
    for log in old.iterfind("devices/*/log"):
        log.set("file", str(config.console_log))
    return etree.tostring(old, encoding="unicode")


def _replace(old: _Element, new: _Element, path: str) -> None:
    outdated = old.find(path)
    if outdated is None:
        _parent(old, path).append(_found(new, path))
    else:
        _parent(old, path).replace(outdated, _found(new, path))


def _replace_disks(devices: _Element, disks: list[_Element]) -> None:
    outdated = {str(_found(disk, "target").get("dev")): disk for disk in devices.findall("disk")}
    for disk in disks:
        known = outdated.get(str(_found(disk, "target").get("dev")))
        address = None if known is None else known.find("address")
        if address is not None:
            disk.append(address)
    for disk in outdated.values():
        devices.remove(disk)
    for place, disk in enumerate(disks, start=1):  # the emulator comes first
        devices.insert(place, disk)


def _parent(domain: _Element, path: str) -> _Element:
    return _found(domain, path.rpartition("/")[0] or ".")


def _found(element: _Element, path: str) -> _Element:
    found = element.find(path)
    if found is None:
        raise InvalidSpec(f"the domain's definition has no {path}")
    return found


def marked(xml: str, owner: Owner) -> str:
    """The definition `xml`, with `owner` as whose it is."""
    domain = parse(xml)
    _set_owner(domain, owner)
    return etree.tostring(domain, encoding="unicode")


def _set_owner(domain: _Element, owner: Owner) -> None:
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = E.metadata()
        domain.append(metadata)
    for mark in metadata.findall(f"{{{NAMESPACE}}}instance"):
        metadata.remove(mark)
    metadata.append(_owner(_mark, owner))


def with_cpu_of(xml: str, running: str) -> str:
    """The definition `xml`, with the CPU of a `running` one instead of its own."""
    domain, cpu = parse(xml), parse(running).find("cpu")
    if cpu is not None:
        domain.replace(_found(domain, "cpu"), cpu)
    return etree.tostring(domain, encoding="unicode")


def with_host_model(xml: str, host_model: str) -> str:
    """The definition `xml`, with the CPU that the mode host-model stands for on a host; other modes stay."""
    domain = parse(xml)
    cpu = domain.find("cpu[@mode='host-model']")
    if cpu is None or not host_model:
        return xml
    expanded = parse(host_model)
    expanded.extend(cpu)  # its topology
    domain.replace(cpu, expanded)
    return etree.tostring(domain, encoding="unicode")


def host_model_of(capabilities: _Element) -> str:
    """What the mode host-model stands for, by a host's domain capabilities; empty where it has none."""
    mode = capabilities.find("cpu/mode[@name='host-model'][@supported='yes']")
    return "" if mode is None else serialized(E.cpu(*mode, mode="custom", match="exact", check="partial"))


def serialized(element: _Element) -> str:
    """A part of a definition as text."""
    return etree.tostring(element, encoding="unicode")


def accel_of(xml: str) -> str:
    """What a domain of this definition runs under: kvm or qemu."""
    return str(parse(xml).get("type"))


def owner_xml(owner: Owner) -> str:
    """The mark as virDomainSetMetadata takes it: libvirt adds the namespace, and fails on one given."""
    return etree.tostring(_owner(E, owner), encoding="unicode")


def parse_owner(xml: str) -> Owner | None:
    """Whose domain this is; None when it bears no mark. Raises NotOurs when the mark is damaged."""
    mark = parse(xml).find(f"./metadata/{{{NAMESPACE}}}instance")
    if mark is None:
        return None
    try:
        return Owner.model_validate_strings(dict(mark.attrib))
    except ValueError as error:
        raise NotOurs(f"the fleet's mark in the domain's metadata is damaged: {error}") from error


def parse_disks(xml: str) -> list[GuestDisk]:
    """The disks in files that a domain has."""
    disks = parse(xml).iterfind("./devices/disk")
    return [_guest_disk(disk) for disk in disks if disk.find("source[@file]") is not None]


def parse_other_disks(xml: str) -> list[str]:
    """Targets of the disks that a domain writes to and that are no files: volumes, devices, images on the network."""
    disks = parse(xml).iterfind("./devices/disk")
    return [str(_found(disk, "target").get("dev")) for disk in disks if _is_other(disk)]


def _is_other(disk: _Element) -> bool:
    source = disk.find("source")
    is_written_to = disk.get("device", "disk") in {"disk", "lun"} and disk.find("readonly") is None
    return is_written_to and source is not None and source.get("file") is None


def _guest_disk(disk: _Element) -> GuestDisk:
    def attribute(path: str, name: str) -> str | None:
        found = disk.find(path)
        return found.get(name) if found is not None else None

    return GuestDisk.model_validate(
        {
            "target": attribute("target", "dev"),
            "path": attribute("source", "file"),
            "format": attribute("driver", "type") or "raw",
            "backing": attribute("backingStore/source", "file"),
            "backing_format": attribute("backingStore/format", "type"),
            "role": (disk.findtext("serial") or "").rpartition("-")[0],
            "readonly": disk.find("readonly") is not None,
        }
    )


def disk_source(disk: _Element) -> tuple[str, Path | None]:
    """Target and file of a disk; None for one that does not lie in a file."""
    target, source = disk.find("target"), disk.find("source[@file]")
    name = "" if target is None else str(target.get("dev"))
    return name, None if source is None else Path(str(source.get("file")))


def parse_nvram(xml: str) -> Path | None:
    """The file with a guest's UEFI variables, if it has one."""
    path = parse(xml).findtext("./os/nvram")
    return Path(path) if path else None


def parse_firmware(xml: str) -> Path | None:
    """The file with the firmware that a guest boots by, where libvirt has put down which it is."""
    path = parse(xml).findtext("./os/loader")
    return Path(path) if path else None


def mac_address(uuid: UUID, index: int) -> str:
    """The address of a guest's NIC number `index`: a redefined guest keeps it without anybody storing it."""
    digest = hashlib.sha256(f"{uuid}/{index}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])  # QEMU's locally administered prefix


def cpu_xml(accel: str, vcpus: int = 1) -> _Element:
    """The CPU a guest sees: the host's model under KVM, all that TCG can emulate; in one socket."""
    topology = E.topology(sockets="1", cores=str(vcpus), threads="1")
    return E.cpu(topology, mode="host-model" if accel == "kvm" else "maximum")


def _domain(config: DomainConfig) -> _Element:
    return E.domain(
        E.name(config.name),
        E.uuid(str(config.uuid)),
        E.metadata(_owner(_mark, config.owner)),
        E.memory(str(config.memory_mib), unit="MiB"),
        E.vcpu(str(config.vcpus)),
        *([E.iothreads("1")] if config.iothread else []),
        _os(config),
        E.features(E.acpi(), E.apic()),
        cpu_xml(config.accel, config.vcpus),
        _clock(),
        E.on_poweroff("destroy"),
        E.on_reboot("restart"),
        # A crashed guest stays off beside the console log that tells why, rather than crash again and again.
        E.on_crash("destroy"),
        E.pm(E("suspend-to-mem", enabled="no"), E("suspend-to-disk", enabled="no")),
        E.devices(*_devices(config)),
        type=config.accel,
    )


def _owner(maker: _Maker, owner: Owner) -> _Element:
    started = {"started": "true"} if owner.started else {}
    return maker.instance(
        name=owner.name, uuid=str(owner.uuid), operation=owner.operation, fence=str(owner.fence), **started
    )


def _os(config: DomainConfig) -> _Element:
    kind = E.type("hvm", arch="x86_64", machine=config.machine)
    if config.firmware != "efi":
        return E.os(kind)
    # Left alone, libvirt takes Debian's firmware with Secure Boot and Microsoft's keys: what is not signed boots not.
    plain = E.firmware(E.feature(enabled="no", name="secure-boot"))
    variables = [E.nvram(str(config.nvram))] if config.nvram else []
    return E.os(kind, plain, *variables, firmware="efi")


def _clock() -> _Element:
    return E.clock(
        E.timer(name="rtc", tickpolicy="catchup"),
        E.timer(name="pit", tickpolicy="delay"),
        E.timer(name="hpet", present="no"),
        offset="utc",
    )


def _devices(config: DomainConfig) -> Iterator[_Element]:
    yield E.emulator(str(config.emulator))
    yield from (_disk(disk, config) for disk in config.disks)
    yield E.controller(type="usb", model="none")
    yield from _interfaces(config)
    yield _serial(config.console_log)
    yield E.channel(E.target(type="virtio", name=AGENT_CHANNEL), type="unix")
    yield E.rng(E.backend("/dev/urandom", model="random"), model="virtio")
    yield E.video(E.model(type="none"))
    yield E.watchdog(model="i6300esb", action="reset")
    # The host gets back at once what the guest frees.
    yield E.memballoon(model="virtio", freePageReporting="on")


def _disk(disk: Disk, config: DomainConfig) -> _Element:
    element = E.disk(
        _driver(disk, config),
        E.source(file=str(disk.path)),
        _backing_store(disk.backing),
        E.target(dev=disk.target, bus="virtio"),
        E.serial(f"{disk.role}-{disk.target}"[:20]),  # /dev/disk/by-id/virtio-...; virtio-blk has 20 bytes
        type="file",
        device="disk",
    )
    if disk.role == "root":
        element.append(E.boot(order="1"))
    if disk.readonly:
        element.append(E.readonly())
    return element


def _driver(disk: Disk, config: DomainConfig) -> _Element:
    # QEMU allows native AIO only on files opened with O_DIRECT.
    io = "native" if config.disk_cache == "none" else "threads"
    options = {"name": "qemu", "type": disk.format, "cache": config.disk_cache, "io": io}
    if config.iothread:
        options["iothread"] = "1"
    if not disk.readonly:
        options |= {"discard": "unmap", "detect_zeroes": "unmap"}
    return E.driver(options)


def _backing_store(backing: Path | None) -> _Element:
    """The whole chain, so that libvirt probes no file a guest could have written."""
    if backing is None:
        return E.backingStore()
    return E.backingStore(
        E.format(type=_format_of(backing)),
        # The base is shared and stays root's: owned by QEMU's user, any guest's QEMU could make it writable.
        E.source(E.seclabel(model="dac", relabel="no"), file=str(backing)),
        E.backingStore(),
        type="file",
    )


def _format_of(backing: Path) -> str:
    if backing.suffix not in IMAGE_FORMATS:
        raise InvalidSpec(f"backing file {backing}: its name must end in one of {', '.join(IMAGE_FORMATS)}")
    return IMAGE_FORMATS[backing.suffix]


def _interfaces(config: DomainConfig) -> Iterator[_Element]:
    attached = [network for network in config.networks if network != "none"]
    for index, network in enumerate(attached):
        kind, _, name = network.partition(":")
        given = config.mac_addresses[index : index + 1]
        yield E.interface(
            E.mac(address=given[0] if given else mac_address(config.uuid, index)),
            E.source({kind: name}),
            E.model(type="virtio"),
            E.rom(enabled="no"),  # guests boot from their root disk: spare them the wait for PXE
            type=kind,
        )


def _serial(log: Path) -> _Element:
    return E.serial(
        E.log(file=str(log), append="on"),
        E.target(E.model(name="isa-serial"), type="isa-serial", port="0"),
        type="pty",
    )
