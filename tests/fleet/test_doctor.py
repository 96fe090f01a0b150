"""The doctor finds each fault that is injected here, says what to do, repairs what is safe, and loses no disk."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tasks.doctor import examine_fleet
from tests.conftest import settings
from tests.fleet.parts import Record, Scheduler, domains, idle_image, redis_keys, remains, virsh
from tests.lab import Fleet, LabHost, free_port, lab_folder, wait_until
from tests.lab.fleet import COMMAND
from tests.lab.host import KVM
from tests.lab.process import REPOSITORY
from worker.context import Alone
from worker.findings import Finding
from worker.images.layout import SnapshotDir
from worker.images.reserve import Ledger

HOST = "hosta"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has a qemu:///system of its own and can mount")

Spawn = Callable[..., Record]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """A fleet of this module's own: its faults are nobody else's business."""
    with lab_folder() as folder, Fleet(folder, [HOST]) as fleet, settings(redis_url=fleet.redis.url):
        yield fleet


@pytest.fixture(scope="module")
def host(fleet: Fleet) -> LabHost:
    return fleet.hosts[HOST]


@pytest.fixture(scope="module")
def scheduler(fleet: Fleet) -> Scheduler:
    return Scheduler(fleet.redis.url)


@pytest.fixture(autouse=True)
def nothing_remains(fleet: Fleet) -> Iterator[None]:
    """Each test removes the fault that it made."""
    yield
    assert not remains(fleet)


@pytest.fixture
def name() -> str:
    return f"guest-{uuid4().hex[:6]}"


@pytest.fixture
def guest(scheduler: Scheduler, host: LabHost, name: str) -> Iterator[Record]:
    """A running instance whose guest idles."""
    image = host.images / "idle.qcow2"
    if not image.exists():
        idle_image(image)
    record = scheduler.call("spawn", name=name, host=HOST, image=str(image), memory_mib=64)
    assert record["state"] == "succeeded"
    yield record
    assert scheduler.call("destroy", instance=name)["state"] == "succeeded"


def examine(*, fix: bool = False, timeout: float = 60) -> dict[str, Finding]:
    """What the doctor complains about, by code; there must be no two of a kind, and each says what to do."""
    told = [one for one in examine_fleet([HOST], fix=fix, timeout=timeout) if one.severity in {"warning", "error"}]
    found = {one.code: one for one in told}
    assert len(found) == len(told), told
    assert all(one.what and one.remedy for one in told), told
    return found


def examine_here(fleet: Fleet, *options: str, **variables: str) -> tuple[int, dict[str, Finding]]:
    """Exit code and complaints of `virtfleet doctor --local` on the host, with these settings."""
    return run_on(fleet.hosts[HOST], *options, **fleet.env, **variables)


def run_on(host: LabHost, *options: str, **variables: str) -> tuple[int, dict[str, Finding]]:
    env: Mapping[str, str] = {**os.environ, **host.env, **variables}
    command = [*COMMAND, "doctor", "--local", "--host", HOST, "--json", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, check=False, capture_output=True, text=True, timeout=60)
    findings = [Finding.model_validate(one) for one in json.loads(done.stdout)["findings"]]
    return done.returncode, {one.code: one for one in findings if one.severity in {"warning", "error"}}


def instance_folder(host: LabHost, record: Record) -> Path:
    return host.data / "instances" / str(record["uuid"])


# --- nothing wrong ----------------------------------------------------------------------------------------------------


def test_of_a_healthy_fleet_with_a_guest_there_is_nothing_to_complain_about(fleet: Fleet, guest: Record) -> None:
    done = fleet.cli("doctor")
    assert (done.returncode, done.stdout.startswith("Nothing to complain about")) == (0, True), (
        done.stdout + done.stderr
    )
    assert examine() == {}
    assert examine_here(fleet) == (0, {})


def test_what_a_running_operation_owns_is_left_alone(
    fleet: Fleet, host: LabHost, scheduler: Scheduler, name: str
) -> None:
    image = idle_image(host.images / "waits.qcow2")
    wanted = {"name": name, "host": HOST, "image": str(image), "wait_for": "console", "console_line": "never"}
    waiting = scheduler.send("spawn", operation_id=f"op-{name}", memory_mib=64, **wanted)
    wait_until(lambda: domains(host).get(name), 20, "the guest runs")
    unfinished = host.data / "tmp" / f"op-{name}@root.qcow2"
    unfinished.touch()
    virsh(host, "undefine", name)
    assert examine(fix=True) == {}
    assert unfinished.exists()
    assert "no" in virsh(host, "dominfo", name).partition("Persistent:")[2].splitlines()[0]
    assert fleet.cli("cancel", f"op-{name}").returncode == 3
    assert waiting.get(timeout=30)["state"] == "cancelled"
    assert examine(fix=True).keys() == {"temporary_file"}
    assert not unfinished.exists()


# --- files ------------------------------------------------------------------------------------------------------------


def test_temporary_files_of_operations_that_are_over_are_removed(host: LabHost) -> None:
    orphan = host.data / "tmp" / "op-long-gone@root.qcow2"
    orphan.write_bytes(b"half a disk")
    found = examine()
    assert found.keys() == {"temporary_file"}
    assert (found["temporary_file"].where, found["temporary_file"].fixable) == (str(orphan), True)
    assert orphan.exists()
    assert examine(fix=True)["temporary_file"].fixed
    assert not orphan.exists()
    assert examine() == {}


def test_a_snapshot_that_nobody_finishes_is_removed(host: LabHost) -> None:
    orphan = host.data / "snapshots" / ".op-long-gone.unfinished"
    orphan.mkdir()
    (orphan / "vda.qcow2").write_bytes(b"half a disk")
    found = examine()
    assert found.keys() == {"unfinished_snapshot"}
    assert "op-long-gone" in found["unfinished_snapshot"].what
    assert examine(fix=True)["unfinished_snapshot"].fixed
    assert not orphan.exists()
    assert examine() == {}


def test_space_kept_for_an_operation_that_is_over_is_given_back(host: LabHost) -> None:
    ledger = Ledger(host.data)
    ledger.reserve("op-long-gone", 5 * 1024**2, host.data / "nothing", 0, Alone())
    found = examine()
    assert found.keys() == {"stale_promise"}
    assert "5.0 MiB" in found["stale_promise"].what
    assert examine(fix=True)["stale_promise"].fixed
    assert ledger.outstanding() == 0
    assert examine() == {}


@pytest.mark.parametrize("where", ["images/notes.txt", "snapshots/lost"])
def test_what_is_no_image_and_no_snapshot_is_told_of_and_kept(host: LabHost, where: str) -> None:
    path = host.data / where
    path.mkdir()
    try:
        found = examine(fix=True)
        assert [(one.code, one.where, one.fixable) for one in found.values()] == [("stray_file", str(path), False)]
    finally:
        path.rmdir()


def test_an_image_whose_note_is_lost_is_told_of_and_kept(host: LabHost) -> None:
    path = host.data / "images" / f"{'0' * 64}.qcow2"
    path.write_bytes(b"perhaps the base of a guest")
    assert examine() == {}, "one that has just been put in place is about to be noted"
    os.utime(path, (0, 0))
    found = examine(fix=True)
    assert found.keys() == {"image_without_note"}
    assert not found["image_without_note"].fixable
    path.unlink()


def test_a_snapshot_that_lacks_what_it_builds_on_is_an_error(
    host: LabHost, scheduler: Scheduler, guest: Record
) -> None:
    for snapshot in ("first", "second"):
        taken = scheduler.call("snapshot", instance=guest["instance"], operation_id=snapshot, incremental=True)
        assert taken["state"] == "succeeded", taken["error"]
    away = host.data / "first"
    (host.data / "snapshots" / "first").rename(away)
    found = examine()
    assert found["broken_snapshot"].where == str(host.data / "snapshots" / "second")
    assert "snapshot first" in found["broken_snapshot"].what
    away.rename(host.data / "snapshots" / "first")
    assert examine() == {}
    for snapshot in ("second", "first"):
        assert scheduler.call("snapshot_delete", snapshot=snapshot)["state"] == "succeeded"


def test_disks_without_a_domain_are_never_removed(fleet: Fleet, host: LabHost) -> None:
    folder = host.data / "instances" / str(uuid4())
    folder.mkdir()
    (folder / "root.qcow2").write_bytes(b"the last copy")
    done = fleet.cli("doctor", "--fix", "--json")
    told = [one for one in json.loads(done.stdout)["findings"] if one["severity"] != "ok"]
    assert [(one["code"], one["where"], one["fixable"]) for one in told] == [
        ("files_without_domain", str(folder), False)
    ]
    assert "last copy" in told[0]["what"]
    assert f"rm -r {folder}" in told[0]["remedy"]
    assert done.returncode == 1
    assert (folder / "root.qcow2").read_bytes() == b"the last copy"
    shutil.rmtree(folder)


def test_the_empty_folder_of_a_vanished_instance_is_removed(host: LabHost) -> None:
    folder = host.data / "instances" / str(uuid4())
    folder.mkdir()
    (folder / ".lock").touch()
    assert examine(fix=True)["empty_folder"].fixed
    assert not folder.exists()


def test_unknown_files_are_told_of_and_unfinished_ones_removed(host: LabHost, guest: Record) -> None:
    stray, unfinished = (instance_folder(host, guest) / name for name in ("notes.txt", ".swap.raw.1.2.tmp"))
    stray.touch()
    unfinished.touch()
    found = examine(fix=True)
    assert {code: one.fixed for code, one in found.items()} == {"stray_file": False, "temporary_file": True}
    assert stray.exists()
    assert not unfinished.exists()


def test_a_lost_disk_is_an_error_that_nothing_repairs(host: LabHost, guest: Record) -> None:
    disk = instance_folder(host, guest) / "root.qcow2"
    aside = host.data / "aside"
    disk.rename(aside)
    found = examine(fix=True)
    assert found.keys() == {"missing_file"}
    assert (found["missing_file"].where, found["missing_file"].fixed) == (str(disk), False)
    assert "leave it on" in found["missing_file"].remedy
    assert domains(host)[guest["instance"]]
    aside.rename(disk)


def test_little_space_is_told_before_it_is_an_error(fleet: Fleet, host: LabHost) -> None:
    available = os.statvfs(host.data).f_bavail * os.statvfs(host.data).f_frsize
    severities = {}
    for share in (0.5, 2):
        code, found = examine_here(fleet, VIRTFLEET_RESERVE_BYTES=str(int(share * available)))
        assert (code, set(found)) == (1, {"space"})
        severities[share] = found["space"].severity.value
    assert severities == {0.5: "warning", 2: "error"}


@AS_ROOT
def test_a_folder_that_qemu_cannot_pass_is_named(host: LabHost) -> None:
    for shut in (host.data, host.folder, host.data / "instances"):
        mode = shut.stat().st_mode
        shut.chmod(0o700)
        try:
            found = examine(fix=True)
        finally:
            shut.chmod(mode)
        assert found.keys() == {"reach"}
        assert (found["reach"].where, found["reach"].fixed) == (str(shut), False)


# --- domains ----------------------------------------------------------------------------------------------------------


def test_a_transient_guest_is_defined_again_while_it_runs(host: LabHost, guest: Record) -> None:
    name = guest["instance"]
    before, qemu = virsh(host, "dumpxml", "--inactive", name), host.qemu_pid(name)
    virsh(host, "undefine", name)
    assert not examine()["transient_domain"].fixed
    assert examine(fix=True)["transient_domain"].fixed
    assert examine() == {}
    assert host.qemu_pid(name) == qemu
    virsh(host, "destroy", name)
    assert virsh(host, "dumpxml", "--inactive", name) == before


def test_a_foreign_domain_is_nobodys_business(host: LabHost, tmp_path: Path) -> None:
    xml = "<domain type='qemu'><name>foreign</name><memory unit='MiB'>16</memory><os><type>hvm</type></os></domain>"
    (tmp_path / "foreign.xml").write_text(xml)
    virsh(host, "create", "--paused", str(tmp_path / "foreign.xml"))
    assert examine(fix=True) == {}
    assert domains(host) == {"foreign": True}
    virsh(host, "destroy", "foreign")


def test_a_stray_copy_is_ended_and_the_guest_stays_on_its_disk(host: LabHost, guest: Record) -> None:
    name, folder = guest["instance"], SnapshotDir(host.data / "snapshots" / ".over.unfinished").create()
    copy = str(folder.disk("vda", "qcow2"))
    virsh(host, "blockcopy", name, "vda", copy, "--format", "qcow2", "--transient-job")
    found = examine(fix=True)
    assert found.keys() == {"stray_job", "unfinished_snapshot"}
    assert (found["stray_job"].where, found["stray_job"].fixed) == (f"{name}: vda", True)
    assert virsh(host, "blockjob", name, "vda") == ""
    assert str(instance_folder(host, guest) / "root.qcow2") in virsh(host, "domblklist", name)
    assert examine() == {}


@AS_ROOT
def test_a_foreign_backup_is_told_of_and_goes_on(host: LabHost, guest: Record, tmp_path: Path) -> None:
    name, scratch = guest["instance"], host.folder / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    (tmp_path / "backup.xml").write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{scratch}/nbd'/><disks><disk name='vda'"
        f" type='file'><scratch file='{scratch}/vda.qcow2'/></disk></disks></domainbackup>"
    )
    virsh(host, "backup-begin", name, str(tmp_path / "backup.xml"))
    assert examine(fix=True) == {}  # which is no complaint
    [told] = [one for one in examine_fleet([HOST], fix=True, timeout=60) if one.code == "foreign_job"]
    assert "Backup" in virsh(host, "domjobinfo", name)
    virsh(host, *told.remedy.rpartition("virsh ")[2].split())
    assert "None" in virsh(host, "domjobinfo", name)


def test_an_unknown_checkpoint_is_told_of_and_kept(host: LabHost, guest: Record) -> None:
    name = guest["instance"]
    virsh(host, "checkpoint-create-as", name, "nightly")
    found = examine(fix=True)
    assert (found["unknown_checkpoint"].where, found["unknown_checkpoint"].fixed) == (f"{name}: nightly", False)
    assert "nightly" in virsh(host, "checkpoint-list", name)
    virsh(host, "checkpoint-delete", name, "nightly")


# --- the host ---------------------------------------------------------------------------------------------------------


@contextmanager
def silent_dns(host: LabHost, folder: Path) -> Iterator[None]:
    """The host knows no name of its own, and the only name server answers nothing."""
    address = f"127.53.{os.getpid() % 250 + 1}.53"
    (folder / "resolv.conf").write_text(f"nameserver {address}\noptions timeout:2 attempts:2\n")
    names = host.folder / "hosts"
    before = names.read_text()
    inside = ["nsenter", f"--target={host.processes()[0]}", "--mount", "--pid"]
    subprocess.run([*inside, "mount", "--bind", str(folder / "resolv.conf"), "/etc/resolv.conf"], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        names.write_text("127.0.0.1 localhost\n")
        try:
            yield
        finally:
            names.write_text(before)
            subprocess.run([*inside, "umount", "/etc/resolv.conf"], check=True)


@AS_ROOT
def test_a_host_that_cannot_resolve_its_own_name_is_told_so(host: LabHost, tmp_path: Path) -> None:
    with silent_dns(host, tmp_path):
        found = examine()
    assert found.keys() == {"hostname"}
    assert HOST in found["hostname"].remedy
    assert examine() == {}


class HostWithShutKvm(LabHost):
    """A host on which root can open /dev/kvm, and QEMU's user cannot."""

    def _boot_script(self) -> str:
        shut = self.folder / "shut-kvm"
        masks = [line for line in super()._boot_script().splitlines() if KVM not in line]
        device = [f"mknod -m 600 {shut} c 10 232", f"mount --bind {shut} {KVM}"]
        return "\n".join([*device, *masks])


