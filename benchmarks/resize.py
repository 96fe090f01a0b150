"""A resize on the same host, end to end through a bare Celery client, against its own libvirt and qemu-img calls."""

from __future__ import annotations

import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

import libvirt
from celery import Celery

from benchmarks.common import Result, interleaved, milliseconds, report
from tests.lab import Fleet, guest_image, lab_folder

ROUNDS = 5
TARGET = 1.25
READY = {"wait_for": "console", "console_line": "virtfleet-guest ready"}


def main() -> int:
    """Shut a guest down, give it a GiB and other memory, start it; the fleet's guest and a second one by hand."""
    with lab_folder() as folder, Fleet(folder) as fleet:
        host = fleet.hosts["hosta"]
        image = host.images / "guest.qcow2"
        shutil.copy(guest_image(), image)
        client = Celery(broker=fleet.redis.url, backend=fleet.redis.url)

        def call(name: str, /, **arguments: object) -> dict[str, object]:
            answer = client.send_task(f"virtfleet.{name}", kwargs=arguments, queue="virtfleet").get(timeout=240)
            if answer["state"] != "succeeded":
                raise SystemExit(f"{name} ended {answer['state']}: {answer['error']}")
            return dict(answer)

        logs: dict[str, Path] = {}
        for name in ("ours", "by-hand"):
            sizes = {"disk_gib": 1, "memory_mib": 128}
            made = call("spawn", name=name, host="hosta", image=str(image), **sizes, **READY)
            logs[name] = host.data / "instances" / str(made["uuid"]) / "console.log"
        sizes_of = {name: count(2) for name in logs}

        def ours(number: int) -> float:
            gib, memory = next(sizes_of["ours"]), 128 + number % 2
            taken = milliseconds(lambda: call("resize", instance="ours", disk_gib=gib, memory_mib=memory))
            wait_ready(logs["ours"], number)
            return taken

        by_hand = ByHand(host.uri, logs["by-hand"].parent / "root.qcow2")

        def raw(number: int) -> float:
            taken = by_hand.resize(next(sizes_of["by-hand"]), 128 + number % 2)
            wait_ready(logs["by-hand"], number)
            return taken

        fleet_ms, raw_ms = interleaved(ROUNDS, ours, raw)
        return report([Result("resize on the same host, end to end", fleet_ms, raw_ms, TARGET)])


def wait_ready(log: Path, number: int) -> None:
    """Wait until the guest has booted again: one that still boots hears no power button."""
    while log.read_text(errors="replace").count(READY["console_line"]) < number + 2:
        time.sleep(0.1)


class ByHand:
    """The calls that a resize cannot do without, with nothing between them but looking whether the guest is off."""

    def __init__(self, uri: str, disk: Path) -> None:
        self.domain = libvirt.open(uri).lookupByName("by-hand")
        self.disk = disk

    def resize(self, gib: int, memory_mib: int) -> float:
        """Shut down, grow, define anew, start; milliseconds."""
        return milliseconds(lambda: self._resize(gib, memory_mib))

    def _resize(self, gib: int, memory_mib: int) -> None:
        self.domain.shutdown()
        while self.domain.isActive():
            time.sleep(0.01)
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(self.disk), f"{gib}G"], check=True)
        self.domain.setMemoryFlags(memory_mib * 1024, libvirt.VIR_DOMAIN_AFFECT_CONFIG | libvirt.VIR_DOMAIN_MEM_MAXIMUM)
        self.domain.setMemoryFlags(memory_mib * 1024, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        self.domain.create()


if __name__ == "__main__":
    raise SystemExit(main())
