"""Spawn: the guest that was asked for runs, the host's definition of it is sound, and the base image stays as it is."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest
from lxml import etree

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Page, Record, Scheduler, WebServer, domains, image_info, libvirt_of, virsh
from tests.lab import LabHost, wait_until
from worker.models import GIB, MIB

DOMAIN_SCHEMA = "/usr/share/libvirt/schemas/domain.rng"
READY = "virtfleet-guest ready"
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJfNN0dCVCx9T9f0Yq1jGx3kq7o5mB0fJm3X8Wj0Zk0a somebody@example"
USER_DATA = """#!/bin/sh
echo "user-data: hostname $(hostname)"
for disk in vda vdb vdc; do echo "user-data: $disk $(($(cat /sys/block/$disk/size) * 512))"; done
echo "user-data: keys $(cat /root/.ssh/authorized_keys)"
echo "user-data: done"
"""


def folder_of(host: LabHost, record: Record) -> Path:
    return host.data / "instances" / str(record["uuid"])


def console(host: LabHost, record: Record) -> str:
    return (folder_of(host, record) / "console.log").read_text(errors="replace")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached_image(host: LabHost, image: Path) -> Path:
    return host.data / "images" / f"{sha256(image)}.qcow2"


def test_the_guest_gets_all_that_was_asked_for(host: LabHost, spawn: Spawn, real: Path, name: str) -> None:
    record = spawn(
        name=name,
        image=str(real),
        sha256=sha256(real),
        vcpus=2,
        memory_mib=160,
        disk_gib=1,
        ephemeral_gib=[2],
        swap_mib=32,
        hostname="web-1",
        ssh_keys=[SSH_KEY],
        user_data=USER_DATA,
        wait_for="agent",
    )
    assert record["state"] == "succeeded", record["error"]
    assert record["result"]["power"] == "running"
    assert record["result"]["name"] == name

    wait_until(lambda: "user-data: done" in console(host, record), 30, "the user-data has run", host.folder)
    seen = [line.strip() for line in console(host, record).splitlines()]
    assert "user-data: hostname web-1" in seen
    assert f"user-data: vda {GIB}" in seen
    assert f"user-data: vdb {2 * GIB}" in seen
    assert f"user-data: vdc {32 * MIB}" in seen
    assert f"user-data: keys {SSH_KEY}" in seen
    assert "virtfleet-guest swap on: /dev/vdc" in seen

    with libvirt_of(host) as connection:
        domain = connection.lookupByName(name)
        assert "return" in libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-ping"}', 5, 0)
        assert domain.UUIDString() == record["uuid"]
        assert domain.isPersistent()
        assert domain.info()[1] == 160 * 1024
        assert domain.maxVcpus() == 2
        assert_sound(domain, record)

    root = image_info(folder_of(host, record) / "root.qcow2")
    assert root["virtual-size"] == GIB
    assert root["backing-filename"] == str(cached_image(host, real))
    assert root["backing-filename-format"] == "qcow2"


def assert_sound(domain: libvirt.virDomain, record: Record) -> None:
    """The definition validates, bears the owner's mark, and names every format."""
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        xml = domain.XMLDesc(flags)
        tree = etree.fromstring(xml)
        etree.RelaxNG(etree.parse(DOMAIN_SCHEMA)).assertValid(tree)
        [mark] = tree.iterfind("./metadata/{urn:virtfleet:instance:1}instance")
        assert mark.get("name") == record["instance"]
        assert mark.get("uuid") == record["uuid"]
        assert mark.get("operation") == record["id"]
        assert int(str(mark.get("fence"))) > 0
        assert all(driver.get("type") in {"qcow2", "raw"} for driver in tree.iterfind("./devices/disk/driver"))
        assert tree.find("./devices/disk/backingStore/format[@type='qcow2']") is not None


@pytest.mark.parametrize(("kind", "fmt"), [("copy", "qcow2"), ("raw", "raw")])
def test_a_root_disk_of_its_own_boots_and_needs_no_base(
    host: LabHost, spawn: Spawn, real: Path, kind: str, fmt: str
) -> None:
    record = spawn(image=str(real), root_disk=kind, disk_gib=1, memory_mib=128, wait_for="console", console_line=READY)
    assert record["state"] == "succeeded", record["error"]
    root = image_info(folder_of(host, record) / f"root.{fmt}")
    assert (root["format"], root["virtual-size"], root.get("backing-filename")) == (fmt, GIB, None)
    assert f"virtfleet-guest root disk: {GIB} bytes" in console(host, record)


def test_guests_leave_the_base_image_as_it_was(host: LabHost, spawn: Spawn, real: Path) -> None:
    """A guest writes to its disk, is stopped, and the base that others share is untouched and still root's."""
    script = "#!/bin/sh\ndd if=/dev/urandom of=/dev/vda bs=1M seek=64 count=4 conv=fsync && echo user-data: wrote\n"
    record = spawn(
        image=str(real), memory_mib=128, user_data=script, wait_for="console", console_line="user-data: wrote"
    )
    assert record["state"] == "succeeded", record["error"]
    base = cached_image(host, real)
    assert_untouched(base, real)
    virsh(host, "destroy", record["instance"])  # libvirt may give files back to an owner it remembers
    assert_untouched(base, real)


def assert_untouched(base: Path, image: Path) -> None:
    found = base.stat()
    assert (oct(found.st_mode & 0o777), found.st_uid, found.st_gid) == ("0o444", os.geteuid(), os.getegid())
    assert sha256(base) == sha256(image)


def test_twenty_spawns_of_one_image_fetch_it_once_and_all_run(
    host: LabHost, scheduler: Scheduler, web: WebServer, idle: Path
) -> None:
    page = Page(idle.read_bytes() + b"\0" * 65536, pause=0.1)
    address = web.put("/twenty.qcow2", page)
    names = [f"twenty-{number}" for number in range(20)]
    before = set((host.data / "images").glob("*.qcow2"))
    sent = [scheduler.send("spawn", name=name, host="hosta", image=address, memory_mib=32) for name in names]
    records = [one.get(timeout=120) for one in sent]
    try:
        assert [record["state"] for record in records] == ["succeeded"] * 20, records
        assert page.answers.count(200) == 1
        assert len(set((host.data / "images").glob("*.qcow2")) - before) == 1
        assert domains(host) == dict.fromkeys(names, True)
    finally:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda name: scheduler.call("destroy", instance=name), names))


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge of the machine, and the device that taps are made with, which containers lack."""
    name, tun = f"vf{os.getpid()}", Path("/dev/net/tun")
    with ExitStack() as stack:
        if not tun.exists():
            tun.parent.mkdir(exist_ok=True)
            os.mknod(tun, 0o600 | stat.S_IFCHR, os.makedev(10, 200))  # Linux' Documentation/networking/tuntap.rst
            stack.callback(tun.unlink)
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
        stack.callback(subprocess.run, ["ip", "link", "delete", name], check=True)
        yield name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a bridge")
def test_a_guest_is_attached_to_its_bridge(host: LabHost, spawn: Spawn, bridge: str) -> None:
    record = spawn(networks=[f"bridge:{bridge}", "none"])
    assert record["state"] == "succeeded", record["error"]
    [attached] = virsh(host, "domiflist", record["instance"]).splitlines()
    assert attached.split()[1:4] == ["bridge", bridge, "virtio"]