@pytest.mark.skipif(not os.access(KVM, os.R_OK | os.W_OK), reason=f"root must be able to open {KVM}")
@AS_ROOT
def test_a_kvm_device_that_is_shut_to_qemu_is_told_of(fleet: Fleet) -> None:
    with lab_folder() as folder, HostWithShutKvm(HOST, folder) as host:
        _, found = run_on(host, VIRTFLEET_REDIS_URL=fleet.redis.url)
    assert found.keys() == {"kvm_device"}
    assert "chmod" in found["kvm_device"].remedy


def test_a_libvirtd_that_answers_nothing_is_told_of_in_time(fleet: Fleet, host: LabHost) -> None:
    orphan = host.data / "tmp" / "op-long-gone@x"
    orphan.touch()
    with host.libvirtd_frozen():
        code, found = examine_here(fleet, "--fix", VIRTFLEET_CONNECT_TIMEOUT="1")
    assert (code, set(found)) == (1, {"host_unreachable", "temporary_file"})
    assert not orphan.exists()


def test_a_host_whose_worker_does_not_answer_is_a_finding(fleet: Fleet) -> None:
    with fleet.worker(HOST, "control").frozen():
        found = examine(timeout=1)
    assert found.keys() == {"host_not_examined"}
    assert "--local" in found["host_not_examined"].remedy


