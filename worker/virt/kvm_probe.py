"""Whether guests really run under KVM on a host: only one that booted tells.

/dev/kvm can be there, open, and be announced by libvirt, while every guest hangs (nested virtualisation).
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import libvirt
from lxml import etree

from worker.errors import Permanent
from worker.virt.domain_xml import E, cpu_xml
from worker.virt.faults import translated
from worker.virt.guest import Guest
from worker.virt.host import MACHINE, Host

PREFIX = "virtfleet-probe-"

# What SeaBIOS loads and jumps to. On q35 it puts the ACPI registers at 0x600, so PM1a_CNT is at 0x604;
# SLP_EN (bit 13) with sleep type 0 written there is S5, soft off, in QEMU (hw/acpi/core.c).
_POWER_OFF = bytes.fromhex(
    "ba0406"  # mov dx, 0x604
    "b80020"  # mov ax, 0x2000
    "ef"  # out dx, ax
    "f4"  # hlt
    "ebfd"  # jmp to the hlt
)
BOOT_SECTOR = _POWER_OFF.ljust(510, b"\0") + b"\x55\xaa"
DISK_BYTES = 1024**2  # sparse; SeaBIOS does not boot from a disk of one sector


@dataclass(frozen=True)
class Probe:
    """What a probe found: `reason` says it for people, `seconds` is how long it took."""

    works: bool
    reason: str
    seconds: float


def kvm_works(host: Host, folder: Path, timeout: float = 10.0, *, accel: Literal["kvm", "qemu"] = "kvm") -> Probe:
    """Boot a guest that powers itself off at once, and see whether it does within `timeout` seconds.

    `folder` is on the host and open to QEMU's user; nothing stays in it, nor any domain. Retryable errors,
    such as HostUnreachable, say nothing about KVM and are raised; so is OSError when `folder` cannot be used.
    """
    began = time.monotonic()
    try:
        with _boot_disk(folder) as disk:
            works, reason = _boots(host, disk, timeout, accel)
    except Permanent as error:
        works, reason = False, error.message
    return Probe(works, reason, time.monotonic() - began)


@contextmanager
def _boot_disk(folder: Path) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX, suffix=".raw") as file:
        file.write(BOOT_SECTOR)
        file.truncate(DISK_BYTES)
        file.flush()
        path = Path(file.name)
        path.chmod(0o444)
        yield path


def _boots(host: Host, disk: Path, timeout: float, accel: str) -> tuple[bool, str]:
    domain = _paused_domain(host, disk, accel)
    guest = Guest(domain, host.name)
    try:
        with _stops_of(domain, host) as stops:
            with suppress(Permanent):  # it may be off before libvirt has looked at it again: its stop tells
                guest.resume()
            why = stops.get(timeout=timeout)
    except queue.Empty:
        return False, f"a test guest under {accel} did not power itself off within {timeout:g} s"
    finally:
        guest.destroy()
    if why != libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
        return False, f"QEMU under {accel} ended before its test guest powered itself off (stop reason {why})"
    return True, f"a test guest under {accel} booted and powered itself off"


def _paused_domain(host: Host, disk: Path, accel: str) -> libvirt.virDomain:
    name = f"{PREFIX}{uuid4().hex}"
    # Paused, since libvirt takes a guest that is off before its start has returned for one that failed to start.
    # Should this process die, libvirtd ends the guest with the connection.
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY | libvirt.VIR_DOMAIN_START_VALIDATE
    with translated(f"start {name}", host.name):
        return host.connection.createXML(_probe_xml(name, disk, accel), flags)


@contextmanager
def _stops_of(domain: libvirt.virDomain, host: Host) -> Iterator[queue.SimpleQueue[int]]:
    """Why the domain stopped, once it has: a transient one leaves no state to read the reason from."""
    stops: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_event(_conn: object, _domain: object, event: int, detail: int, _opaque: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            stops.put(detail)

    doing = f"watch {domain.name()}"
    with translated(doing, host.name):
        watch = host.connection.domainEventRegisterAny(domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_event, None)
    try:
        yield stops
    finally:
        with translated(doing, host.name):
            host.connection.domainEventDeregisterAny(watch)


def _probe_xml(name: str, disk: Path, accel: str) -> str:
    domain = E.domain(
        E.name(name),
        E.memory("32", unit="MiB"),
        E.vcpu("1"),
        E.os(E.type("hvm", arch="x86_64", machine=MACHINE)),
        E.features(E.acpi(), E.apic()),
        cpu_xml(accel),
        E.devices(
            E.disk(
                E.driver(name="qemu", type="raw"),
                E.source(E.seclabel(model="dac", relabel="no"), file=str(disk)),
                E.backingStore(),
                E.target(dev="vda", bus="virtio"),
                E.readonly(),
                type="file",
                device="disk",
            ),
            E.controller(type="usb", model="none"),
            E.video(E.model(type="none")),
            E.memballoon(model="none"),
        ),
        type=accel,
    )
    return etree.tostring(domain, encoding="unicode")
