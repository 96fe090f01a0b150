"""One operation at a time owns an instance; the next is refused or queues; and what runs can be stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Page, Record, Scheduler, WebServer, domains, files, remains, virsh
from tests.lab import Fleet, LabHost, wait_until
from worker.models import MIB


def begun(command: Commands, operation: str, step: str) -> Callable[[], bool]:
    """Whether a step of an operation is being executed."""

    def look() -> bool:
        shown = json.loads(command("operation", operation, "--json").stdout)
        return any(one["name"] == step and one["state"] == "running" for one in shown.get("steps", ()))

    return look


@contextmanager
def stopped_as_it_appears(host: LabHost, name: str) -> Iterator[None]:
    """A guest's QEMU stands still from its first instructions on."""
    ended = threading.Event()

    def stop() -> None:
        while not ended.is_set():
            if pid := host.find_qemu(name):
                os.kill(pid, signal.SIGSTOP)
                return

    watch = threading.Thread(target=stop)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()
        if pid := host.find_qemu(name):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("verb", ["spawn", "power_on"])
def test_a_start_that_hangs_can_be_cancelled(
    verb: str, fleet: Fleet, host: LabHost, scheduler: Scheduler, command: Commands, spawn: Spawn, wanted: Record
) -> None:
    """libvirt waits for a QEMU that does not answer as long as it takes."""
    name, operation = wanted["name"], f"hung-{wanted['name']}"
    step = "spawn_instance" if verb == "spawn" else "power_on"
    if verb == "power_on":
        spawn(**wanted)
        scheduler.call("power_off", instance=name, timeout=0)
    arguments = wanted if verb == "spawn" else {"instance": name}
    with stopped_as_it_appears(host, name):
        answer = scheduler.send(verb, operation_id=operation, **arguments)
        wait_until(lambda: host.find_qemu(name), 20, "its QEMU appears")
        wait_until(begun(command, operation, step), 20, "the step is at work")
        time.sleep(2)
        assert begun(command, operation, step)()
        assert command("cancel", operation, "--no-wait").returncode == 0
        assert answer.get(timeout=60)["state"] == "cancelled"
        if verb == "spawn":
            assert remains(fleet) == {}
    if verb == "power_on":
        assert scheduler.call("power_off", instance=name, timeout=0)["state"] == "succeeded"


def test_a_busy_instance_is_refused_and_the_owner_named(
    command: Commands, scheduler: Scheduler, spawn: Spawn, name: str
) -> None:
    spawn(name=name)
    off = scheduler.send("power_off", instance=name, timeout=4, operation_id=f"off-{name}")
    wait_until(begun(command, f"off-{name}", "power_off"), 10, "the shutdown has begun")
    refused = scheduler.call("pause", instance=name)
    assert (refused["state"], refused["error"]["code"]) == ("rejected", "instance_busy")
    assert refused["error"]["details"]["owner"] == f"off-{name}"
    done = command("power", "pause", name)
    assert done.returncode == 1
    assert f"virtfleet watch off-{name}" in done.stderr
    assert off.get(timeout=30)["state"] == "succeeded"


def test_who_asked_to_wait_comes_in_turn(
    command: Commands, scheduler: Scheduler, host: LabHost, spawn: Spawn, name: str
) -> None:
    spawn(name=name)
    off = scheduler.send("power_off", instance=name, timeout=2, operation_id=f"off-{name}")
    wait_until(begun(command, f"off-{name}", "power_off"), 10, "the shutdown has begun")
    on = scheduler.send("power_on", instance=name, wait_if_busy=True, operation_id=f"on-{name}")
    waiting = wait_until(lambda: command("operation", f"on-{name}", "--json").stdout, 10, "the second is admitted")
    pause = command("power", "pause", name, "--wait-if-busy", "--json")
    assert json.loads(waiting).get("state", "waiting") == "waiting"
    first, second, third = off.get(timeout=30), on.get(timeout=30), json.loads(pause.stdout)
    assert [one["state"] for one in (first, second, third)] == ["succeeded"] * 3
    assert first["ended_at"] <= second["started_at"] <= second["ended_at"] <= third["started_at"]
    assert second["result"]["note"] == "started"
    assert virsh(host, "domstate", name).strip() == "paused"


def test_cancelling_who_waits_leaves_the_owner_alone(
    command: Commands, scheduler: Scheduler, host: LabHost, spawn: Spawn, name: str
) -> None:
    spawn(name=name)
    off = scheduler.send("power_off", instance=name, timeout=2, operation_id=f"off-{name}")
    wait_until(begun(command, f"off-{name}", "power_off"), 10, "the shutdown has begun")
    queued = command("power", "on", name, "--wait-if-busy", "--no-wait", f"--id=on-{name}")
    assert queued.returncode == 0
    assert "waiting" in queued.stdout
    cancelled = command("cancel", f"on-{name}")
    assert cancelled.returncode == 3, cancelled.stdout + cancelled.stderr
    assert off.get(timeout=30)["state"] == "succeeded"
    assert domains(host) == {name: False}


def test_cancelling_a_fetch_takes_two_seconds_and_leaves_nothing(
    fleet: Fleet, host: LabHost, command: Commands, web: WebServer, wanted: dict[str, Any]
) -> None:
    address = web.put("/slow.qcow2", Page(os.urandom(64 * MIB), pause=0.05))
    before, operation = files(host.data / "images"), f"slow-{wanted['name']}"
    accepted = command(
        "spawn", wanted["name"], "--host=hosta", f"--image={address}", f"--id={operation}", "--no-wait", "--json"
    )
    assert accepted.returncode == 0
    assert json.loads(accepted.stdout)["state"] in {"queued", "running"}
    wait_until(begun(command, operation, "fetch_image"), 10, "the fetch has begun")
    wait_until(lambda: list((host.data / "tmp").iterdir()), 10, "something has arrived")
    began = time.monotonic()
    cancelled = command("cancel", operation)
    assert cancelled.returncode == 3, cancelled.stdout + cancelled.stderr
    assert "cancelled" in cancelled.stdout
    assert time.monotonic() - began < 2
    assert remains(fleet) == {}
    assert files(host.data / "images") == before
    assert command("watch", operation).returncode == 3
    assert command("cancel", operation).returncode == 3, "too late changes nothing"


def test_cancelling_a_spawn_that_waits_for_its_guest_undoes_it(
    fleet: Fleet, command: Commands, scheduler: Scheduler, wanted: dict[str, Any]
) -> None:
    operation = f"wait-{wanted['name']}"
    never = {"wait_for": "console", "console_line": "never said", "operation_id": operation}
    sent = scheduler.send("spawn", **wanted, **never)
    wait_until(begun(command, operation, "wait_ready"), 30, "the guest runs and is waited for")
    asked = scheduler.app.send_task("virtfleet.cancel", args=[operation], queue="virtfleet")
    assert asked.get(timeout=10)["cancel_requested"] is True
    record = sent.get(timeout=10)
    assert record["state"] == "cancelled"
    assert [entry["action"] for entry in record["undo"] if entry["state"] == "done"]
    assert remains(fleet) == {}
