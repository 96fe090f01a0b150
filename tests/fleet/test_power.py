"""Power: each verb does what it says, asking for what already is succeeds and says so, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Record, Scheduler, domains, libvirt_of, snapshots, virsh
from tests.lab import Fleet, LabHost, wait_until
from worker.compute import power, provision
from worker.compute.local import LocalHost, LocalInstance
from worker.compute.power import BY_FORCE, Patience
from worker.compute.snapshots import clean
from worker.context import Alone
from worker.errors import Cancelled, FencedOff
from worker.settings import Settings

READY = "virtfleet-guest ready"


def note(record: Record) -> str:
    assert record["state"] == "succeeded", record["error"]
    return str(record["result"]["note"])


def state_of(host: LabHost, name: str) -> str:
    return virsh(host, "domstate", name).strip()


def boots(host: LabHost, record: Record) -> int:
    """How often the guest has come up, by its console."""
    log = host.data / "instances" / str(record["uuid"]) / "console.log"
    return log.read_text(errors="replace").count(READY)


def test_a_guest_that_listens_is_never_forced(host: LabHost, scheduler: Scheduler, spawn: Spawn, real: Path) -> None:
    record = spawn(image=str(real), memory_mib=128, wait_for="console", console_line=READY)
    name = record["instance"]

    assert "shut down by itself" in note(scheduler.call("reboot", instance=name))
    assert state_of(host, name) == "running"
    wait_until(lambda: boots(host, record) == 2, 60, "the guest boots a second time")

    # Paused it could neither hear the request nor save its data: it is let run first.
    assert note(scheduler.call("pause", instance=name)) == "paused"
    assert "shut down by itself" in note(scheduler.call("power_off", instance=name))
    assert state_of(host, name) == "shut off"
    assert note(scheduler.call("power_off", instance=name)) == "already off"

    # A guest that still boots ignores the button, and hears it when it is pressed once more.
    assert note(scheduler.call("power_on", instance=name)) == "started"
    off = scheduler.call("power_off", instance=name, timeout=60, retry_interval=1)
    assert "shut down by itself" in note(off)
    assert off["seconds"] > 1


def test_a_guest_that_ignores_the_button_is_asked_again_then_forced(
    host: LabHost, scheduler: Scheduler, spawn: Spawn
) -> None:
    name = spawn()["instance"]
    off = scheduler.call("power_off", instance=name, timeout=2, retry_interval=0.5)
    assert note(off) == "did not shut down within 2 s (asked 4 times): powered off by force"
    assert 2 <= off["seconds"] < 4
    assert state_of(host, name) == "shut off"


@pytest.mark.parametrize(
    ("verb", "force", "after"),
    [("power_off", {"timeout": 0}, "shut off"), ("reboot", {"hard": True}, "running")],
)
def test_force_does_not_ask_nor_wait(
    host: LabHost, scheduler: Scheduler, spawn: Spawn, verb: str, force: dict[str, Any], after: str
) -> None:
    name = spawn()["instance"]
    pid = host.qemu_pid(name)
    began = time.monotonic()
    assert "powered off by force" in note(scheduler.call(verb, instance=name, **force))
    assert time.monotonic() - began < 3
    assert state_of(host, name) == after
    assert not Path(f"/proc/{pid}").exists()


def test_what_already_is_succeeds_and_says_so(
    host: LabHost, scheduler: Scheduler, command: Commands, spawn: Spawn
) -> None:
    name = spawn()["instance"]
    said = []
    for verb in ("power_on", "resume", "pause", "pause", "power_on", "resume", "resume"):
        said.append(note(scheduler.call(verb, instance=name)))
    assert said == [
        "already running",
        "already running",
        "paused",
        "already paused",
        "already on, but paused: resume it to let it run",
        "resumed",
        "already running",
    ]
    first, second = (command("power", "off", name, "--timeout=0") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "powered off by force" in first.stdout
    assert "already off" in second.stdout
    assert domains(host) == {name: False}


@pytest.mark.parametrize("verb", ["reboot", "pause", "resume"])
def test_what_needs_a_running_guest_says_so_when_it_is_off(
    host: LabHost, scheduler: Scheduler, spawn: Spawn, verb: str
) -> None:
    name = spawn()["instance"]
    scheduler.call("power_off", instance=name, timeout=0)
    record = scheduler.call(verb, instance=name)
    assert (record["state"], record["error"]["code"]) == ("failed", "invalid_state")
    assert name in record["error"]["message"]
    assert record["error"]["hint"] == f"Start it: virtfleet power on {name}"
    assert domains(host) == {name: False}


def test_saved_memory_is_kept_and_gone_on_with(host: LabHost, scheduler: Scheduler, spawn: Spawn) -> None:
    name = spawn()["instance"]
    virsh(host, "managedsave", name)
    assert note(scheduler.call("power_off", instance=name)) == "already off, its memory saved"
    assert note(scheduler.call("power_on", instance=name)) == "resumed with its saved memory"
    assert state_of(host, name) == "running"


def test_a_guest_that_crashed_can_be_started_again(host: LabHost, scheduler: Scheduler, spawn: Spawn) -> None:
    name = spawn()["instance"]
    host.kill_guest(name)
    wait_until(lambda: domains(host) == {name: False}, 10, "libvirt sees that the guest is gone")
    assert note(scheduler.call("power_on", instance=name)) == "started"


def test_each_deed_marks_the_domain_with_its_operation(host: LabHost, scheduler: Scheduler, spawn: Spawn) -> None:
    name = spawn()["instance"]
    fences = []
    for verb in ("pause", "resume"):
        record = scheduler.call(verb, instance=name)
        with libvirt_of(host) as connection:
            mark = connection.lookupByName(name).metadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT, "urn:virtfleet:instance:1", libvirt.VIR_DOMAIN_AFFECT_CONFIG
            )
        assert record["id"] in mark
        fences.append(int(mark.partition('fence="')[2].partition('"')[0]))
    assert fences == sorted(set(fences))


@pytest.mark.parametrize("verb", ["power_on", "power_off", "reboot", "pause", "resume"])
def test_an_unknown_instance_is_refused(scheduler: Scheduler, command: Commands, verb: str) -> None:
    record = scheduler.call(verb, instance="nobody")
    assert (record["state"], record["error"]["code"]) == ("rejected", "instance_not_found")
    done = command("power", verb.removeprefix("power_"), "nobody")
    assert done.returncode == 2
    assert "nobody" in done.stderr
    assert "virtfleet instances" in done.stderr


# --- what goes wrong ------------------------------------------------------------------------------------------------


def on_host(host: LabHost, record: Record) -> LocalInstance:
    """The instance as verbs see it that run beside the fleet."""
    settings = Settings(data_dir=host.data, libvirt_uri=host.uri)
    return LocalInstance(LocalHost(host.name, settings), record["instance"], record["uuid"])


def test_a_reboot_that_is_tried_again_reboots_once(host: LabHost, spawn: Spawn) -> None:
    """As when its worker dies after the guest was started, and before that is put down."""
    record = spawn()
    fence = int(time.time() * 1e6)
    first, again = (Alone("op-reboot", fence + attempt) for attempt in (1, 2))
    assert power.reboot(on_host(host, record), BY_FORCE, first).note == "powered off by force, then started"
    with libvirt_of(host) as connection:
        domain = connection.lookupByName(record["instance"])
        started = domain.ID()
        assert "by an attempt whose worker died" in power.reboot(on_host(host, record), BY_FORCE, again).note
        assert domain.ID() == started
        power.reboot(on_host(host, record), BY_FORCE, Alone("op-another", fence + 3))
        assert connection.lookupByName(record["instance"]).ID() != started


class CancelledOnceAsked(Alone):
    """A step that is told to stop as soon as the guest was asked to shut down."""

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        if "asked 1 times" in note:
            raise Cancelled("asked to stop")


def test_a_cancelled_reboot_leaves_a_guest_that_runs(host: LabHost, spawn: Spawn, real: Path) -> None:
    """It was asked to shut down, which nobody can take back: it goes off after the cancel."""
    record = spawn(image=str(real), memory_mib=128, wait_for="console", console_line=READY)
    instance, fence = on_host(host, record), int(time.time() * 1e6)
    step = CancelledOnceAsked("op-reboot", fence)
    with pytest.raises(Cancelled):
        power.reboot(instance, Patience(), step)
    (first, _), (second, _) = reversed(step.undone_by)
    assert (first, second) == ("await_shutdown", "power_on")
    undo = Alone("op-reboot", fence + 1)
    power.await_shutdown(instance, undo)
    assert state_of(host, record["instance"]) == "shut off"
    assert power.power_on(instance, undo).note == "started"
    wait_until(lambda: boots(host, record) == 2, 60, "it has come up again")


@pytest.mark.parametrize("verb", ["power_off", "reboot"])
def test_a_paused_guest_is_paused_again_though_another_worker_had_let_it_run(
    verb: str, fleet: Fleet, host: LabHost, scheduler: Scheduler, command: Commands, spawn: Spawn
) -> None:
    """It runs to hear the request; the attempt that knows that it was paused dies, and then a cancel comes."""
    name = spawn()["instance"]
    scheduler.call("pause", instance=name)
    operation = f"{verb}-of-{name}"
    answer = scheduler.send(verb, instance=name, operation_id=operation, timeout=60)
    wait_until(lambda: state_of(host, name) == "running", 20, "it is let run")
    worker = fleet.worker("hosta", "control")
    worker.kill9()
    assert command("cancel", operation, "--no-wait").returncode == 0
    worker.start()
    assert answer.get(timeout=60)["state"] == "cancelled"
    assert state_of(host, name) == "paused"


def test_a_guest_that_takes_its_time_to_shut_down_is_started_again_after_a_cancel(
    host: LabHost, spawn: Spawn, scheduler: Scheduler
) -> None:
    """The operation is over by then; its host sees to it, unless another operation has had to do with the guest."""
    record = spawn()
    instance, ctx = on_host(host, record), Alone("op-cancelled", int(time.time() * 1e6))
    power.power_on(instance, ctx)  # this operation's mark is on it
    began = time.monotonic()
    power.await_shutdown(instance, ctx)
    assert time.monotonic() - began < 2
    assert state_of(host, record["instance"]) == "running"
    with libvirt_of(host) as connection:
        connection.lookupByName(record["instance"]).destroy()  # as if it had shut down at last
        wait_until(lambda: state_of(host, record["instance"]) == "running", 20, "it is started again")
        wait_until(lambda: not list((host.data / "comebacks").iterdir()), 20, "and not a second time")

        power.await_shutdown(instance, ctx)
        assert scheduler.call("power_off", instance=record["instance"], timeout=0)["state"] == "succeeded"
        wait_until(lambda: not list((host.data / "comebacks").iterdir()), 20, "it is somebody else's now")
        assert state_of(host, record["instance"]) == "shut off"


class TooLate(Alone):
    """A step that is told to stop before it does what nobody can take back."""

    def make_irrevocable(self) -> None:
        raise Cancelled("asked to stop")


def test_who_is_cancelled_before_the_first_thing_goes_has_lost_nothing(
    host: LabHost, spawn: Spawn, snapshot: Spawn
) -> None:
    record = spawn()
    taken = snapshot(record["instance"])
    instance, fence = on_host(host, record), int(time.time() * 1e6)
    for remove in (provision.destroy, partial(clean.delete, snapshot=taken["id"])):
        with pytest.raises(Cancelled):
            remove(instance, ctx=TooLate("op-too-late", fence))
    assert state_of(host, record["instance"]) == "running"
    assert (instance.folder.root("qcow2").exists(), [one.id for one in snapshots(host)]) == (True, [taken["id"]])


class Overtaken(Alone):
    """A step that is taken over by another while it waits for the guest."""

    waited = False

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self.waited = True

    def check(self) -> None:
        if self.waited:
            raise FencedOff("another worker has taken over")


def test_a_step_that_was_overtaken_forces_nothing(host: LabHost, spawn: Spawn) -> None:
    record = spawn()
    with pytest.raises(FencedOff):
        power.power_off(on_host(host, record), Patience(timeout=0.5), Overtaken("op-late", int(time.time() * 1e6)))
    assert state_of(host, record["instance"]) == "running"


def test_a_fence_from_a_redis_that_was_lost_is_outgrown(host: LabHost, scheduler: Scheduler, spawn: Spawn) -> None:
    record = spawn()
    ahead = int(time.time() * 1e6) + 10**12
    power.pause(on_host(host, record), Alone("op-elsewhere", ahead))
    assert note(scheduler.call("resume", instance=record["instance"])) == "resumed"


def test_the_power_of_a_qemu_that_hangs_can_be_taken_away(host: LabHost, scheduler: Scheduler, spawn: Spawn) -> None:
    """What was asked of it before keeps libvirt from everything else, also from marking the domain."""
    name = spawn()["instance"]
    os.kill(host.qemu_pid(name), signal.SIGSTOP)
    with subprocess.Popen(["virsh", "--quiet", "--connect", host.uri, "suspend", name], stderr=subprocess.DEVNULL):
        time.sleep(1)
        assert note(scheduler.call("power_off", instance=name, timeout=0)) == "powered off by force"
    assert state_of(host, name) == "shut off"
    assert note(scheduler.call("power_on", instance=name)) == "started"


@pytest.mark.thorough
def test_a_qemu_that_hangs_is_waited_for_and_holds_nobody_else_up(
    host: LabHost, scheduler: Scheduler, command: Commands, spawn: Spawn
) -> None:
    name, other = spawn()["instance"], spawn()["instance"]
    pid = host.qemu_pid(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        paused = scheduler.send("pause", instance=name, operation_id=f"hung-{name}")

        def error() -> dict[str, Any]:
            record = json.loads(command("operation", f"hung-{name}", "--json").stdout)
            return record["steps"][0]["error"] or {}

        assert note(scheduler.call("pause", instance=other)) == "paused"
        told = wait_until(error, 40, "the step gives this attempt up")
        assert (told["code"], told["attempts"]) == ("guest_hung", 6)
        found = {one["code"] for one in json.loads(command("doctor", "--json").stdout)["findings"]}
        assert "guest_hung" in found or "state_lock_busy" in found
        assert "host_not_examined" not in found
    finally:
        os.kill(pid, signal.SIGCONT)
    assert paused.get(timeout=60)["state"] == "succeeded"
    assert state_of(host, name) == "paused"
