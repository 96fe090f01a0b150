"""One KVM host through its libvirtd: find guests, define them, and tell what the host can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from uuid import UUID

import libvirt

from worker.errors import HypervisorError, InstanceNotFound, InvalidSpec, NetworkNotFound, UnsupportedByHost
from worker.models import DomainConfig, Owner
from worker.virt.connection import connected, version_of
from worker.virt.domain_xml import (
    domain_xml,
    host_model_of,
    marked,
    parse,
    redefined,
    serialized,
    with_host_model,
)
from worker.virt.faults import translated
from worker.virt.guest import Guest

MACHINE = "q35"
LOCAL_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class DomainCapabilities:
    """What guests of one kind can have on a host."""

    emulator: Path
    machine: str
    efi: bool
    accel: Literal["kvm", "qemu"]
    max_vcpus: int
    host_model: str = ""
    """The `<cpu>` of a guest that is started with the mode host-model."""

    def require_vcpus(self, vcpus: int) -> None:
        """Raise InvalidSpec for more than a guest can have here."""
        if vcpus > self.max_vcpus:
            allowed = f"at most {self.max_vcpus} for {self.machine} under {self.accel}"
            raise InvalidSpec(
                f"vcpus: allowed: {allowed} (given: {vcpus})", field="vcpus", given=vcpus, allowed=allowed
            )


class Host:
    """An open connection to a host's libvirtd. Every method raises the errors of `worker.errors` only."""

    def __init__(self, connection: libvirt.virConnect, *, uri: str, name: str) -> None:
        self._connection = connection
        self._uri = uri
        self.name = name

    @classmethod
    @contextmanager
    def open(cls, uri: str, *, name: str, timeout: float) -> Iterator[Host]:
        """The host at `uri`, called `name`, connected within `timeout` seconds, for the length of a `with`.

        Raises HostUnreachable after a few attempts, ConnectionMisconfigured at once.
        """
        with connected(uri, name=name, timeout=timeout) as connection:
            yield cls(connection, uri=uri, name=name)

    @property
    def connection(self) -> libvirt.virConnect:
        """libvirt's own handle, for the modules of `worker.virt` only."""
        return self._connection

    def _trying_to(self, doing: str) -> AbstractContextManager[None]:
        return translated(doing, self.name)

    # --- the host itself ----------------------------------------------------------------------------------

    @property
    def hostname(self) -> str:
        """What the host calls itself."""
        with self._trying_to("read the host's name"):
            return str(self._connection.getHostname())

    @property
    def libvirt_version(self) -> tuple[int, int, int]:
        """The version of the host's libvirtd: (9, 0, 0)."""
        with self._trying_to("read libvirt's version"):
            return version_of(self._connection.getLibVersion())

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """The version of the host's QEMU: (7, 2, 22)."""
        with self._trying_to("read QEMU's version"):
            return version_of(self._connection.getVersion())

    def require_definable(self, xml: str) -> DomainCapabilities:
        """What guests like the one defined by `xml` can have here, of its accelerator and machine type.

        Raises UnsupportedByHost when there can be none, or when this host's CPU lacks what the guest's has.
        """
        can, cpu = self._capabilities_for(xml), parse(xml).find("cpu[@mode='custom']")
        if cpu is not None and can.accel == "kvm":
            self._compare_cpu(serialized(cpu), can)
        return can

    def _capabilities_for(self, xml: str) -> DomainCapabilities:
        domain = parse(xml)
        accel: Literal["kvm", "qemu"] = "kvm" if domain.get("type") == "kvm" else "qemu"
        machine = domain.find("os/type")
        return self.domain_capabilities(accel, MACHINE if machine is None else str(machine.get("machine")))

    def _compare_cpu(self, cpu: str, can: DomainCapabilities) -> None:
        with self._trying_to("compare CPUs"):
            arch = str(self._connection.getInfo()[0])
            answer = self._connection.compareHypervisorCPU(str(can.emulator), arch, can.machine, can.accel, cpu)
        if answer == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
            raise UnsupportedByHost(f"the CPU of host {self.name} lacks features that the guest was started with")

    def domain_capabilities(self, accel: Literal["kvm", "qemu"], machine: str = MACHINE) -> DomainCapabilities:
        """What a guest under `accel` can have here. Raises UnsupportedByHost when there can be none."""
        try:
            with self._trying_to(f"run guests under {accel}"):
                arch = str(self._connection.getInfo()[0])
                xml = self._connection.getDomainCapabilities(None, arch, machine, accel)
        except HypervisorError as error:  # QEMU without that accelerator is VIR_ERR_INVALID_ARG
            raise UnsupportedByHost(error.message, **error.details) from error
        tree = parse(xml)
        firmware = [value.text for value in tree.iterfind("./os/enum[@name='firmware']/value")]
        vcpu = tree.find("vcpu")
        return DomainCapabilities(
            emulator=Path(tree.findtext("path", "")),
            machine=tree.findtext("machine", MACHINE),
            efi="efi" in firmware,
            accel=accel,
            max_vcpus=int(vcpu.get("max", 1)) if vcpu is not None else 1,
            host_model=host_model_of(tree),
        )

    def pinned_xml(self, guest: Guest) -> str:
        """A guest's definition, with the CPU that it was started with, or, as it is off, that it would be given here.

        On another host the same host-model would be another CPU.
        """
        if guest.is_active():
            return guest.pinned_xml()
        stored = guest.xml(inactive=True)
        try:
            return with_host_model(stored, self._capabilities_for(stored).host_model)
        except UnsupportedByHost:  # it could not be started here any more: that is why it leaves
            return stored

    def qemu_user(self) -> tuple[int, int] | None:
        """User and group id that guests run as; None where they run as libvirtd's own (qemu:///session)."""
        with self._trying_to("read the capabilities"):
            tree = parse(self._connection.getCapabilities())
        # virQEMUCapsInit writes "+uid:+gid" of qemu.conf there, once for each kind of guest.
        label = tree.findtext("./host/secmodel[model='dac']/baselabel")
        if label is None:
            return None
        uid, gid = (int(part) for part in label.split(":"))
        return uid, gid

    def require_memory(self, memory_mib: int) -> None:
        """Raise InvalidSpec for more memory, in MiB, than the host has: QEMU could not even be started with it.

        How much of it other guests have is not looked at: hosts may promise more than they have (virNodeGetInfo).
        """
        with self._trying_to("read the host's memory"):
            has = int(self._connection.getInfo()[1])
        if memory_mib > has:
            allowed = f"at most {has}, the memory of host {self.name}"
            raise InvalidSpec(
                f"memory_mib: allowed: {allowed} (given: {memory_mib})",
                field="memory_mib",
                given=memory_mib,
                allowed=allowed,
            )

    # --- networks -----------------------------------------------------------------------------------------

    def check_network(self, network: str) -> None:
        """Raise NetworkNotFound unless `network` (none, network:NAME or bridge:NAME) can be used now.

        libvirt itself would find a missing one only when the guest starts, with everything else already made.
        """
        kind, _, name = network.partition(":")
        if kind == "network":
            self._check_libvirt_network(name)
        elif kind == "bridge":
            self._check_bridge(name)

    def _check_libvirt_network(self, name: str) -> None:
        with self._trying_to("list the networks"):
            active = {str(net.name()): bool(net.isActive()) for net in self._connection.listAllNetworks()}
        usable = [one for one, is_active in active.items() if is_active]
        if name not in active:
            raise self._network_not_found(f"network {name!r}", "active networks", usable)
        if not active[name]:
            hint = f"Start it: virsh net-start {name}"
            raise self._network_not_found(f"active network {name!r}", "active networks", usable, hint=hint)

    def _check_bridge(self, name: str) -> None:
        if self._is_local():
            kind, known = "bridges", {one.name for one in LOCAL_INTERFACES.iterdir() if (one / "bridge").is_dir()}
        else:  # from afar libvirt does not tell which of them are bridges
            kind, known = "interfaces", self._interfaces()
        if name not in known:
            raise self._network_not_found(f"bridge {name!r}", kind, known)

    def _network_not_found(self, what: str, kind: str, known: Iterable[str], *, hint: str = "") -> NetworkNotFound:
        there_is = ", ".join(sorted(known)) or "none"
        return NetworkNotFound(
            f"networks: host {self.name} has no {what}; its {kind}: {there_is}",
            hint=hint,
            host=self.name,
            field="networks",
            given=what,
            allowed=sorted(known),
        )

    def _interfaces(self) -> set[str]:
        """The network interfaces of a host that is not this one, by all who know some.

        Neither source knows all of them everywhere: libvirt's interface driver, built with netcf, lists only
        configured ones; its device list misses later ones where no udevd runs.
        """
        found: set[str] = set()
        with suppress(UnsupportedByHost), self._trying_to("list the interfaces"):
            found |= {str(interface.name()) for interface in self._connection.listAllInterfaces()}
        with suppress(UnsupportedByHost), self._trying_to("list the network devices"):
            devices = self._connection.listAllDevices(libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_NET)
            found |= {parse(device.XMLDesc()).findtext("capability/interface", "") for device in devices}
        return found - {"", "lo"}

    def _is_local(self) -> bool:
        uri = urlsplit(self._uri)
        return uri.scheme in {"qemu", "qemu+unix"} and not uri.netloc

    # --- guests -------------------------------------------------------------------------------------------

    def guest(self, uuid: UUID | str) -> Guest:
        """The guest with that uuid. Raises InstanceNotFound."""
        with self._trying_to(f"find domain {uuid}"):
            return Guest(self._connection.lookupByUUIDString(str(uuid)), self.name)

    def find(self, name: str) -> Guest | None:
        """The guest whose domain has that name."""
        try:
            with self._trying_to(f"find domain {name}"):
                return Guest(self._connection.lookupByName(name), self.name)
        except InstanceNotFound:
            return None

    def find_uuid(self, uuid: UUID | str) -> Guest | None:
        """The guest with that uuid, if there is one."""
        try:
            return self.guest(uuid)
        except InstanceNotFound:
            return None

    def guests(self) -> list[Guest]:
        """All domains of the host, the fleet's and others, running or not."""
        with self._trying_to("list the domains"):
            return [Guest(domain, self.name) for domain in self._connection.listAllDomains()]

    def define(self, config: DomainConfig) -> Guest:
        """Define `config`, or define it anew when its uuid is there already.

        Raises FenceTooLow when a newer execution owns the domain, InstanceExists when another has the name.
        """
        self._require_turn(config.owner)
        return self.define_xml(domain_xml(config), name=config.name)

    def redefine(self, xml: str, config: DomainConfig, *, from_here: bool = False) -> Guest:
        """Define `xml`, a definition as `Guest.xml(inactive=True)` gave it, with the sizes and places of `config`.

        One that is `from_here`, from this libvirtd, holds nothing that it does not know.
        Raises FenceTooLow, InstanceExists, DomainRejected.
        """
        self._require_turn(config.owner)
        return self.define_xml(redefined(xml, config), name=config.name, validated=not from_here)

    def restore(self, xml: str, owner: Owner) -> Guest:
        """Define `xml` as it was, for `owner`. Raises FenceTooLow, InstanceExists, DomainRejected."""
        self._require_turn(owner)
        return self.define_xml(marked(xml, owner), name=owner.name)

    def _require_turn(self, owner: Owner) -> None:
        existing = self.find_uuid(owner.uuid)
        if existing is not None:
            existing.check_fence(owner)

    def define_xml(self, xml: str, *, name: str = "a domain", validated: bool = True) -> Guest:
        """Define from XML as `Guest.xml(inactive=True)` gave it. Raises DomainRejected."""
        # Without validation, which takes 15 ms, libvirt drops what it does not know, and says nothing.
        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE if validated else 0
        with self._trying_to(f"define {name}"):
            domain = self._connection.defineXMLFlags(xml, flags)
        return Guest(domain, self.name)
