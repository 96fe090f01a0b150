"""Snapshots of a real guest, past the fleet: what becomes of them when others have to do with the guest, too."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.integration.guests import SIZE, full_guest
from tests.lab import LabHost, lab_folder, wait_until
from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots import extract, holding, live, watch
from worker.compute.snapshots.space import reserve
from worker.compute.snapshots.taking import Intent, intent_of, note_intent, now
from worker.compute.snapshots.watch import HoldWatch
from worker.context import Alone
from worker.errors import JobLost, LetGoTooEarly, SnapshotDamaged, StateLockBusy
from worker.images import qemu_img, snapshots
from worker.models import MIB, PowerState, Snapshot, SnapshotSpec
from worker.settings import Settings
from worker.virt.guest import Guest
from worker.virt.jobs import UNLIMITED, BackupJob, BlockTarget

SLOW = SnapshotSpec(limit_mib=1, quiesce="never")


class KilledError(Exception):
    """A worker that is killed cleans nothing up."""


class Dies(Alone):
    """The worker is killed as soon as its copy is under way."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        raise KilledError


@pytest.fixture(scope="module")
def lab() -> Iterator[LabHost]:
    with lab_folder() as folder, LabHost("verbs", folder) as lab:
        yield lab


@pytest.fixture
def guest(lab: LabHost) -> Iterator[Guest]:
    with full_guest(lab) as guest:
        yield guest


@pytest.fixture
def instance(lab: LabHost, guest: Guest) -> LocalInstance:
    return LocalInstance(local(lab), guest.name, str(guest.uuid))


def local(lab: LabHost) -> LocalHost:
    return LocalHost(lab.name, Settings(data_dir=lab.data, libvirt_uri=lab.uri))


