"""Block jobs on a real libvirtd and QEMU: how one ended is known for certain, or is said to be unknown."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.guests import SIZE, connected, empty, full_guest
from tests.lab import LabHost, lab_folder, wait_until
from worker.context import Alone
from worker.errors import CheckpointMissing, FleetError, GuestHung, HypervisorError, InvalidState, JobLost
from worker.images import qemu_img
from worker.models import MIB, PowerState
from worker.virt import bounded, checkpoints, strays
from worker.virt.guest import Guest
from worker.virt.jobs import BackupJob, BlockTarget, MirrorJob

SLOW = 64 * MIB  # bytes per second: slow enough to be met while it runs


@pytest.fixture(scope="module")
def lab() -> Iterator[LabHost]:
    with lab_folder() as folder, LabHost("jobs", folder) as lab:
        yield lab


@pytest.fixture
def guest(lab: LabHost) -> Iterator[Guest]:
    with full_guest(lab) as guest:
        yield guest


def targets(lab: LabHost, name: str) -> list[BlockTarget]:
    return [BlockTarget(disk, empty(lab, f"{name}-{disk}"), "qcow2") for disk in ("vda", "vdb")]


def ended(job: BackupJob) -> None:
    wait_until(lambda: job.progress() is None, 60, "the backup ends")


def assert_same(guest: Guest, chosen: list[BlockTarget]) -> None:
    for disk, target in zip(guest.disks(), chosen, strict=True):
        subprocess.run(["qemu-img", "compare", "-U", "-q", str(disk.path), str(target.path)], check=True)


def test_a_backup_copies_all_disks_and_says_that_it_has(lab: LabHost, guest: Guest) -> None:
    job, chosen = BackupJob(guest), targets(lab, "whole")
    assert job.targets() == {}
    job.begin(chosen)
    ended(job)
    job.require_success()
    job.require_success()
    assert_same(guest, chosen)
    job.forget_outcome()
    with pytest.raises(JobLost):
        job.require_success()


def test_a_success_of_before_is_not_taken_for_one_of_now(lab: LabHost, guest: Guest) -> None:
    job = BackupJob(guest)
    job.begin(targets(lab, "before"))
    ended(job)
    job.begin(targets(lab, "now")[:1])
    job.limit({"vda": SLOW})
    with pytest.raises(JobLost):
        job.require_success()
    job.end(Alone())
    with pytest.raises(Exception, match="cancel"):
        job.require_success()
    assert guest.power() is PowerState.RUNNING


def test_a_backup_of_several_disks_is_ended_and_the_guest_lives(lab: LabHost, guest: Guest) -> None:
    """QEMU 7.2 may die of an abort where several disks are in an iothread: the backup is let run to its end."""
    job = BackupJob(guest)
    for number in range(5):
        job.begin(targets(lab, f"several-{number}"))
        job.limit({"vda": SLOW // 8, "vdb": SLOW // 8})
        began = time.monotonic()
        job.end(Alone())
        assert time.monotonic() - began < 30  # not slow any more
        assert job.targets() == {}
        assert guest.power() is PowerState.RUNNING
    job.end(Alone())  # nothing to end: fine


def test_a_backup_is_found_again_after_libvirtd_was_killed(lab: LabHost, guest: Guest) -> None:
    chosen = targets(lab, "found")
    BackupJob(guest).begin(chosen)
    BackupJob(guest).limit({"vda": SLOW, "vdb": SLOW})
    lab.libvirtd_kill9()
    lab.libvirtd_start()
    with connected(lab) as host:
        again = host.guest(guest.uuid)
        job = BackupJob(again)
        # On a busy machine it may be done by then: libvirtd knows also of that.
        assert job.targets() in ({target.disk: target.path for target in chosen}, {})
        ended(job)
        job.require_success()
        assert_same(again, chosen)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: libvirt's status files are elsewhere for others")
def test_a_backup_that_libvirt_has_lost_sight_of_is_told_and_can_be_ended(lab: LabHost, guest: Guest) -> None:
    pid = lab.qemu_pid(guest.name)
    lab.lose_sight_of_backup(guest.name)
    with connected(lab) as host:
        held = host.guest(guest.uuid)
        assert held.has_lost_job()
        with pytest.raises(HypervisorError, match="lost sight") as told:
            BackupJob(held).begin(targets(lab, "refused"))
        mirror = MirrorJob(held, "vda")
        mirror.begin(empty(lab, "mirrored"))
        wait_until(mirror.is_ready, 60, "the mirror is ready")
        mirror.end()
    lab.follow(told.value.hint)
    with connected(lab) as host:
        freed = host.guest(guest.uuid)
        assert not freed.has_lost_job()
        job, chosen = BackupJob(freed), targets(lab, "freed")
        job.begin(chosen)
        ended(job)
        job.require_success()
        assert_same(freed, chosen)
    assert lab.qemu_pid(guest.name) == pid


def _opens(pid: int, folder: Path) -> bool:
    """Whether a process has a file of that folder open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed just now
            if link.readlink().parent == folder:
                return True
    return False


