"""A guest whose disk has no room left stands still until its snapshot has given way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.lab import LabHost, lab_folder, wait_until
from worker.compute.snapshots.jobs import give_way
from worker.images import qemu_img
from worker.images.layout import SnapshotDir
from worker.models import MIB, Disk, DomainConfig, Owner, PowerState
from worker.virt.host import Host
from worker.virt.jobs import BackupJob, BlockTarget

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")

CLUSTERS = 64
"""Of 64 KiB, 4 MiB in all: what the guest writes."""

DISK = 256 * MIB
"""Large enough that a copy of it can be slowed down before it has ended."""

# At 0x7c00: `again: mov si, packet; mov ah, 43h; mov dl, 80h; int 13h; add word [packet+8], 128; dec word [left];
# jnz again; hlt: hlt; jmp hlt`: writes a sector to each cluster through the BIOS. The packet lies at 0x7c40.
WRITING_MBR = bytes.fromhex("be407c b80043 b280 cd13 8106487c8000 ff0e507c 75ea f4 ebfd")
PACKET = bytes.fromhex("1000 0100 007c 0000") + (128).to_bytes(8, "little")
BOOT = (WRITING_MBR.ljust(0x40, b"\0") + PACKET + CLUSTERS.to_bytes(2, "little")).ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture
def host() -> Iterator[LabHost]:
    """A host whose data directory holds 288 MiB."""
    with lab_folder() as folder:
        host = LabHost("small", folder)
        host.data.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=288m,mode=755", "tmpfs", str(host.data)], check=True)
        try:
            host.up()
            yield host
        finally:
            host.crash()
            subprocess.run(["umount", str(host.data)], check=True)
            host.down()


@pytest.mark.parametrize("while_copied", [False, True])
def test_a_guest_that_a_full_disk_stopped_goes_on(host: LabHost, *, while_copied: bool) -> None:
    disk, folder = host.data / "root.qcow2", SnapshotDir(host.data / "unfinished").create()
    boot = host.folder / "boot"
    boot.write_bytes(BOOT.ljust(5 * MIB, b"\0") + b"v" * (DISK - 5 * MIB))  # what there is to copy, slowly
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(boot), str(disk)], check=True)
    taken = folder.taken("vda")
    taken.symlink_to(host.folder / "taken")  # it has room: else the copy might end before the guest stands still
    qemu_img.create(taken, "qcow2", DISK)
    folder.disk("vdb", "qcow2").write_bytes(bytes(8 * MIB))
    folder.intent.write_text("{}")
    with Host.open(host.uri, name="small", timeout=10) as libvirtd:
        guest = libvirtd.define(_config(host, disk))
        try:
            guest.start(paused=True)
            job = BackupJob(guest)
            if while_copied:
                job.begin([BlockTarget("vda", taken, "qcow2")])
                job.limit({"vda": MIB})
            _fill(host.data / "others", leave=MIB)
            guest.resume()
            wait_until(guest.is_stopped_by_io_error, 30, "the guest has filled its disk")
            assert (job.progress() is not None) == while_copied
            give_way(guest, folder)
            assert guest.power() is PowerState.RUNNING
            assert job.progress() is None
            assert [*folder.path.iterdir()] == [folder.intent]  # what is still done to the guest must be known
            wait_until(lambda: _sectors(disk) == CLUSTERS, 30, "the guest has written everything")
            give_way(guest, folder)
            assert guest.power() is PowerState.RUNNING
        finally:
            guest.destroy()
            guest.undefine()


def _fill(path: Path, *, leave: int) -> None:
    found = os.statvfs(path.parent)
    path.write_bytes(bytes(found.f_bavail * found.f_frsize - leave))


def _sectors(disk: Path) -> int:
    """How many clusters hold the guest's sector."""
    raw = disk.parents[1] / "root.raw"
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(disk), str(raw)], check=True)
    content = raw.read_bytes()[: (CLUSTERS + 1) * 65536]
    return sum(content[at + 510 : at + 512] == b"\x55\xaa" for at in range(65536, len(content), 65536))


def _config(host: LabHost, disk: Path) -> DomainConfig:
    uuid = uuid4()
    return DomainConfig(
        name="full",
        uuid=uuid,
        owner=Owner(name="full", uuid=uuid, operation="op-1", fence=1),
        vcpus=1,
        memory_mib=64,
        disks=(Disk(role="root", target="vda", path=disk, format="qcow2", virtual_size=DISK),),
        accel="qemu",
        emulator=Path("/usr/bin/qemu-system-x86_64"),
        console_log=host.folder / "console.log",
        disk_cache="writeback",
    )