def virsh(lab: LabHost, *arguments: str) -> str:
    command = ["virsh", "--quiet", "--connect", lab.uri, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def back_up_foreignly(lab: LabHost, guest: Guest, speed: int = UNLIMITED) -> None:
    """As a backup program does: all disks, as many bytes as ours."""
    targets = [BlockTarget(disk, lab.data / f"{guest.name}-{disk}.theirs", "qcow2") for disk in ("vda", "vdb")]
    for target in targets:
        qemu_img.create(target.path, "qcow2", SIZE)
    job = BackupJob(guest)
    job.begin(targets)
    job.limit({target.disk: speed for target in targets})


def runs(guest: Guest) -> bool:
    return guest.has_backup()


@pytest.mark.parametrize("still_runs", [True, False])
def test_the_success_of_a_foreign_backup_is_not_taken_for_ours(
    lab: LabHost, guest: Guest, instance: LocalInstance, *, still_runs: bool
) -> None:
    operation = f"op-{guest.name}"
    with pytest.raises(KilledError):
        live.take(instance, SLOW, Dies(operation))
    virsh(lab, "domjobabort", guest.name)
    wait_until(lambda: not runs(guest), 10, "ours is aborted")
    back_up_foreignly(lab, guest, MIB if still_runs else UNLIMITED)
    if not still_runs:
        wait_until(lambda: not runs(guest), 30, "theirs has ended")
    with pytest.raises(JobLost):
        live.take(instance, SLOW, Alone(operation))
    assert runs(guest) is still_runs
    if still_runs:
        with pytest.raises(StateLockBusy):
            live.take(instance, SLOW, Alone(operation))
        virsh(lab, "domjobabort", guest.name)
        wait_until(lambda: not runs(guest), 10, "theirs is aborted")
    taken = live.take(instance, SnapshotSpec(quiesce="never"), Alone(operation))
    for disk, copy in zip(guest.disks(), taken.disks, strict=True):
        subprocess.run(["qemu-img", "compare", "-U", "-q", str(disk.path), str(copy.path)], check=True)


def test_a_backup_that_ended_while_no_worker_was_there_is_not_made_anew(
    lab: LabHost, guest: Guest, instance: LocalInstance
) -> None:
    operation = f"op-{guest.name}"
    with pytest.raises(KilledError):
        live.take(instance, SLOW, Dies(operation))
    time.sleep(live.LONG)
    BackupJob(guest).limit({"vda": UNLIMITED, "vdb": UNLIMITED})
    wait_until(lambda: not runs(guest), 30, "it has ended")
    died_at = now()
    taken = live.take(instance, SLOW, Alone(operation))
    assert taken.taken_at < died_at
    for disk, copy in zip(guest.disks(), taken.disks, strict=True):
        subprocess.run(["qemu-img", "compare", "-U", "-q", str(disk.path), str(copy.path)], check=True)


def test_a_backup_that_ends_while_it_is_followed_is_not_mistaken_for_the_next_one(
    lab: LabHost, guest: Guest, instance: LocalInstance
) -> None:
    class Takeover(Alone):
        """In the moment between two looks at the job ours ends, and another one begins."""

        happened = False

        def progress(self, done: int, total: int | None = None, note: str = "") -> None:
            if not self.happened:
                self.happened = True
                time.sleep(0.5)
                assert runs(guest)
                virsh(lab, "domjobabort", guest.name)
                wait_until(lambda: not runs(guest), 10, "ours is aborted")
                back_up_foreignly(lab, guest)

    with pytest.raises(JobLost, match="another job after it"):
        live.take(instance, SLOW, Takeover(f"op-{guest.name}"))


def test_mirrors_whose_guest_was_let_go_of_too_early_are_made_anew(
    lab: LabHost, guest: Guest, instance: LocalInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end one after the other: a guest that ran meanwhile has no two disks at the same instant."""
    operation, spec = f"op-{guest.name}", SnapshotSpec(method="mirror", quiesce="never")
    monkeypatch.setattr(watch, "HELD_TOO_LONG", -1.0)

    def too_late() -> datetime:
        assert guest.power() is PowerState.PAUSED
        HoldWatch([instance.local]).look(instance.local)
        wait_until(lambda: guest.power() is PowerState.RUNNING, 10, "the watch has let go of the guest")
        return now()

    with monkeypatch.context() as patched:
        patched.setattr(live, "now", too_late)
        with pytest.raises(LetGoTooEarly):
            live.take(instance, spec, Alone(operation))
    assert live.take(instance, spec, Alone(operation)).method == "mirror"


def test_a_guest_that_cannot_be_let_go_of_does_not_hold_up_the_others(
    lab: LabHost, guest: Guest, instance: LocalInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HELD_TOO_LONG", 0.5)
    monkeypatch.setattr(holding, "LET_GO_WITHIN", 5.0)
    who = {"name": guest.name, "uuid": str(guest.uuid), "host": lab.name}
    hopeless, paused = (instance.local.data.unfinished_snapshot(f"{what}-{guest.name}").create() for what in ("h", "p"))
    note_intent(hopeless, Intent(frozen=True, **who))  # it has no agent that could thaw it
    note_intent(paused, Intent(paused=True, **who))
    guest.pause()
    other = LocalHost("other", instance.local.settings)  # a control worker may look after several hosts
    holds = HoldWatch([instance.local, other])

    def released() -> bool:
        began = time.monotonic()
        for host in (instance.local, other):
            holds.look(host)
        assert time.monotonic() - began < 1
        intent = intent_of(paused)
        return intent is not None and intent.released

    wait_until(released, 5, "the one that can be let go of is")
    assert guest.power() is PowerState.RUNNING
    still = intent_of(hopeless)
    assert still is not None
    assert not still.released


def test_a_guest_that_is_off_is_copied_once_more_after_its_host_was_started_anew(
    guest: Guest, instance: LocalInstance
) -> None:
    """What was copied before need not have reached the disk, but what it was copied from has not changed."""
    ctx, spec = Alone(f"op-{guest.name}"), SnapshotSpec()
    guest.destroy()
    taken = live.take(instance, spec, ctx).model_copy(update={"boot": "earlier"})
    folder = instance.local.data.unfinished_snapshot(ctx.operation)
    folder.instant.write_text(taken.model_dump_json())
    folder.disk("vda", "qcow2").write_bytes(b"not all of it")
    extracted = extract.extract(instance, spec, taken, ctx)
    for disk, copy in zip(guest.disks(), extracted.disks, strict=True):
        subprocess.run(["qemu-img", "compare", "-q", str(disk.path), str(copy.path)], check=True)
    made_at = folder.disk("vda", "qcow2").stat().st_ctime_ns
    assert extract.extract(instance, spec, taken, ctx) == extracted
    assert folder.disk("vda", "qcow2").stat().st_ctime_ns == made_at  # finished in this boot
    assert extract.publish(instance, extracted, ctx).definition
    snapshots.remove(instance.local.data, ctx.operation)
    guest.start()
    with pytest.raises(SnapshotDamaged, match="started anew"):  # and has written since
        extract.extract(instance, spec, taken, ctx)


def test_a_worker_that_is_killed_as_a_snapshot_appears_loses_nothing(
    guest: Guest, instance: LocalInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, spec = Alone(f"op-{guest.name}"), SnapshotSpec()
    extracted = extract.extract(instance, spec, live.take(instance, spec, ctx), ctx)

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "publish_folder", killed)
        with pytest.raises(KilledError):
            extract.publish(instance, extracted, ctx)
    published = extract.publish(instance, extracted, ctx)
    assert snapshots.require(instance.local.data, ctx.operation) == published
    assert f"<name>{guest.name}</name>" in published.definition
    data = instance.local.data
    data.snapshot(published.id).disk("vda", "qcow2").unlink()
    with pytest.raises(SnapshotDamaged):
        snapshots.prove(data, published, published.disks[0], ctx)
    snapshots.remove(instance.local.data, ctx.operation)


def test_an_increment_of_a_guest_that_is_off_is_a_full_one_beside_the_chain(
    guest: Guest, instance: LocalInstance
) -> None:
    data, spec = instance.local.data, SnapshotSpec(incremental=True)

    def snapshot(number: int) -> Snapshot:
        ctx = Alone(f"{guest.name}-{number}")
        reserve(instance, spec, ctx)
        return extract.publish(instance, extract.extract(instance, spec, live.take(instance, spec, ctx), ctx), ctx)

    first = snapshot(1)
    guest.destroy()
    off = snapshot(2)
    assert (off.method, off.parent, off.checkpoint) == ("cold", None, None)
    assert "full instead of incremental" in off.notes[0]
    guest.start()
    assert snapshot(3).parent == first.id
    for number in (3, 2, 1):
        snapshots.remove(data, f"{guest.name}-{number}")
