"""A definition with new sizes or on a new host: what was asked for changes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from tests.unit.test_virt_domain_xml import EPHEMERAL, FULL, OVERLAY, SEED, UUID_
from worker.models import Owner
from worker.virt.domain_xml import domain_xml, marked, parse, parse_owner, redefined, with_cpu_of

LATER = Owner(name="web1", uuid=UUID_, operation="op-2", fence=9)


@pytest.fixture
def stored() -> str:
    """A definition as libvirt gives it back, with what it and other people have added."""
    xml = domain_xml(FULL)
    xml = xml.replace("<memory unit", "<currentMemory unit='KiB'>4194304</currentMemory><memory unit", 1)
    xml = xml.replace("</metadata>", "<other:note xmlns:other='urn:other'>mine</other:note></metadata>")
    for number, target in enumerate(("vda", "vdb", "vdc", "vdd")):
        pci = f"<address type='pci' domain='0x0000' bus='0x0{number + 1}' slot='0x00' function='0x0'/>"
        xml = xml.replace(f'<target dev="{target}" bus="virtio"/>', f'<target dev="{target}" bus="virtio"/>{pci}')
    return xml


def others(xml: str, *changed: str) -> str:
    """A definition without the parts that may change, however it is laid out."""
    domain = etree.fromstring(xml.encode(), etree.XMLParser(remove_blank_text=True))
    for path in changed:
        for element in domain.findall(path):
            element.getparent().remove(element)  # type: ignore[union-attr]
    return etree.tostring(domain, method="c14n").decode()


def test_only_sizes_disks_and_owner_change(stored: str) -> None:
    grown = FULL.model_copy(
        update={"vcpus": 8, "memory_mib": 8192, "disks": (OVERLAY, EPHEMERAL, SEED), "owner": LATER}
    )
    xml = redefined(stored, grown)
    changed = ("memory", "currentMemory", "vcpu", "cpu/topology", "devices/disk", "metadata/{*}instance")
    assert others(xml, *changed) == others(stored, *changed)
    domain = parse(xml)
    assert domain.findtext("memory") == "8192"
    assert domain.find("currentMemory") is None
    assert domain.findtext("vcpu") == "8"
    assert parse_owner(xml) == LATER
    assert [disk.find("target").get("dev") for disk in domain.iterfind("devices/disk")] == ["vda", "vdb", "vdd"]  # type: ignore[union-attr]
    assert [disk.find("address").get("bus") for disk in domain.iterfind("devices/disk")] == ["0x01", "0x02", "0x04"]  # type: ignore[union-attr]


def test_on_another_host_its_paths_are_that_hosts(stored: str) -> None:
    there = Path("/srv/fleet")
    moved = {
        "emulator": Path("/opt/qemu"),
        "console_log": there / "console.log",
        "disks": (OVERLAY.model_copy(update={"path": there / "root.qcow2", "backing": there / "base.raw"}),),
    }
    xml = redefined(stored, FULL.model_copy(update=moved))
    assert "/var/lib/virtfleet/" not in xml
    assert parse(xml).findtext("devices/emulator") == "/opt/qemu"
    assert 'machine="pc-q35-7.2"' in xml


def test_the_cpu_that_a_guest_runs_with_is_kept(stored: str) -> None:
    running = '<cpu mode="custom" match="exact"><model>Skylake</model><feature policy="require" name="aes"/></cpu>'
    pinned = with_cpu_of(stored, f"<domain>{running}</domain>")
    assert running in pinned
    assert "host-model" not in pinned
    assert others(pinned, "cpu") == others(stored, "cpu")


def test_a_mark_replaces_the_former_one_and_nothing_else(stored: str) -> None:
    xml = marked(stored, LATER)
    assert parse_owner(xml) == LATER
    assert others(xml, "metadata/{*}instance") == others(stored, "metadata/{*}instance")
