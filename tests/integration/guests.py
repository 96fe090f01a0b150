"""A guest of a lab's host with data to copy, past the fleet."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tests.lab import LabHost
from worker.images import qemu_img
from worker.models import MIB, Disk, DomainConfig, Owner
from worker.virt.guest import Guest
from worker.virt.host import Host

SIZE = 256 * MIB
"""Of each disk: a copy of one is under way for long enough to be slowed down."""


@contextmanager
def connected(lab: LabHost) -> Iterator[Host]:
    """A connection to the host's libvirtd."""
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        yield host


@contextmanager
def full_guest(lab: LabHost) -> Iterator[Guest]:
    """A guest that runs, with two disks full of data."""
    uuid = uuid4()
    name = f"g-{uuid.hex[:8]}"
    config = DomainConfig(
        name=name,
        uuid=uuid,
        owner=Owner(name="g", uuid=uuid, operation="op", fence=1),
        vcpus=1,
        memory_mib=64,
        disks=tuple(_full_disk(lab, f"{name}-{target}", target) for target in ("vda", "vdb")),
        accel="qemu",
        emulator=Path("/usr/bin/qemu-system-x86_64"),
        console_log=lab.data / f"{name}.log",
    )
    try:
        with connected(lab) as host:
            guest = host.define(config)
            guest.start()
            yield guest
    finally:
        with connected(lab) as host:
            left = host.find_uuid(uuid)
            if left is not None:
                left.destroy()
                left.undefine()


def empty(lab: LabHost, name: str) -> Path:
    """An empty image of that size below the host's data directory."""
    path = lab.data / f"{name}.qcow2"
    qemu_img.create(path, "qcow2", SIZE)
    return path


def _full_disk(lab: LabHost, name: str, target: str) -> Disk:
    path = empty(lab, name)
    write = f"write -P {ord(target[-1])} 0 {SIZE}"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(path)], check=True, stdout=subprocess.DEVNULL)
    return Disk(role="ephemeral", target=target, path=path, format="qcow2", virtual_size=SIZE)
