"""Cold migration between two real hosts: what arrives, what is kept, and that anything before leaves all as it was."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.fleet.instances import Lab, definition, domain, domains, lab_of, virtual_sizes
from tests.fleet.moves import (
    FORCE,
    arrived,
    begin,
    cancel,
    contents,
    disks,
    ended,
    idle,
    kill_all_workers,
    kill_libvirtd,
    kill_redis,
    kill_workers,
    leftovers,
    nothing_remains,  # noqa: F401 - after each test
    runs_at_home_as_before,
    step,
    unmarked,
    write,
)
from tests.fleet.parts import idle_image, qemu_img, virsh
from tests.lab import lab_folder, wait_until
from worker.context import Alone
from worker.images.files import available_space
from worker.images.reserve import Ledger

HOSTS = ("hosta", "hostb")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_folder() as folder, lab_of(folder, *HOSTS, networked=True) as lab:
        for host in lab.fleet.hosts.values():
            idle_image(host.images / "idle.qcow2")
        yield lab


@pytest.mark.parametrize(
    "root", ["overlay", *(pytest.param(root, marks=pytest.mark.thorough) for root in ("copy", "raw"))]
)
def test_all_of_it_arrives_and_confirm_removes_what_was_left(lab: Lab, name: str, root: str) -> None:
    uuid = idle(lab, name, root_disk=root, ephemeral_gib=[1], swap_mib=16)
    with domain(lab.fleet.hosts["hosta"], name) as found:
        found.setAutostart(1)
    before, xml = contents(lab.folder("hosta", uuid)), definition(lab.fleet.hosts["hosta"], name)
    record = lab.done("migrate", instance=name, to="hostb", **FORCE)
    assert f"kept on hosta until it is decided: virtfleet migration confirm {name}" in record["result"]["note"]
    assert domains(lab.fleet.hosts["hosta"]) == {name: False}
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    assert contents(lab.folder("hostb", uuid)) == before
    for disk in disks(lab.folder("hostb", uuid)):
        there = lab.folder("hosta", f"{uuid}_resize") / disk.name
        assert disk.stat().st_blocks <= 1.02 * there.stat().st_blocks
    with domain(lab.fleet.hosts["hosta"], name) as found:
        assert found.autostart() == 0
        with pytest.raises(Exception, match=r"Cannot access storage file|No such file"):
            found.create()
    with domain(lab.fleet.hosts["hostb"], name) as found:
        assert found.autostart() == 1
    paths = str(lab.fleet.hosts["hosta"].data), str(lab.fleet.hosts["hostb"].data)
    assert unmarked(definition(lab.fleet.hosts["hostb"], name)) == unmarked(xml.replace(*paths))
    assert lab.instances()[name]["host"] == "hostb"
    assert lab.instances()[name]["move"]["leftover"] == "hosta"
    lab.succeed("migration", "confirm", name)
    assert domains(lab.fleet.hosts["hosta"]) == {}
    assert leftovers(lab, "hosta") == []
    assert lab.instances()[name]["move"] is None


def test_a_guest_goes_on_with_its_data_and_new_sizes(lab: Lab, name: str) -> None:
    uuid = lab.spawn(name, "hosta", "--ephemeral", "1", "--swap", "32")
    ready = ("--wait-for", "console", "--console-line", "told")
    sizes = ("--vcpus", "2", "--disk", "1", "--ephemeral", "2", "--swap", "16")
    lab.succeed("migrate", name, "--to", "hostb", *sizes, "--auto-confirm", *ready)
    told = lab.wait_told("hostb", uuid, 1)
    assert "mark-of-vda!mark-of-vdb!" in told
    assert "cpus: 2" in told
    assert f"vda: {1024**3} bytes" in told
    assert f"vdb: {2 * 1024**3} bytes" in told
    assert virtual_sizes(lab.folder("hostb", uuid))["swap.raw"] == 16 * 1024**2
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "it is confirmed by itself")
    assert leftovers(lab, "hosta") == []


def test_a_revert_brings_the_former_copy_back_and_the_other_one_goes(lab: Lab, name: str) -> None:
    uuid = idle(lab, name, ephemeral_gib=[1])
    before = contents(lab.folder("hosta", uuid))
    lab.done("migrate", instance=name, to="hostb", memory_mib=96, **FORCE)
    lab.done("revert", instance=name, **FORCE)
    assert domains(lab.fleet.hosts["hosta"]) == {name: True}
    assert "<memory unit='KiB'>65536</memory>" in definition(lab.fleet.hosts["hosta"], name)
    wait_until(lambda: lab.instances()[name]["move"] is None, 60, "the other copy goes")
    runs_at_home_as_before(lab, name, uuid, before)


def test_a_revert_waits_for_the_boot_that_it_begins(lab: Lab, name: str) -> None:
    """The former copy comes back with the log of its earlier boots."""
    uuid = lab.spawn(name, "hosta")
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    ready = ("--wait-for", "console", "--console-line", "told")
    lab.succeed("migration", "revert", name, "--timeout", "0", *ready)
    assert lab.boots("hosta", uuid) == 1
    assert "told" in (lab.folder("hosta", uuid) / "console.log.former").read_text(errors="replace")


def test_a_revert_that_was_undone_after_the_guest_ran_can_be_repeated(lab: Lab, name: str) -> None:
    uuid = lab.spawn(name, "hosta")  # it writes to its disk at each boot
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    in_vain = {"wait_for": "console", "console_line": "nobody says this", "ready_timeout": 12}
    undone = lab.call("revert", instance=name, **FORCE, **in_vain)
    assert undone["state"] == "failed"
    assert (domains(lab.fleet.hosts["hosta"]), domains(lab.fleet.hosts["hostb"])) == ({name: False}, {name: True})
    assert lab.instances()[name]["host"] == "hostb"
    lab.done("revert", instance=name, **FORCE)
    assert domains(lab.fleet.hosts["hosta"]) == {name: True}
    assert "mark-of-vda!" in lab.wait_told("hosta", uuid, 1)


def test_a_move_from_a_host_that_is_lost_can_be_settled(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    lost = [lab.fleet.worker("hosta", kind) for kind in ("control", "disk")]
    for worker in lost:
        worker.kill9()
    try:
        lab.succeed("migration", "confirm", name, "--source-gone")
        assert lab.instances()[name]["move"] is None
        lab.succeed("power", "off", name, "--timeout", "0")
    finally:
        for worker in lost:
            worker.start()
    aside = lab.folder("hosta", f"{uuid}_resize")
    told = {one["code"]: one for one in lab.run("doctor", "--host", "hosta").record["findings"]}
    assert told["former_copy"]["where"] == str(aside)
    assert "confirmed with --source-gone" in told["former_copy"]["remedy"]
    with domain(lab.fleet.hosts["hosta"], name) as found:
        found.undefine()
    shutil.rmtree(aside)


def test_what_has_waited_for_a_move_is_not_done_to_what_it_left_behind(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    moving = begin(lab, name)
    asked: dict[str, dict[str, Any]] = {
        "power_off": FORCE,
        "resize": {"memory_mib": 80, **FORCE},
        "migrate": {"to": "hostb"},
        "destroy": {},
    }

    def waits(kind: str) -> bool:
        return lab.field(f"{kind}-{name}", "state") == "waiting"

    for kind, how in asked.items():
        lab.scheduler.send(kind, instance=name, operation_id=f"{kind}-{name}", wait_if_busy=True, **how)
        wait_until(partial(waits, kind), 30, f"{kind} waits")
    assert ended(lab, moving)["state"] == "succeeded"
    for kind in asked:
        record = ended(lab, f"{kind}-{name}")
        assert (record["state"], record["error"]["code"]) == ("failed", "invalid_state"), record
    assert (domains(lab.fleet.hosts["hosta"]), domains(lab.fleet.hosts["hostb"])) == ({name: False}, {name: True})
    assert lab.instances()[name]["host"] == "hostb"
    lab.done("revert", instance=name, **FORCE)
    assert lab.folder("hosta", uuid).exists()


def test_a_guest_with_disks_that_are_not_the_fleets_is_neither_moved_nor_resized(lab: Lab, name: str) -> None:
    """They would be left behind: an overlay holds all that the guest has written since it was made."""
    uuid = idle(lab, name)
    host = lab.fleet.hosts["hosta"]
    with domain(host, name) as found:
        before = found.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    virsh(host, "snapshot-create-as", name, "s1", "--disk-only", "--no-metadata")
    overlay = lab.folder("hosta", uuid) / "root.s1"
    assert overlay.exists()
    for operation, how in (("migrate", {"to": "hostb"}), ("resize", {"memory_mib": 96})):
        refused = lab.call(operation, instance=name, **how, **FORCE)
        assert refused["error"]["code"] == "unsupported_by_host"
        assert str(overlay) in refused["error"]["message"]
    assert domains(host) == {name: True}
    assert overlay.exists()
    lab.done("power_off", instance=name, **FORCE)
    qemu_img("commit", "-f", "qcow2", str(overlay))
    with closing(libvirt.open(host.uri)) as connection:
        connection.defineXML(before)
    overlay.unlink()
    lab.done("migrate", instance=name, to="hostb", **FORCE)


@pytest.mark.thorough
def test_a_revert_leaves_a_changed_former_copy_alone(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    kept = lab.folder("hosta", f"{uuid}_resize") / "root.qcow2"
    write(kept, 1)
    assert lab.call("revert", instance=name, **FORCE)["error"]["code"] == "checksum_mismatch"
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    assert lab.instances()[name]["host"] == "hostb"


@pytest.mark.thorough
def test_while_a_move_is_undecided_neither_copy_can_be_moved_or_destroyed(lab: Lab, name: str) -> None:
    idle(lab, name)
    lab.done("migrate", instance=name, to="hostb", **FORCE)
    for refused, how in (("destroy", {}), ("migrate", {"to": "hosta"}), ("resize", {"vcpus": 2})):
        assert lab.call(refused, instance=name, **how)["error"]["code"] == "invalid_state"
    lab.succeed("hosts", "sync", "hosta")
    lab.succeed("hosts", "sync", "hostb")
    assert lab.instances()[name]["host"] == "hostb"
    assert lab.instances()[name]["move"]["leftover"] == "hosta"


@pytest.mark.thorough
def test_a_cut_cable_is_survived_without_sending_again_what_has_arrived(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    cable = lab.fleet.hosts["hosta"].cable
    assert cable
    before, size = contents(lab.folder("hosta", uuid)), lab.folder("hosta", uuid).joinpath("root.qcow2").stat().st_size
    operation, part = begin(lab, name, bandwidth_mib=8), lab.folder("hostb", uuid)
    wait_until(lambda: arrived(part) > size // 2, 120, "half of it has arrived")
    cable.cut()
    time.sleep(3)
    received, have = cable.received(), arrived(part)
    time.sleep(20)
    assert arrived(part) >= have
    cable.plug()
    record = ended(lab, operation)
    assert record["state"] == "succeeded", record["error"]
    assert step(record, "copy_disk:root.qcow2")["attempt"] > 1
    assert contents(lab.folder("hostb", uuid)) == before
    # Headers of TCP and ssh take 1 %.
    assert cable.received() - received < 1.02 * (size - have) + 0.05 * have


def test_a_full_destination_is_noticed_before_the_guest_is_stopped(lab: Lab, name: str) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    data = lab.fleet.hosts["hostb"].data
    ledger, free = Ledger(data), available_space(data)
    ledger.reserve("other", free - 2**20, data / "elsewhere", 0, Alone())  # another operation was promised it
    try:
        record = lab.call("migrate", instance=name, to="hostb", **FORCE)
    finally:
        ledger.release("other")
    assert record["error"]["code"] == "no_space"
    assert step(record, "shut_down_source")["state"] == "pending"
    runs_at_home_as_before(lab, name, uuid, before)


STEPS = [
    ("describe_source", "hosta"),
    ("preflight", "hostb"),
    ("prepare_destination", "hostb"),
    ("shut_down_source", "hosta"),
    ("set_aside", "hosta"),
    ("prepare_source", "hosta"),
    ("copy_disk:root.qcow2", "hostb"),
    ("fingerprint:root.qcow2", "hosta"),
    ("verify_disks", "hostb"),
    ("hand_over", "hosta"),
    ("define_destination", "hostb"),
    ("start_destination", "hostb"),
    ("release", "hosta"),
    ("take_over", "hostb"),
]


HANDOVERS = [
    one
    for one in STEPS
    if one[0].partition(":")[0] in {"set_aside", "copy_disk", "verify_disks", "release", "take_over"}
]
ROUNDS = [
    *((key, host, fault) for key, host in STEPS for fault in (kill_workers, kill_libvirtd, cancel)),
    *((key, host, fault) for key, host in HANDOVERS for fault in (kill_redis, kill_all_workers)),
]


FORGETTING = [  # the step that has begun, the host whose workers die there
    pytest.param("define_destination", "hostb", marks=pytest.mark.thorough),
    ("start_destination", "hostb"),
    pytest.param("release", "hosta", marks=pytest.mark.thorough),
    pytest.param("take_over", "hostb", marks=pytest.mark.thorough),
]


TAKE_NO_TIME = {"release": "{}_resize", "take_over": "{}"}
"""Steps that would be over before anything can be done to them, and the folder whose lock they wait for."""


@contextmanager
def lock_of_another(path: Path) -> Iterator[None]:
    """A lock is held by somebody who works on the instance, too."""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits, and so comes before workers, which look from time to time
        yield


@pytest.mark.parametrize(("key", "host"), FORGETTING)
@pytest.mark.parametrize("cancelled", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_what_one_host_alone_knows_is_waited_for_when_redis_has_forgotten(
    lab: Lab, name: str, key: str, host: str, cancelled: bool
) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    operation = begin(lab, name)
    with ExitStack() as stack:
        if key in TAKE_NO_TIME:
            starts = "step:start_destination:state"
            wait_until(lambda: lab.field(operation, starts) == "running", 60, "the guest is started")
            stack.enter_context(lock_of_another(lab.folder(host, TAKE_NO_TIME[key].format(uuid)) / ".lock"))
        wait_until(lambda: lab.field(operation, f"step:{key}:state") in ("running", "done"), 60, f"{key} begins")
        for worker in (lab.fleet.worker(host, kind) for kind in ("control", "disk")):
            worker.kill9()
            stack.callback(worker.start)
        runs_on = {one: domains(lab.fleet.hosts[one]).get(name) for one in HOSTS}
        lab.fleet.redis.flushall()
        wait_until(lambda: lab.field(operation, "held"), 60, "the other host puts its copy back")
        if cancelled:
            cancel(lab, host, operation)
        time.sleep(8)
        assert {one: domains(lab.fleet.hosts[one]).get(name) for one in HOSTS} == runs_on, "nothing is done meanwhile"
        assert "waits until each of its hosts" in json.dumps(lab.run("operations", "--stalled").record)
    record = ended(lab, operation)
    if cancelled and record["state"] == "cancelled":
        runs_at_home_as_before(lab, name, uuid, before)
        return
    assert record["state"] == "succeeded", json.dumps(record["error"], indent=1)
    assert {one: domains(lab.fleet.hosts[one])[name] for one in HOSTS} == {"hosta": False, "hostb": True}
    assert contents(lab.folder("hostb", uuid)) == before


@pytest.mark.thorough
@pytest.mark.parametrize(("key", "host", "fault"), ROUNDS)
def test_whatever_happens_in_a_step_the_guest_runs_on_one_host_with_its_data(
    lab: Lab, name: str, key: str, host: str, fault: Callable[[Lab, str, str], None]
) -> None:
    uuid = idle(lab, name)
    before = contents(lab.folder("hosta", uuid))
    operation = begin(lab, name)
    wait_until(lambda: lab.field(operation, f"step:{key}:state") in ("running", "done", "failed"), 60, f"{key} begins")
    fault(lab, host, operation)
    record = ended(lab, operation)
    if record["state"] == "cancelled" or (record["state"] == "failed" and fault is not cancel):
        runs_at_home_as_before(lab, name, uuid, before)
        return
    assert record["state"] == "succeeded", json.dumps(record["error"], indent=1)
    assert domains(lab.fleet.hosts["hosta"]) == {name: False}
    assert domains(lab.fleet.hosts["hostb"]) == {name: True}
    assert contents(lab.folder("hostb", uuid)) == before
    if fault is kill_workers:  # else it is confirmed, after the test
        lab.done("revert", instance=name, **FORCE)
        wait_until(lambda: lab.instances()[name]["move"] is None, 60, "the other copy goes")
        runs_at_home_as_before(lab, name, uuid, before)
