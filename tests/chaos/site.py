"""Where a round is played: a fleet of two hosts with its supervisor, the guest that lives through all rounds, and a
client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar, cast
from uuid import uuid4

import libvirt
import libvirt_qemu
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from tests.chaos import scenarios
from tests.chaos.scenarios import Ground, Scenario, Whereabouts
from tests.conftest import settings
from tests.lab import Fleet, LabError, LabHost, guest_image, wait_until
from tests.lab.fleet import KINDS, WorkerKind
from tests.lab.process import Process, running
from worker.app import SHARED_QUEUE, app
from worker.client import Fleet as Client
from worker.context import Alone
from worker.engine.kinds import kind_of
from worker.engine.record import Record, State
from worker.errors import BrokerUnavailable
from worker.images import snapshots
from worker.images.checksum import checksum_of
from worker.images.layout import DataDir
from worker.models import Instance, PowerState, Snapshot
from worker.virt.host import Host

T = TypeVar("T")

HOME, AWAY = "chaos", "chaosb"
HOSTS = (HOME, AWAY) if os.geteuid() == 0 else (HOME,)
"""Only root can lay a cable between hosts. All rounds but those of operations on two hosts take place at home."""

PET = "pet"
RESTART_SEC = 1.0
"""A supervisor, as systemd, starts an ended worker again after so long."""

MIB = 1024**2
DATA_SIZES = {HOME: "768m", AWAY: "256m"}
IMAGE_SIZE = 48 * MIB
"""As large as copying it takes long enough to be disturbed."""

ENVIRONMENT = {
    "reaper_interval": 0.3,
    "publish_grace": 1.5,
    "heartbeat_interval": 1,
    "stop_grace": 2,
    "reserve_bytes": 8 * MIB,
}
"""Everything that waits waits shorter, so that a round takes seconds."""

Contents = dict[str, str]
"""By file name, a digest of what a disk holds."""

SCRIBBLES = {HOME: 0x5A, AWAY: 0xA5}
SCRIBBLE_AT, SCRIBBLE_BYTES = 16 * MIB, 2 * MIB
"""What a guest that moves writes to its disks, by the host it is on, and where."""

BOOTING = "virtfleet-guest booting"
MARKED = "chaos disks marked"
COUNTER = 80 * MIB // 512
"""Where on both disks the guest counts what it writes, in sectors."""

# A marker is written once and never again: one that was lost would be seen as another one.
USER_DATA = f"""#!/bin/sh
mark() {{
  case "$(dd if=/dev/$1 bs=512 skip=$2 count=1 2>/dev/null)" in marker*) return ;; esac
  printf 'marker %s' "$(cat /proc/sys/kernel/random/uuid)" | dd of=/dev/$1 bs=512 seek=$2 conv=notrunc,fsync
}}
mark vda {64 * MIB // 512}
mark vdb 0
mkdir /data
blkid /dev/vdc >/dev/null || mkfs.ext4 -q -O ^has_journal /dev/vdc
mount /dev/vdc /data
# Writes all the time, to two disks in turn; a snapshot shows both within one write. Nowhere new: on a full disk that
# would pause the guest for good. Nor does its file system when it is frozen, as it has no journal.
(n=0; while :; do
  n=$((n + 1))
  for disk in vda vdb; do
    printf '%016d' $n | dd of=/dev/$disk bs=512 seek={COUNTER} conv=notrunc,fsync 2>/dev/null
  done
  sleep 0.05
done) &
echo "{MARKED}"
"""

# cli; hlt; jmp to the hlt: a guest that boots in no time and costs none. Then one partition, and the signature.
HALTING_MBR = bytes.fromhex("faf4ebfd").ljust(446, b"\0") + bytes.fromhex("80000200830000000100000001000000")
HALTING_MBR = HALTING_MBR.ljust(510, b"\0") + b"\x55\xaa"

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.OFF,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
}


class Supervisor(threading.Thread):
    """Starts workers again that have ended, and remembers when which process ended (monotonic seconds)."""

    def __init__(self, workers: Collection[Process]) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.deaths: dict[int, float] = {}
        self._unexpected = 0
        self._workers = workers
        self._expected: set[int] = set()
        self._pooled: set[int] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            for worker in self._workers:
                if not worker.alive:
                    self._again(worker)
            self._look_at_pools()

    def _look_at_pools(self) -> None:
        """A process of a pool may die by itself, as libvirt's client can crash: its worker has another one then."""
        pools = [worker for worker in self._workers if "disk" in worker.argv and worker.alive]
        for child in self._pooled:
            if not running(child) and child not in {*self.deaths, *self._expected}:
                self._unexpected += 1
                self.died(child)
        self._pooled = {child for worker in pools for child in worker.children()}

    def stop(self) -> None:
        self._ended.set()
        self.join(10)

    def expect(self, *pids: int) -> None:
        """These processes are about to be killed."""
        self._expected.update(pids)

    def died(self, *pids: int) -> None:
        """These processes run no more."""
        self.deaths.update(dict.fromkeys(pids, time.monotonic()))

    def unexpected(self) -> int:
        """How many workers have ended by themselves since this was asked last."""
        count, self._unexpected = self._unexpected, 0
        return count

    def _again(self, worker: Process) -> None:
        if worker.pid not in self._expected:
            self._unexpected += 1
            self.died(worker.pid)
        if not self._ended.wait(RESTART_SEC):
            worker.start()


class Site:
    """A context manager that brings all of it up and down. `relief` is what a round must take back afterwards."""

    def __init__(self, folder: Path, freeze_seconds: float, lease_ttl: float) -> None:
        self.folder = folder
        self.freeze_seconds = freeze_seconds
        self.lease_ttl = lease_ttl
        self.fleet = Fleet(folder, HOSTS, networked=AWAY in HOSTS)
        self.hosts = self.fleet.hosts
        self.home: LabHost = self.hosts[HOME]
        self.relief = ExitStack()
        self.markers: dict[str, bytes] = {}
        self.usual: dict[str, dict[str, float]] = {}
        self.kept = ""
        self.contents: dict[str, Contents] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(settings(**ENVIRONMENT, lease_ttl=self.lease_ttl, redis_url=self.fleet.redis.url))
            # Before the hosts boot, whose mounts are a copy; away before their folders are removed.
            mounted = [host.data for host in self.hosts.values() if _mount_small_disk(host.data, DATA_SIZES[host.name])]
            self._stack.enter_context(self.fleet)
            for folder in mounted:
                self._stack.callback(_unmount, folder)
            self.client = Client()
            self.workers: dict[tuple[str, WorkerKind], Process] = {
                (host, kind): self.fleet.worker(host, kind) for host in self.hosts for kind in KINDS
            }
            self.supervisor = Supervisor(self.workers.values())
            self.supervisor.start()
            self._stack.callback(self.supervisor.stop)
            self._lay_out_images()
            self._spawn_pet()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- guests ---------------------------------------------------------------------------------------------------

    def ground(self, instance: str) -> Ground:
        images = self.home.images
        return Ground(HOME, instance, str(images / "blank.raw"), str(images / "guest.qcow2"), self.kept, AWAY)

    def fresh_image(self) -> None:
        """Give the blank image another content, so that it has to be fetched."""
        (self.home.images / "blank.raw").write_bytes(HALTING_MBR + os.urandom(IMAGE_SIZE - len(HALTING_MBR)))

    def drop_images(self) -> None:
        """Take out of the hosts' caches what only this round used."""
        for host in self.hosts.values():
            for image in host.data.glob("images/*.raw"):
                image.unlink()
                image.with_suffix(".json").unlink(missing_ok=True)

    def domains(self, host: str = HOME) -> dict[str, PowerState]:
        """All domains of a host by name, asked from libvirt itself."""
        with self._connected(host) as connection:
            return _asked(connection.listAllDomains(), lambda domain: _STATES[domain.state()[0]])

    def power(self, instance: str, host: str = HOME) -> PowerState:
        return self.domains(host).get(instance, PowerState.MISSING)

    def transient(self, host: str) -> list[str]:
        with self._connected(host) as connection:
            kept = _asked(connection.listAllDomains(), libvirt.virDomain.isPersistent)
            return [name for name, persistent in kept.items() if not persistent]

    def jobs(self, host: str) -> list[str]:
        """Jobs of guests that run: of the domain or of one of its disks."""
        with self._connected(host) as connection:
            active = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            jobs = _asked(active, lambda domain: domain.jobInfo()[0])
            return [name for name, job in jobs.items() if job != libvirt.VIR_DOMAIN_JOB_NONE] + [
                f"{domain.name()}: {disk}" for domain in active for disk in ("vda", "vdb") if _block_job(domain, disk)
            ]

    def end_lost_backups(self) -> int:
        """Do what operators are told when libvirt holds a guest in a backup that it knows nothing of; how many were.

        libvirt 9.0 that is killed within some 50 ms of being asked for one comes back so, whoever asked.
        """
        remedies = []
        for name, lab in self.hosts.items():
            with Host.open(lab.uri, name=name, timeout=10) as host:
                held = [guest for guest in host.guests() if guest.has_lost_job()]
                remedies += [(lab, guest.lost_job_remedy()) for guest in held]
        for lab, remedy in remedies:
            lab.follow(remedy)
        return len(remedies)

    def spawn_victim(self, name: str, scenario: Scenario) -> None:
        """Have a guest for this round, by undisturbed operations; for one on two hosts, where it begins."""
        spawn = scenarios.BY_NAME["spawn"]
        self.run(spawn.task, **{**spawn.request(self.ground(name)), "root_disk": scenario.root_disk})
        if scenario.journey:
            self._set_out(name, scenario.journey.before)

    def _set_out(self, name: str, where: Whereabouts) -> None:
        """Bring the guest there; each host's copy of it, if there are two, has another content."""
        self.contents[HOME] = self.contents[AWAY] = self._scribbled(name, HOME)
        if where is Whereabouts.MOVED:
            self.run("virtfleet.migrate", instance=name, to=AWAY, timeout=0)
            self.contents[AWAY] = self._scribbled(name, AWAY)

    def _scribbled(self, name: str, host: str) -> Contents:
        """Put data on all disks of a guest that runs, as if it had written there itself; what they hold then."""
        before = self.read_contents(name, host)
        with self._connected(host) as connection:
            domain = connection.lookupByName(name)
            for disk in _writable_disks(domain):
                write = f'qemu-io -d {disk} "write -f -P {SCRIBBLES[host]} {SCRIBBLE_AT} {SCRIBBLE_BYTES}"'
                said = libvirt_qemu.qemuMonitorCommand(domain, write, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
                if said:
                    raise LabError(f"{name} cannot write to its disk {disk}: {said}")
        after = self.read_contents(name, host)
        if any(after[disk] == before[disk] for disk in before):
            raise LabError(f"{name} has not written to its disks: they hold {after}")
        return after

    def read_contents(self, name: str, host: str) -> Contents:
        """What a host's copy of an instance holds, set aside or not: a digest of each disk's beginning."""
        uuid, data = str(self.known(name).uuid), DataDir(self.hosts[host].data)
        folder = next((one.path for one in (data.instance(uuid), data.aside(uuid)) if one.spec.exists()), None)
        disks = sorted([*folder.glob("root.*"), *folder.glob("ephemeral*.qcow2")]) if folder else []
        return {disk.name: hashlib.sha256(_extent(disk, 0, IMAGE_SIZE, self.folder)).hexdigest() for disk in disks}

    def bring(self, instance: str, wanted: PowerState) -> None:
        """Bring a guest into a state, by undisturbed operations."""
        now = self.power(instance)
        if now is wanted:
            return
        if now is PowerState.PAUSED or wanted is PowerState.PAUSED:
            self.run("virtfleet.resume" if now is PowerState.PAUSED else "virtfleet.power_on", instance=instance)
        if wanted is PowerState.PAUSED:
            self.run("virtfleet.pause", instance=instance)
        elif wanted is PowerState.OFF:
            self.run("virtfleet.power_off", instance=instance, timeout=0)
        else:
            self.run("virtfleet.power_on", instance=instance)

    def run(self, task: str, **arguments: Any) -> Record:
        """An undisturbed operation; raises LabError unless it succeeds."""
        record = self.client.wait(self.submit(task, **arguments), timeout=60)
        if record.state is not State.SUCCEEDED:
            raise LabError(f"without any fault, {task} {arguments} ended {record.state}: {record.error}")
        return record

    def submit(self, task: str, **arguments: Any) -> str:
        """Have the fleet accept a request; the operation's id. Asks again while hosts are joining, as schedulers do."""
        request = kind_of(task).request.model_validate(arguments)
        return Retrying(
            retry=retry_if_exception_type(BrokerUnavailable),
            wait=wait_fixed(0.5),
            stop=stop_after_delay(60),
            reraise=True,
        )(self.client.submit, request).id

    def known(self, name: str) -> Instance:
        """What the registry has of an instance; after FLUSHALL it may take a while until it knows it again."""
        wait_until(lambda: self.client.registry.find(name), 60, f"{name} is known")
        return self.client.registry.require(name)

    def wait_serving(self) -> None:
        """Wait until Redis has heard of the workers that run now, and of the guests."""
        wait_until(self._serves, 60, "all workers and the guest are known", self.workers[HOME, "control"].log)

    def ready_since(self) -> float:
        """When the latest of the workers was ready, in seconds since the epoch."""
        self.wait_serving()
        return max(float(facts["since"]) for facts in self._alive().values())

    def _serves(self) -> bool:
        heard = {worker: facts["pid"] for worker, facts in self._alive().items()}
        serving = heard == {worker: process.pid for worker, process in self.workers.items()}
        return serving and self.client.registry.find(PET) is not None

    def _alive(self) -> dict[tuple[str, WorkerKind], dict[str, Any]]:
        """What each worker says of itself."""
        alive = self.client.registry.alive
        return {(host, kind): facts for host in self.hosts for kind, facts in alive(host).items()}

    def send(self, task: str, **arguments: Any) -> None:
        """Ask as a scheduler does, which knows nothing but the task's name."""
        app.send_task(task, kwargs=arguments, queue=SHARED_QUEUE, ignore_result=True)

    def read_markers(self) -> dict[str, bytes]:
        """What the pet has written to its disks, as it is on the host now."""
        uuid = str(self.known(PET).uuid)
        folder = self.home.data / "instances" / uuid
        return {
            "root": _sector(folder / "root.qcow2", 64 * MIB // 512, self.folder),
            "ephemeral": _sector(folder / "ephemeral0.qcow2", 0, self.folder),
        }

    def published(self) -> list[Snapshot]:
        """The snapshots that lie on the host."""
        return snapshots.every(DataDir(self.home.data))

    def snapshot_complaints(self, snapshot: Snapshot) -> Iterator[str]:
        """What is wrong with the content of a published snapshot."""
        folder = DataDir(self.home.data).snapshot(snapshot.id).path
        for disk in snapshot.disks:
            if checksum_of(folder / disk.file, Alone()) != disk.checksum:
                yield f"{snapshot.id}: the checksum of {disk.target} is wrong"
        disks = {disk.target: folder / disk.file for disk in snapshot.disks}
        marks = {
            "root": _sector(disks["vda"], 64 * MIB // 512, self.folder),
            "ephemeral": _sector(disks["vdb"], 0, self.folder),
        }
        if marks != self.markers:
            yield f"{snapshot.id} holds {marks}, not {self.markers}"
        first, second = (int(_sector(disks[disk], COUNTER, self.folder)[:16]) for disk in ("vda", "vdb"))
        if first - second not in {0, 1}:
            yield f"{snapshot.id} shows two moments: write {first} on one disk, {second} on the other"

    def keep_snapshot(self, instance: str) -> None:
        """Take one, by an undisturbed operation, that this round's operation is about."""
        self.kept = f"kept-{uuid4().hex[:8]}"
        self.run("virtfleet.snapshot", instance=instance, operation_id=self.kept, incremental=True)

    def drop_snapshots(self) -> None:
        """Delete all of them, by undisturbed operations."""
        for snapshot in reversed(self.published()):
            self.wait_serving()
            self.client.sync(HOME)
            self.run("virtfleet.snapshot_delete", snapshot=snapshot.id)

    def checkpoints(self) -> list[str]:
        """Names of the pet's checkpoints."""
        with self._connected(HOME) as connection:
            return [str(one.getName()) for one in connection.lookupByName(PET).listAllCheckpoints()]

    def boots(self) -> int:
        """How often the pet has booted."""
        return self._console().count(BOOTING)

    def wait_booted(self) -> None:
        """Wait until the pet, if it runs, has booted and writes."""
        if self.power(PET) is PowerState.RUNNING:
            wait_until(lambda: self._agent_says("guest-ping") is not None, 60, "the guest's agent answers")
            wait_until(lambda: MARKED in self._console().rpartition(BOOTING)[2], 60, "the guest has booted")

    def _console(self) -> str:
        uuid = str(self.known(PET).uuid)
        log = self.home.data / "instances" / uuid / "console.log"
        return log.read_text(errors="replace")

    def frozen(self) -> bool:
        """Whether the pet's file systems are frozen, if it runs."""
        return self._agent_says("guest-fsfreeze-status") == "frozen"

    def _agent_says(self, command: str) -> object:
        """What the pet's agent answers; None while it is off or boots."""
        with self._connected(HOME) as connection, suppress(libvirt.libvirtError):
            answer = libvirt_qemu.qemuAgentCommand(connection.lookupByName(PET), json.dumps({"execute": command}), 5, 0)
            return cast("object", json.loads(answer)["return"])
        return None

    def log_offsets(self) -> dict[Path, int]:
        """How long the workers' logs are now."""
        return {worker.log: worker.log.stat().st_size for worker in self.workers.values()}

    # --- set-up ---------------------------------------------------------------------------------------------------

    def _lay_out_images(self) -> None:
        guest = self.home.images / "guest.qcow2"
        guest.write_bytes(guest_image().read_bytes())
        self.fresh_image()

    def _spawn_pet(self) -> None:
        request = {"name": PET, "image": str(self.home.images / "guest.qcow2"), "ephemeral_gib": [1, 1]}
        ready = {"memory_mib": 256, "wait_for": "console", "console_line": MARKED}
        self.run("virtfleet.spawn", host=HOME, user_data=USER_DATA, **request, **ready)
        self.markers = self.read_markers()
        if not all(marker.startswith(b"marker ") for marker in self.markers.values()):
            raise LabError(f"the guest has not marked its disks: {self.markers}")

    @contextmanager
    def _connected(self, host: str) -> Iterator[libvirt.virConnect]:
        connection = libvirt.open(self.hosts[host].uri)
        try:
            yield connection
        finally:
            with suppress(libvirt.libvirtError):
                connection.close()


def _mount_small_disk(folder: Path, size: str) -> bool:
    """As root, put a small filesystem there, which can be filled; whether that was done."""
    if os.geteuid() != 0:
        return False
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)], check=True)
    return True


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazily: guests still use their disks


def _asked(domains: list[libvirt.virDomain], ask: Callable[[libvirt.virDomain], T]) -> dict[str, T]:
    """What each domain answers, by name; one that has gone since it was listed is left out."""
    answers = {}
    for domain in domains:
        try:
            answers[domain.name()] = ask(domain)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID}:
                raise
    return answers


def _block_job(domain: libvirt.virDomain, disk: str) -> bool:
    with suppress(libvirt.libvirtError):  # a guest without that disk
        return bool(domain.blockJobInfo(disk))
    return False


def _writable_disks(domain: libvirt.virDomain) -> list[str]:
    """QEMU's names for a guest's disks, but for what can only be read."""
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, json.dumps({"execute": "query-block"}), 0))
    return [disk["qdev"] for disk in answer["return"] if "inserted" in disk and not disk["inserted"]["ro"]]


def _sector(disk: Path, number: int, scratch: Path) -> bytes:
    return _extent(disk, number * 512, 512, scratch).rstrip(b"\0")


def _extent(disk: Path, start: int, size: int, scratch: Path) -> bytes:
    """Bytes of a disk as the guest reads them."""
    out, form = scratch / "extent", disk.suffix.removeprefix(".")
    # Not `qemu-img dd`: what its count means together with skip has changed over versions.
    place = f"driver=raw,offset={start},size={size},file.driver={form},file.file.filename={disk}"
    subprocess.run(["qemu-img", "convert", "-U", "--image-opts", place, "-O", "raw", str(out)], check=True)
    return out.read_bytes()