def test_a_worker_that_is_not_there_is_a_finding(fleet: Fleet) -> None:
    with fleet.worker(HOST, "disk").frozen(), fleet.redis.client() as client:
        client.delete(f"virtfleet:alive:{HOST}:disk")  # as it would expire by itself
        found = examine()
    assert found.keys() == {"no_disk_worker"}
    fleet.wait_ready()


# --- Redis ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "wrong", "code", "severity"),
    [
        ("appendonly", "no", "redis_persistence", "error"),
        ("appendfsync", "everysec", "redis_persistence", "warning"),
        ("maxmemory-policy", "allkeys-lru", "redis_eviction", "error"),
    ],
)
def test_a_redis_that_may_forget_is_told_of(fleet: Fleet, setting: str, wrong: str, code: str, severity: str) -> None:
    with fleet.redis.client() as client:
        right = client.config_get(setting)[setting]
        client.config_set(setting, wrong)
        try:
            found = examine()
        finally:
            client.config_set(setting, right)
    assert found.keys() == {code}
    assert found[code].severity == severity
    assert f"config set {setting}" in found[code].remedy


def test_claims_and_leases_of_vanished_operations_are_removed(
    fleet: Fleet, scheduler: Scheduler, host: LabHost, name: str
) -> None:
    with fleet.redis.client() as client:
        client.set(f"virtfleet:claim:{name}", "op-vanished")
        client.set("virtfleet:lease:op-vanished:create_disks", "token")
    found = examine()
    assert found.keys() == {"stale_claim", "stale_lease"}
    assert "op-vanished" in found["stale_claim"].what
    assert all(one.fixed for one in examine(fix=True).values())
    assert redis_keys(fleet, "virtfleet:claim:*") | redis_keys(fleet, "virtfleet:lease:*") == set()


