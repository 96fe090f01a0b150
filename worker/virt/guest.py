"""One domain and what can be done to it: a method per verb, each safe to repeat."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import libvirt
import libvirt_qemu
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from worker.context import Watcher
from worker.errors import (
    AgentUnresponsive,
    Cancelled,
    FenceTooLow,
    HypervisorError,
    InstanceNotFound,
    InvalidState,
    Permanent,
    Stalled,
    UnsupportedByHost,
)
from worker.models import GuestDisk, Owner, PowerState
from worker.stall import StallDeadline
from worker.virt.bounded import START_SECONDS, asked, bounded
from worker.virt.connection import version_of
from worker.virt.domain_xml import (
    NAMESPACE,
    PREFIX,
    accel_of,
    disk_source,
    owner_xml,
    parse,
    parse_disks,
    parse_nvram,
    parse_other_disks,
    parse_owner,
    with_cpu_of,
)
from worker.virt.faults import translated

_GUEST_PING = '{"execute":"guest-ping"}'

# PMSUSPENDED is a guest that sleeps in its own S3; SHUTDOWN one that still runs its way down.
_POWER = {
    libvirt.VIR_DOMAIN_NOSTATE: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.OFF,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
}

_JOBS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "commit",
}

_STATUS_FILES = Path("/run/libvirt/qemu")
_JOB_POLL = 0.1  # seconds; a look costs 0.5 ms
_ABORT_PATIENCE = 10.0  # seconds

_INACTIVE = (PowerState.OFF, PowerState.SAVED, PowerState.MISSING)

_UNDEFINE_ALL = (
    libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)
# What a libvirt or driver that lacks the newer flags is asked instead, in this order.
_UNDEFINE_FLAGS = (
    _UNDEFINE_ALL,
    _UNDEFINE_ALL & ~libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA,
)
_KEEP_NVRAM = libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
"""Turns the one into the other, which exclude each other."""


class Guest:
    """A domain on one host. Every method raises the errors of `worker.errors` only."""

    def __init__(self, domain: libvirt.virDomain, host: str) -> None:
        self._domain = bounded(domain, host)
        self._host = host

    def __repr__(self) -> str:
        return f"<Guest {self.name} ({self.uuid}) on {self._host}>"

    def _trying_to(self, verb: str) -> AbstractContextManager[None]:
        return translated(f"{verb} {self.name}", self._host)

    @property
    def name(self) -> str:
        """The domain's name; asks nobody."""
        return str(self._domain.name())

    @property
    def host(self) -> str:
        """Name of the host it is on; asks nobody."""
        return self._host

    @property
    def uuid(self) -> UUID:
        """The domain's uuid, which is the instance's; asks nobody."""
        return UUID(self._domain.UUIDString())

    @property
    def domain(self) -> libvirt.virDomain:
        """libvirt's handle, with bounded calls, for the modules of `worker.virt` only."""
        return self._domain

    @property
    def libvirt_version(self) -> tuple[int, int, int]:
        """The version of its host's libvirtd: an old one does not know newer calls."""
        with self._trying_to("read the version of the libvirt that runs"):
            return version_of(self._domain.connect().getLibVersion())

    # --- what it is ---------------------------------------------------------------------------------------

    def power(self) -> PowerState:
        """What the guest does now; MISSING when the domain is gone, SAVED when off with its memory kept."""
        try:
            with self._trying_to("read the state of"):
                state, reason = self._domain.state()
                saved = state == libvirt.VIR_DOMAIN_SHUTOFF and bool(self._domain.hasManagedSaveImage())
        except InstanceNotFound:
            return PowerState.MISSING
        if saved:
            return PowerState.SAVED
        if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_CRASHED):
            return PowerState.CRASHED
        return _POWER[state]

    def qemu_version(self) -> tuple[int, int]:
        """Of the QEMU that runs the guest: the host's may have been renewed since."""
        version = self.ask_qemu("query-version")["qemu"]
        return version["major"], version["minor"]

    def ask_qemu(self, command: str, **arguments: object) -> Any:
        """Ask QEMU's monitor (QMP) what libvirt does not tell. Raises HypervisorError where it refuses."""
        request = json.dumps({"execute": command, "arguments": arguments})
        with self._trying_to(f"{command} in the QEMU of"):
            answer = json.loads(asked(self._domain, libvirt_qemu.qemuMonitorCommand, request, 0))
        if "error" in answer:
            raise HypervisorError(f"QEMU of {self.name} refuses {command}: {answer['error']['desc']}")
        return answer["return"]

    def is_stopped_by_io_error(self) -> bool:
        """Whether QEMU keeps it from running since a write to a disk failed; on a full one, as a rule.

        Resumed, it tries the write again (QEMU, -drive werror=enospc, and libvirt's default for it).
        """
        try:
            with self._trying_to("read the state of"):
                state, reason = self._domain.state()
        except InstanceNotFound:
            return False
        return (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def is_active(self) -> bool:
        """Whether there is a QEMU process: running, paused or crashed. False when the domain is gone."""
        try:
            with self._trying_to("read the state of"):
                return bool(self._domain.isActive())
        except InstanceNotFound:
            return False

    def goes_off(self, within: float = 2.0) -> bool:
        """Whether it is off within so many seconds: calls and jobs end with QEMU, a moment before the domain does."""
        deadline = time.monotonic() + within
        while is_active := self.is_active():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return not is_active

    def is_persistent(self) -> bool:
        """Whether the definition outlives the guest's power-off."""
        with self._trying_to("read the definition of"):
            return bool(self._domain.isPersistent())

    def has_managed_save(self) -> bool:
        """Whether the guest's memory is kept in a file that the next start resumes from."""
        with self._trying_to("read the saved state of"):
            return bool(self._domain.hasManagedSaveImage())

    def xml(self, *, inactive: bool = False) -> str:
        """The domain as it runs, or with `inactive` as it will start next: fit to be defined again."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE if inactive else 0
        with self._trying_to("read the definition of"):
            return str(self._domain.XMLDesc(flags))

    def accel(self) -> Literal["kvm", "qemu"]:
        """What it is defined to run under."""
        return "kvm" if accel_of(self.xml(inactive=True)) == "kvm" else "qemu"

    def pinned_xml(self) -> str:
        """As `xml(inactive=True)`, with the CPU that a guest under KVM was started with.

        On another host the same host-model would be another CPU.
        """
        stored = self.xml(inactive=True)
        return with_cpu_of(stored, self.xml()) if self.is_active() and self.accel() == "kvm" else stored

    def nvram(self) -> Path | None:
        """The file with its UEFI variables, if it has some."""
        return parse_nvram(self.xml(inactive=True))

    def disk_paths(self) -> dict[str, Path]:
        """Target (vda, ...) and file of each disk, as the guest uses them now."""
        disks = parse(self.xml()).iterfind("./devices/disk")
        found = ((disk.find("target"), disk.find("source[@file]")) for disk in disks)
        return {
            str(target.get("dev")): Path(str(source.get("file")))
            for target, source in found
            if target is not None and source is not None
        }

    def files(self) -> set[Path]:
        """Every file that its disks use, with their backing files and mirrors, now or when it starts next."""
        trees = [parse(self.xml()), parse(self.xml(inactive=True))]
        sources = [source for tree in trees for source in tree.iterfind("./devices/disk//source[@file]")]
        return {Path(str(source.get("file"))) for source in sources}

    def disk_sources(self) -> set[tuple[str, Path | None]]:
        """Target and file of every disk, now and when it starts next; None for what does not lie in a file.

        Drives without a medium are left out.
        """
        trees = [parse(self.xml()), parse(self.xml(inactive=True))]
        return {disk_source(disk) for tree in trees for disk in tree.iterfind("./devices/disk[source]")}

    def disks(self) -> list[GuestDisk]:
        """The disks in files, as the guest uses them now, or will when it is started."""
        return parse_disks(self.xml())

    def other_disks(self) -> list[str]:
        """Targets of the disks that it writes to and that are no files, of which the fleet knows nothing."""
        return parse_other_disks(self.xml())

    def shut_itself_down(self) -> bool:
        """Whether the guest is off because it shut itself down; unknown after libvirtd restarted, hence False."""
        with self._trying_to("read the state of"):
            state, reason = self._domain.state()
        return (state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN)

    # --- whose it is --------------------------------------------------------------------------------------

    def owner(self) -> Owner | None:
        """Whose the domain is by its metadata; None when it is not the fleet's."""
        return parse_owner(self.xml())

    def check_fence(self, owner: Owner) -> None:
        """Raise FenceTooLow when the domain belongs to a newer execution than `owner`."""
        current = self.owner()
        if current is not None and owner.fence < current.fence:
            raise FenceTooLow(
                f"{self.name} on host {self._host} belongs to operation {current.operation} with fence"
                f" {current.fence}; operation {owner.operation} with fence {owner.fence} came too late",
                instance=self.name,
                fence=owner.fence,
                current_operation=current.operation,
                current_fence=current.fence,
            )

    # The guest may stop or start between the look at it and the write: then look again.
    @retry(retry=retry_if_exception_type(InvalidState), stop=stop_after_attempt(3), reraise=True)
    def claim(self, owner: Owner) -> None:
        """Write `owner` into the running and the stored definition, durably. Raises FenceTooLow."""
        self.check_fence(owner)
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if self.is_persistent() else 0
        if self.is_active():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        with self._trying_to("claim"):
            self._domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, owner_xml(owner), PREFIX, NAMESPACE, flags)

    # --- power --------------------------------------------------------------------------------------------

    def start(self, *, paused: bool = False) -> None:
        """Start, or resume from a managed save. Active already is success; crashed is InvalidState."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        within = math.inf if self.has_managed_save() else START_SECONDS  # saved memory is read as long as it takes
        with self._towards("start", PowerState.RUNNING, PowerState.PAUSED):
            asked(self._domain, lambda domain: domain.createWithFlags(flags), within=within)

    def shutdown(self, *, agent: bool = False) -> None:
        """Ask the guest to power off and return at once; off already or gone is success.

        By ACPI, which a guest that is still booting ignores: ask again. With `agent` by its agent first.
        """
        flags = libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
        if agent:
            flags |= libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT
        with self._towards("shut down", *_INACTIVE):
            self._domain.shutdownFlags(flags)

    def destroy(self, *, graceful: bool = False) -> None:
        """Take the power away; off already or gone is success.

        QEMU is asked to end, which writes its caches, and killed when it has not after some 10 s; with `graceful`
        libvirt asks for longer (25 s in 9.0, which then kills too) or raises.
        """
        flags = libvirt.VIR_DOMAIN_DESTROY_GRACEFUL if graceful else 0
        with self._towards("power off", *_INACTIVE):
            self._domain.destroyFlags(flags)

    def reboot(self, *, agent: bool = False) -> None:
        """Ask the guest to boot again and return at once. Raises InvalidState when it is off."""
        flags = libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN
        if agent:
            flags |= libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT
        with self._trying_to("reboot"):
            self._domain.reboot(flags)

    def reset(self) -> None:
        """Press the reset button: the guest boots again at once. Raises InvalidState when it is off."""
        with self._trying_to("reset"):
            self._domain.reset()

    def pause(self) -> None:
        """Stop the guest's CPUs; paused already is success. Raises InvalidState when it is off."""
        with self._towards("pause", PowerState.PAUSED):
            self._domain.suspend()

    def resume(self) -> None:
        """Let a paused or sleeping guest run; running already is success. InvalidState when it is off."""
        with self._towards("resume", PowerState.RUNNING):
            if self._domain.state()[0] == libvirt.VIR_DOMAIN_PMSUSPENDED:
                self._domain.pMWakeup()
            else:
                self._domain.resume()

    @contextmanager
    def _towards(self, verb: str, *goal: PowerState) -> Iterator[None]:
        """A verb that libvirt refuses has succeeded when the guest is where it was to be brought."""
        try:
            with self._trying_to(verb):
                yield
        except Permanent:
            if self.power() not in goal:
                raise

    # --- jobs and checkpoints -----------------------------------------------------------------------------

    def block_jobs(self) -> dict[str, str]:
        """Target (vda, ...) and kind (copy, commit, pull) of each job that moves blocks; no backups."""
        if not self.is_active():
            return {}
        with self._trying_to("read the block jobs of"):
            jobs = {target: self._domain.blockJobInfo(target) for target in self.disk_paths()}
        return {target: _JOBS[job["type"]] for target, job in jobs.items() if job and job["type"] in _JOBS}

    def abort_block_job(self, target: str) -> None:
        """End a block job without pivoting: the guest stays on the files it is on. None there is success."""
        if target in self.block_jobs():
            with self._trying_to(f"abort the block job on {target} of"):
                self._domain.blockJobAbort(target)

    def has_backup(self) -> bool:
        """Whether a backup job runs."""
        if not self.is_active():
            return False
        with self._trying_to("read the job of"):
            job = self._domain.jobStats()
        running = job.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE
        return bool(running and job.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP)

    def checkpoints(self) -> list[str]:
        """Names of its checkpoints; none where libvirt does not know such."""
        try:
            with self._trying_to("list the checkpoints of"):
                return sorted(str(checkpoint.getName()) for checkpoint in self._domain.listAllCheckpoints())
        except UnsupportedByHost:
            return []

    def snapshots(self) -> list[str]:
        """Names of what `virsh snapshot-create` has made of it."""
        with self._trying_to("list the snapshots of"):
            return sorted(str(snapshot.getName()) for snapshot in self._domain.listAllSnapshots())

    # --- memory -------------------------------------------------------------------------------------------

    def save_memory(self, watch: Watcher, *, stall: float) -> None:
        """Stop the guest with its memory kept in a file that the next start resumes from; saved already is success.

        A save that a dead worker began goes on in libvirtd: it is waited for. When `watch` says Cancelled, or it has
        moved nothing for `stall` seconds, it is aborted and the guest runs on.
        Raises InvalidState when the guest is off, NoSpace, Stalled.
        """
        self.wait_for_job(watch, stall=stall)
        if self.power() is PowerState.SAVED:
            return
        pool = ThreadPoolExecutor(1)
        try:
            self._follow(pool.submit(self._save_memory), watch, stall)
        finally:
            pool.shutdown(wait=False)  # the call has ended, or the connection's keepalive will end it

    def drop_stale_memory(self) -> None:
        """Remove the saved memory of a guest that runs again.

        libvirt removes it itself, after the guest's CPUs run: a libvirtd that dies in between leaves it, and a later
        start would put old memory over newer disks.
        """
        if self.is_active() and self.has_managed_save():
            with self._trying_to("remove the stale memory of"):
                self._domain.managedSaveRemove()

    def wait_for_job(self, watch: Watcher, *, stall: float) -> None:
        """Wait until libvirt neither saves nor migrates nor backs the guest up.

        Raises Stalled where that has moved nothing for `stall` seconds.
        """
        deadline = StallDeadline(f"what libvirt does to {self.name}", stall)
        while (job := self.job_stats()).get("type"):
            watch.progress(*memory_progress(job))
            deadline.see(bytes_moved(job))
            time.sleep(_JOB_POLL)

    def job_stats(self) -> dict[str, Any]:
        """What libvirt tells of the job it runs on the guest; of `type` 0 when there is none."""
        try:
            with self._trying_to("follow the job of"):
                return dict(self._domain.jobStats())
        except InvalidState:  # the guest is off
            return {"type": 0}

    def has_lost_job(self) -> bool:
        """Whether libvirt holds the guest in a backup that it knows nothing of.

        libvirt 9.0 that is killed within some 50 ms of being asked for one comes back so: its status file names the job
        (`<job type='none' async='backup' .../>`), and nothing of the backup. It lets no other backup begin, nor a save,
        and abortJob does nothing; a guest that shuts down stays where it is then. Mirrors work, and so does to destroy
        it; but only a libvirtd that starts anew then lets it start.
        """
        try:
            self.job_stats()
        except HypervisorError as error:
            if "backup job data missing" in error.message:
                return True
            raise
        return False

    def lost_job_remedy(self) -> str:
        """How to end what `has_lost_job` tells of: libvirtd reads a guest's status file only as it starts."""
        forget = f"sed -i \"/<job .*async='backup'.*\\/>/d\" {_STATUS_FILES / self.name}.xml"
        return f"On that host, while the guest runs on: {forget} && systemctl restart libvirtd (or virtqemud)."

    def require_sight_of_job(self) -> None:
        """Raise HypervisorError where `has_lost_job`."""
        if self.has_lost_job():
            raise HypervisorError(
                f"libvirt on host {self.host} has lost sight of a backup of {self.name}, which it was beginning when it"
                " was killed, and lets neither another one begin nor its memory be saved",
                hint=f"{self.lost_job_remedy()} Until then: --method mirror.",
            )

    def abort_job(self) -> None:
        """End the save or backup that libvirt runs on the guest; none is success."""
        try:
            with self._trying_to("abort the job of"):
                self._domain.abortJob()
        except InvalidState:
            return

    def _save_memory(self) -> None:
        with self._towards("save the memory of", PowerState.SAVED):
            self._domain.managedSave(0)

    def _follow(self, saving: Future[None], watch: Watcher, stall: float) -> None:
        deadline = StallDeadline(f"saving the memory of {self.name}", stall)
        while wait([saving], _JOB_POLL).not_done:
            try:
                job = self.job_stats()
                watch.progress(*memory_progress(job))
                deadline.see(bytes_moved(job))
            except (Cancelled, Stalled):
                self.abort_job()
                wait([saving], _ABORT_PATIENCE)
                raise
        saving.result()

    # --- definition ---------------------------------------------------------------------------------------

    def autostart(self) -> bool:
        """Whether the host starts the guest when it boots."""
        with self._trying_to("read the definition of"):
            return bool(self._domain.autostart())

    def set_autostart(self, *, enabled: bool) -> None:
        """Choose whether the host starts the guest when it boots."""
        with self._trying_to("set the autostart of"):
            self._domain.setAutostart(int(enabled))

    def undefine(self, *, keep_nvram: bool = False) -> None:
        """Forget the domain, its NVRAM, saved memory and snapshot records, never its disks; gone is success.

        Raises InvalidState while the guest runs: libvirt would make it transient, lost at its power-off.
        """
        if self.is_active():
            raise InvalidState(
                f"cannot undefine {self.name} on host {self._host}: it is running", hint="Power it off first."
            )
        try:
            with self._trying_to("undefine"):
                self._undefine(keep_nvram=keep_nvram)
        except InstanceNotFound:
            return

    def _undefine(self, *, keep_nvram: bool) -> None:
        for flags in _UNDEFINE_FLAGS[:-1]:
            try:
                self._domain.undefineFlags(flags ^ _KEEP_NVRAM if keep_nvram else flags)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_INVALID_ARG:
                    raise
            else:
                return
        self._domain.undefineFlags(_UNDEFINE_FLAGS[-1])

    # --- agent --------------------------------------------------------------------------------------------

    def agent_answers(self, timeout: float) -> bool:
        """Whether the guest agent answers a ping within about `timeout` seconds (at least 1).

        No channel, no agent, a silent one and a guest that is off are all False.
        """
        try:
            with self._trying_to("ping the agent of"):
                libvirt_qemu.qemuAgentCommand(self._domain, _GUEST_PING, max(1, int(timeout)), 0)
        except (AgentUnresponsive, InvalidState, InstanceNotFound):
            return False
        return True


def memory_progress(job: dict[str, Any]) -> tuple[int, int | None, str]:
    """What of a guest's memory a job has written: (done, total, note), in bytes."""
    return int(job.get("memory_processed", 0)), job.get("memory_total"), "saving the guest's memory"


def bytes_moved(job: dict[str, Any]) -> tuple[int, int]:
    """Of the guest's memory and of its disks."""
    return int(job.get("memory_processed", 0)), int(job.get("disk_processed", 0))
