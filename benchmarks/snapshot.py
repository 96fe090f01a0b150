"""Live snapshots of 512 MiB, against the calls that OpenStack Nova makes for one, and against one qemu-img convert.

All of them find the host's page cache empty, as a guest with cache=none leaves it, and what they make is durable.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
from celery import Celery

from benchmarks.common import Result, interleaved, milliseconds, report, take_memory
from tests.lab import Fleet, guest_image, lab_folder

ROUNDS = 5
MIB_WRITTEN = 512
MIB_CHAINED = 2048
"""What the disk holds when increments are measured: of a smaller one, 1 % costs less than to freeze the guest."""
USER_DATA = f"""#!/bin/sh
tr '\\0' x </dev/zero | dd of=/dev/vda bs=1M seek=64 count={MIB_WRITTEN} iflag=fullblock conv=fsync
mkfs.ext4 -q /dev/vdb && mkdir /data && mount /dev/vdb /data
echo written
"""


def main() -> int:
    """One guest with an overlay of 512 MiB; all ways take its root disk in turns."""
    with lab_folder() as folder, Fleet(folder) as fleet:
        host = fleet.hosts["hosta"]
        image = host.images / "guest.qcow2"
        shutil.copy(guest_image(), image)
        client = Celery(broker=fleet.redis.url, backend=fleet.redis.url)

        def call(name: str, /, **arguments: object) -> dict[str, Any]:
            answer = client.send_task(f"virtfleet.{name}", kwargs=arguments, queue="virtfleet").get(timeout=600)
            if answer["state"] != "succeeded":
                raise SystemExit(f"{name} ended {answer['state']}: {answer['error']}")
            return dict(answer)

        shape = {"disk_gib": 3, "memory_mib": 256, "ephemeral_gib": [1], "user_data": USER_DATA}
        ready = {"wait_for": "console", "console_line": "written", "ready_timeout": 600}
        guest = call("spawn", name="bench", host="hosta", image=str(image), **shape, **ready)
        disk = host.data / "instances" / str(guest["uuid"]) / "root.qcow2"
        by_hand = ByHand(host.uri, disk, host.data / "hand")
        held: list[float] = []

        def ours(_: int, **wanted: object) -> float:
            taken: list[dict[str, Any]] = []
            take_memory(host.data / "scratch", 2 * MIB_WRITTEN)
            spent = milliseconds(lambda: taken.append(call("snapshot", instance="bench", disks=["vda"], **wanted)))
            manifest = host.data / "snapshots" / taken[0]["id"] / "manifest.json"
            held.append(1000 * json.loads(manifest.read_text())["held_seconds"])
            if not wanted:
                call("snapshot_delete", snapshot=taken[0]["id"])
            return spent

        def increment(number: int) -> float:
            by_hand.write(MIB_CHAINED // 100, seek=64 + 32 * number)
            return ours(number, incremental=True)

        fleet_ms, nova_ms, convert_ms = interleaved(ROUNDS, ours, by_hand.as_nova, by_hand.convert)
        by_hand.write(MIB_CHAINED - MIB_WRITTEN, seek=64 + MIB_WRITTEN)
        full_ms, increment_ms = interleaved(ROUNDS, lambda n: ours(n, incremental=True, full=True), increment)
        return report(
            [
                Result("live snapshot, against Nova's calls", fleet_ms, nova_ms, 0.4),
                Result("live snapshot, against one qemu-img convert", fleet_ms, convert_ms, 1.3),
                Result("the guest is held, median", statistics.median(held), 0.0, 250.0, unit="ms"),
                Result("incremental, 1 % of 2 GiB changed, against full", increment_ms, full_ms, 0.15),
            ]
        )


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file or folder for as long as the block runs."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class ByHand:
    """The same disk, copied with nothing of the fleet."""

    def __init__(self, uri: str, disk: Path, folder: Path) -> None:
        self.connection = libvirt.open(uri)
        self.domain = self.connection.lookupByName("bench")
        self.disk, self.folder = disk, folder
        folder.mkdir(mode=0o755)

    def as_nova(self, _: int) -> float:
        """What LibvirtDriver.snapshot() does live: undefine, blockRebase, poll, abort, define, convert."""
        delta, flat = self.folder / "delta.qcow2", self.folder / "nova.qcow2"
        info = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(self.disk)]))
        backing = ["-b", info["full-backing-filename"], "-F", "qcow2"]

        def calls() -> None:
            xml = self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
            create = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(delta), str(info["virtual-size"])]
            subprocess.run(create, check=True)
            shutil.chown(delta, "libvirt-qemu")
            self.domain.undefine()
            flags = libvirt.VIR_DOMAIN_BLOCK_REBASE_COPY | libvirt.VIR_DOMAIN_BLOCK_REBASE_REUSE_EXT
            self.domain.blockRebase("vda", str(delta), 0, flags | libvirt.VIR_DOMAIN_BLOCK_REBASE_SHALLOW)
            while "ready='yes'" not in self.domain.XMLDesc():
                time.sleep(0.5)
            self.domain.fsFreeze()  # as Nova does where the image's properties say that there is an agent
            self.domain.blockJobAbort("vda")
            self.connection.defineXML(xml)
            self.domain.fsThaw()
            convert = ["qemu-img", "convert", "-t", "none", "-O", "qcow2", "-f", "qcow2", str(delta), str(flat)]
            subprocess.run(convert, check=True)

        self.forget()
        take_memory(self.folder / "scratch", 2 * MIB_WRITTEN)
        spent = milliseconds(calls)
        delta.unlink()
        flat.unlink()
        return spent

    def convert(self, _: int) -> float:
        """One qemu-img convert of what the guest has written, made as durable as a snapshot is."""
        flat = self.folder / "flat.qcow2"

        def calls() -> None:
            convert = ["qemu-img", "convert", "-U", "-W", "-m", "8", "-f", "qcow2", "-O", "qcow2"]
            subprocess.run([*convert, str(self.disk), str(flat)], check=True)
            for path in (flat, self.folder):
                with opened(path) as descriptor:
                    os.fsync(descriptor)

        self.forget()
        take_memory(self.folder / "scratch", 2 * MIB_WRITTEN)
        spent = milliseconds(calls)
        flat.unlink()
        return spent

    def forget(self) -> None:
        """Drop the disk from the host's page cache, which the guest and so a snapshot of it do not use.

        An earlier convert has filled it, and would save all later ones the reading.
        """
        with opened(self.disk) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def write(self, mib: int, *, seek: int) -> None:
        """Have the guest change so much of its disk."""
        script = f"tr '\\0' y </dev/zero | dd of=/dev/vda bs=1M seek={seek} count={mib} iflag=fullblock conv=fsync"
        arguments = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = self._agent("guest-exec", **arguments)["pid"]
        while not self._agent("guest-exec-status", pid=pid)["exited"]:
            time.sleep(0.1)

    def _agent(self, command: str, **arguments: object) -> dict[str, Any]:
        request = json.dumps({"execute": command, "arguments": arguments})
        answer: dict[str, Any] = json.loads(libvirt_qemu.qemuAgentCommand(self.domain, request, 30, 0))["return"]
        return answer


if __name__ == "__main__":
    raise SystemExit(main())
