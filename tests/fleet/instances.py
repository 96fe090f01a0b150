"""Instances of a lab fleet, as a test sees them: through the command, through libvirt, and through their consoles."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import libvirt

from tests.fleet.parts import Scheduler
from tests.lab import Fleet, LabHost, guest_image, wait_until

MARK_AT = 64 * 1024**2
"""The guest's own data ends here: tests may write to its disk from this byte on."""

# At each boot the guest tells what it finds on its disks, and leaves a mark on each that has none.
TELL_AND_MARK = f"""#!/bin/sh
mark_at={MARK_AT // 1024**2}
echo "marks:" $(for disk in vda vdb; do dd if=/dev/$disk bs=1M skip=$mark_at count=1 2>/dev/null | head -c 12; done)
for disk in vda vdb; do
  [ ! -e /dev/$disk ] || printf 'mark-of-%s!' $disk | dd of=/dev/$disk bs=1M seek=$mark_at conv=notrunc 2>/dev/null
done
sync
for disk in vda vdb vdc; do
  [ ! -e /sys/block/$disk/size ] || echo "$disk: $(($(cat /sys/block/$disk/size) * 512)) bytes"
done
echo "cpus: $(grep -c ^processor /proc/cpuinfo)"
echo "told"
"""


@dataclass(frozen=True)
class Ran:
    """A command of the fleet, ended."""

    code: int
    record: dict[str, Any]


@dataclass
class Lab:
    """A fleet with an image on each host."""

    fleet: Fleet
    image: Path
    scheduler: Scheduler

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Ask for an operation as a scheduler does; its final record."""
        return self.scheduler.call(operation, **arguments)

    def done(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """The same for an operation that has to succeed."""
        record = self.call(operation, **arguments)
        assert record["state"] == "succeeded", json.dumps(record["error"], indent=1)
        return record

    def instances(self) -> dict[str, dict[str, Any]]:
        """What the registry has, by name."""
        with self.fleet.redis.client() as client:
            found = cast("dict[str, str]", client.hgetall("virtfleet:instances"))
        return {name: json.loads(entry) for name, entry in found.items()}

    def field(self, operation: str, name: str) -> str:
        """A field of an operation's record as Redis holds it; empty where there is none."""
        with self.fleet.redis.client() as client:
            return str(cast("str | None", client.hget(f"virtfleet:op:{operation}", name)) or "")

    def run(self, *arguments: str, timeout: float = 240) -> Ran:
        """Run `virtfleet ARGUMENTS --json`."""
        done = self.fleet.cli(*arguments, "--json", timeout=timeout)
        try:
            return Ran(done.returncode, json.loads(done.stdout))
        except ValueError:
            raise AssertionError(f"{arguments} said no JSON:\n{done.stdout}\n{done.stderr}") from None

    def succeed(self, *arguments: str, timeout: float = 240) -> dict[str, Any]:
        """Run a command that has to succeed; its record."""
        ran = self.run(*arguments, timeout=timeout)
        assert ran.code == 0, json.dumps(ran.record.get("error") or ran.record, indent=1)
        return ran.record

    def spawn(self, name: str, host: str, *options: str) -> str:
        """Spawn a guest that has told what it found, and marked its disks; its uuid."""
        script = self.fleet.folder / "user-data"
        script.write_text(TELL_AND_MARK)
        told = ("--wait-for", "console", "--console-line", "told", "--user-data", str(script))
        image = str(self.fleet.hosts[host].images / self.image.name)
        record = self.succeed("spawn", name, "--host", host, "--image", image, "--memory", "128", *told, *options)
        return str(record["uuid"])

    def folder(self, host: str, uuid: str) -> Path:
        """The instance's directory on a host."""
        return self.fleet.hosts[host].data / "instances" / uuid

    def boots(self, host: str, uuid: str) -> int:
        """How often the guest has told its tale on this host."""
        log = self.folder(host, uuid) / "console.log"
        return log.read_text(errors="replace").count("told") if log.exists() else 0

    def wait_told(self, host: str, uuid: str, times: int) -> str:
        """Wait until the guest has told `times` times; what it told last."""
        log = self.folder(host, uuid) / "console.log"
        wait_until(lambda: self.boots(host, uuid) >= times, 60, f"{uuid} tells what it finds", log)
        return log.read_text(errors="replace").rpartition("marks:")[2]


@contextmanager
def lab_of(
    folder: Path, *hosts: str, networked: bool = False, before: Callable[[Fleet], None] = lambda _: None
) -> Iterator[Lab]:
    """A fleet with the test's guest image on every host; `before` may change what is not up yet."""
    image, fleet = guest_image(), Fleet(folder, hosts, networked=networked)
    before(fleet)
    with fleet:
        for host in fleet.hosts.values():
            shutil.copy(image, host.images / image.name)
        yield Lab(fleet, image, Scheduler(fleet.redis.url))


@contextmanager
def domain(host: LabHost, name: str) -> Iterator[libvirt.virDomain]:
    """A domain as the host's libvirt has it."""
    with closing(libvirt.open(host.uri)) as connection:
        yield connection.lookupByName(name)


def domains(host: LabHost) -> dict[str, bool]:
    """The host's domains, and whether they run."""
    with closing(libvirt.open(host.uri)) as connection:
        return {one.name(): bool(one.isActive()) for one in connection.listAllDomains()}


def definition(host: LabHost, name: str) -> str:
    """What the domain will start with next."""
    with domain(host, name) as found:
        return str(found.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def virtual_sizes(folder: Path) -> dict[str, int]:
    names = [path for path in folder.iterdir() if path.suffix in (".qcow2", ".raw")]
    return {path.name: virtual_size(path) for path in names}


def virtual_size(path: Path) -> int:
    command = ["qemu-img", "info", "-U", "--output=json", "-f", path.suffix.removeprefix("."), str(path)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return int(answer["virtual-size"])