def test_who_waits_for_a_stale_claim_has_it_next_and_the_reaper_hears_of_it(
    fleet: Fleet, scheduler: Scheduler, guest: Record
) -> None:
    name, operation_id = guest["instance"], f"op-{guest['instance']}"
    with fleet.redis.client() as client:
        client.set(f"virtfleet:claim:{name}", "op-owner")
        client.hset("virtfleet:op:op-owner", "state", "running")
        waiting = scheduler.send("pause", instance=name, operation_id=operation_id, wait_if_busy=True)
        wait_until(lambda: redis_keys(fleet, f"virtfleet:waiting:{name}"), 10, "the pause waits")
        client.zrem("virtfleet:attention", operation_id)
        assert examine(fix=True)["unattended_operation"].fixed
        assert client.zscore("virtfleet:attention", operation_id) is not None
        client.delete("virtfleet:op:op-owner")
    assert fleet.cli("doctor", "--fix").returncode == 0
    assert waiting.get(timeout=20)["state"] == "succeeded"


def test_a_damaged_record_hides_nothing_else(fleet: Fleet) -> None:
    with fleet.redis.client() as client:
        client.hset("virtfleet:op:op-damaged", "state", "running")
        client.zadd("virtfleet:operations", {"op-damaged": 1})
        client.set("virtfleet:claim:nothing", "op-vanished")
        found = examine(fix=True)
        client.delete("virtfleet:op:op-damaged")
        client.zrem("virtfleet:operations", "op-damaged")
    assert {code: one.fixed for code, one in found.items()} == {"unreadable_record": False, "stale_claim": True}