def _killed_as_a_backup_begins(lab: LabHost, guest: Guest, number: int) -> Path:
    """Kill libvirtd, later with each number, from when QEMU has opened the files; their folder."""
    folder = lab.data / f".{guest.name}-{number}"
    folder.mkdir()
    chosen = [BlockTarget(disk, empty(lab, f"{folder.name}/{disk}"), "qcow2") for disk in ("vda", "vdb")]
    pid = lab.qemu_pid(guest.name)

    def begin() -> None:
        with suppress(FleetError), connected(lab) as host:
            BackupJob(host.guest(guest.uuid)).begin(chosen, checkpoint=f"virtfleet.{number}")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(begin)
        deadline = time.monotonic() + 10
        while not _opens(pid, folder):  # without a pause: what is to be met lasts for some milliseconds
            assert time.monotonic() < deadline
        time.sleep(0.004 * number)
        lab.libvirtd_kill9()
    lab.libvirtd_start()
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: libvirt's status files are elsewhere for others")
def test_what_a_killed_libvirtd_leaves_of_a_backup_in_qemu_is_in_nobodys_way(lab: LabHost, guest: Guest) -> None:
    losses = 0
    for number in range(6):
        folder = _killed_as_a_backup_begins(lab, guest, number)
        with connected(lab) as host:
            left = host.guest(guest.uuid)
            lost = left.has_lost_job()
            if not lost:
                BackupJob(left).end(Alone())
            strays.end(left, lab.data, "virtfleet.", Alone())
            assert not _opens(lab.qemu_pid(guest.name), folder)
        if lost:
            losses += 1
            lab.follow(left.lost_job_remedy())
        with connected(lab) as host:
            freed = host.guest(guest.uuid)
            nodes = freed.ask_qemu("query-named-block-nodes")
            bitmaps = {one["name"] for node in nodes for one in node.get("dirty-bitmaps", [])}
            assert bitmaps <= set(checkpoints.names(freed))
            job, again = BackupJob(freed), targets(lab, f"again-{number}")
            job.begin(again)
            ended(job)
            job.require_success()
            assert_same(freed, again)
            freed.save_memory(Watching(), stall=60)
            freed.start()
    assert losses, "libvirtd was killed too late each time: this has shown nothing"


def test_a_guest_that_is_powered_off_takes_its_backup_with_it(lab: LabHost, guest: Guest) -> None:
    job = BackupJob(guest)
    job.begin(targets(lab, "off"))
    job.limit({"vda": SLOW, "vdb": SLOW})
    guest.destroy()
    assert job.progress() is None
    assert job.targets() == {}
    with pytest.raises(InvalidState, match="off"):
        job.require_success()


def test_an_increment_needs_its_checkpoint(lab: LabHost, guest: Guest) -> None:
    job = BackupJob(guest)
    with pytest.raises(CheckpointMissing):
        job.begin(targets(lab, "none"), since="nosuch", checkpoint="first")
    assert checkpoints.names(guest) == []
    job.begin(targets(lab, "first"), checkpoint="first")
    ended(job)
    chosen = targets(lab, "second")
    job.begin(chosen, since="first", checkpoint="second")
    ended(job)
    job.require_success()
    assert all(target.path.stat().st_size < MIB for target in chosen)
    assert checkpoints.names(guest) == ["first", "second"]
    assert checkpoints.changed_bytes(guest, "first") == {"vda": 0, "vdb": 0}
    assert checkpoints.delete(guest, "first")
    assert checkpoints.delete(guest, "first")
    assert checkpoints.names(guest) == ["second"]


