"""Spawn, end to end through a bare Celery client, against its own raw libvirt and qemu-img calls by hand."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

import libvirt
from celery import Celery

from benchmarks.common import Result, interleaved, milliseconds, report
from tests.lab import Fleet, guest_image, lab_folder

ROUNDS = 9
TARGET = 1.3


def main() -> int:
    """Spawn one guest after the other both ways; each is destroyed before the next, so none boots beside it."""
    with lab_folder() as folder, Fleet(folder) as fleet:
        host = fleet.hosts["hosta"]
        image = host.images / "guest.qcow2"
        shutil.copy(guest_image(), image)
        client = Celery(broker=fleet.redis.url, backend=fleet.redis.url)

        def call(name: str, /, **arguments: object) -> dict[str, object]:
            answer = client.send_task(f"virtfleet.{name}", kwargs=arguments, queue="virtfleet").get(timeout=120)
            if answer["state"] != "succeeded":
                raise SystemExit(f"{name} ended {answer['state']}: {answer['error']}")
            return dict(answer)

        def spawn(name: str) -> dict[str, object]:
            return call("spawn", name=name, host="hosta", image=str(image), disk_gib=1, memory_mib=64)

        first = spawn("template")  # brings the image into the cache, as it is for every later spawn
        by_hand = ByHand(host.uri, host.data, str(first["uuid"]), folder)
        call("power_off", instance="template", timeout=0)

        def ours(number: int) -> float:
            taken = milliseconds(lambda: spawn(f"bench{number}"))
            call("destroy", instance=f"bench{number}")
            return taken

        fleet_ms, raw_ms = interleaved(ROUNDS, ours, by_hand.spawn)
        return report([Result("spawn, end to end", fleet_ms, raw_ms, TARGET)])


class ByHand:
    """The calls that a spawn cannot do without, with nothing between them."""

    def __init__(self, uri: str, data: Path, template: str, folder: Path) -> None:
        self.connection = libvirt.open(uri)
        self.folder = folder
        self.template = data / "instances" / template
        self.base = next((data / "images").glob("*.qcow2"))
        self.xml = self.connection.lookupByUUIDString(template).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def spawn(self, number: int) -> float:
        """Make an overlay, define, start; milliseconds. The seed is not counted: nobody writes one by hand."""
        place = self.folder / f"hand{number}"
        place.mkdir(mode=0o755)
        shutil.copy(self.template / "seed.iso", place)
        xml = self.xml.replace(str(self.template), str(place)).replace(self.template.name, str(uuid.uuid4()))
        xml = xml.replace("<name>template<", f"<name>hand{number}<")
        disk = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(self.base), "-F", "qcow2"]
        domains: list[libvirt.virDomain] = []

        def calls() -> None:
            subprocess.run([*disk, str(place / "root.qcow2"), "1G"], check=True)
            domains.append(self.connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE))
            domains[0].create()

        taken = milliseconds(calls)
        domains[0].destroy()
        domains[0].undefine()
        return taken


if __name__ == "__main__":
    raise SystemExit(main())