def test_a_registry_that_differs_from_the_host_is_put_right(fleet: Fleet, guest: Record) -> None:
    name = guest["instance"]
    with fleet.redis.client() as client:
        entry = json.loads(str(client.hget("virtfleet:instances", name)))

        def told() -> bool:
            """Unless the worker's own survey was faster, which comes once a minute."""
            client.hset("virtfleet:instances", name, json.dumps({**entry, "power": "off"}))
            found = examine(fix=True).get("registry")
            return found is not None and found.fixed

        wait_until(told, 20, "the difference is found and put right")
        assert json.loads(str(client.hget("virtfleet:instances", name)))["power"] == "running"
        client.hdel("virtfleet:instances", name)
        assert examine(fix=True)["registry"].fixed
        assert examine() == {}


def test_without_redis_the_host_is_examined_and_nothing_repaired(fleet: Fleet, host: LabHost) -> None:
    orphan = host.data / "tmp" / "op-long-gone@x"
    orphan.touch()
    nowhere = {"VIRTFLEET_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    code, found = run_on(host, "--fix", **nowhere)
    assert (code, set(found)) == (4, {"broker_unavailable", "temporary_file"})
    assert orphan.exists()
    env = {**os.environ, **nowhere}
    done = subprocess.run([*COMMAND, "doctor"], cwd=REPOSITORY, env=env, check=False, capture_output=True, text=True)
    assert (done.returncode, "broker_unavailable" in done.stderr) == (4, True)
    orphan.unlink()