@pytest.mark.parametrize("call", ["measure", "delete", "limit"])
def test_a_qemu_that_hangs_holds_nobody_up(
    lab: LabHost, guest: Guest, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    job = BackupJob(guest)
    job.begin(targets(lab, f"hung-{call}"), checkpoint="first")
    if call == "limit":
        job.limit({"vda": MIB})
    else:
        ended(job)
    calls: dict[str, Callable[[], object]] = {
        "measure": lambda: checkpoints.changed_bytes(guest, "first"),
        "delete": lambda: checkpoints.delete(guest, "first"),
        "limit": lambda: job.limit({"vda": SLOW}),
    }
    monkeypatch.setattr(bounded, "ANSWER_SECONDS", 1.0)
    os.kill(lab.qemu_pid(guest.name), signal.SIGSTOP)
    try:
        with pytest.raises(GuestHung):
            calls[call]()
    finally:
        os.kill(lab.qemu_pid(guest.name), signal.SIGCONT)


def test_a_checkpoint_can_be_deleted_whose_bitmap_died_with_qemu(lab: LabHost, guest: Guest) -> None:
    job = BackupJob(guest)
    job.begin(targets(lab, "first"), checkpoint="first")
    ended(job)
    lab.kill_guest(guest.name)
    wait_until(lambda: not guest.is_active(), 20, "libvirt has noticed")
    guest.start()
    assert checkpoints.delete(guest, "first")
    assert checkpoints.names(guest) == []


def test_a_mirror_holds_the_disk_as_it_is_when_it_ends(lab: LabHost, guest: Guest) -> None:
    job, path = MirrorJob(guest, "vda"), empty(lab, "mirror")
    assert (job.target(), job.progress(), job.is_ready()) == (None, None, False)
    job.begin(path)
    assert job.target() == path
    wait_until(job.is_ready, 60, "the mirror is ready")
    job.end()
    assert job.target() is None
    assert guest.is_persistent()
    subprocess.run(["qemu-img", "compare", "-U", "-q", str(guest.disks()[0].path), str(path)], check=True)
    with pytest.raises(Exception, match="vda"):
        job.end()


def test_a_mirror_of_a_write_that_fills_a_cluster_in_part_holds_the_rest_of_it_too(lab: LabHost, guest: Guest) -> None:
    """libvirt opens its file without what that builds on: nothing there tells what the rest of a cluster is."""
    for number in (1, 2):
        _snapshot_beside(lab, guest, lab.data / f"{guest.name}-{number}.qcow2")
    disk, job, path = guest.disks()[0], MirrorJob(guest, "vda"), lab.data / f"{guest.name}.delta"
    assert disk.backing
    qemu_img.create_delta(path, disk.backing, "qcow2", SIZE)
    job.begin(path, synchronous=True)
    wait_until(job.is_ready, 60, "the mirror is ready")
    write = 'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P 7 1M 512"'
    guest.ask_qemu("human-monitor-command", **{"command-line": write})
    job.end()
    subprocess.run(["qemu-img", "compare", "-U", "-q", str(disk.path), str(path)], check=True)
    content = path.with_suffix(".content")
    qemu_img.convert(path, "qcow2", content, "raw")
    assert content.read_bytes()[MIB : MIB + 1024] == b"\7" * 512 + b"a" * 512


def _snapshot_beside(lab: LabHost, guest: Guest, top: Path) -> None:
    """A snapshot as administrators take them: the guest goes on in a new file upon its disk."""
    disks = ["--diskspec", f"vda,file={top}", "--diskspec", "vdb,snapshot=no"]
    command = ["virsh", "--connect", lab.uri, "snapshot-create-as", guest.name, "--disk-only", "--no-metadata", *disks]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_memory_that_was_saved_comes_back_and_paused_stays_paused(guest: Guest) -> None:
    guest.pause()
    guest.save_memory(Watching(), stall=60)
    guest.save_memory(Watching(), stall=60)
    assert guest.power() is PowerState.SAVED
    guest.start()
    assert guest.power() is PowerState.PAUSED
    guest.drop_stale_memory()
    assert not guest.has_managed_save()


class Watching:
    """Nobody stops the work."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        assert done >= 0

    def check(self) -> None:
        return
