"""The scheduler's side: operations by name from any Celery client, the typed client, and idempotency keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Scheduler, domains
from tests.lab import Fleet, LabHost
from tests.lab.process import REPOSITORY

TYPED_CLIENT = """
import json, sys
from tasks.destroy import DestroyRequest
from tasks.spawn import SpawnRequest
from worker.client import Fleet

name, image = sys.argv[1:]
fleet = Fleet()
spawned = fleet.wait(fleet.submit(SpawnRequest(name=name, host="hosta", image=image, memory_mib=64)).id, timeout=60)
listed = [instance.name for instance in fleet.registry.instances("hosta")]
destroyed = fleet.wait(fleet.submit(DestroyRequest(instance=name)).id, timeout=60)
print(json.dumps({"spawned": spawned.as_dict(), "listed": listed, "destroyed": destroyed.as_dict()}))
"""


def test_a_bare_celery_client_gets_the_final_record(
    scheduler: Scheduler, host: LabHost, spawn: Spawn, name: str
) -> None:
    record = spawn(name=name)
    assert record["state"] == "succeeded"
    assert (record["kind"], record["instance"], record["host"]) == ("virtfleet.spawn", name, "hosta")
    assert record["error"] is None
    assert record["result"]["power"] == "running"
    assert [step["name"] for step in record["steps"]] == [
        "fetch_image",
        "create_disks",
        "build_seed",
        "spawn_instance",
        "wait_ready",
    ]
    assert all(step["state"] == "done" and step["attempt"] == 1 for step in record["steps"])
    assert domains(host) == {name: True}
    gone = scheduler.call("destroy", instance=name)
    assert (gone["state"], gone["result"]["note"]) == ("succeeded", "destroyed")
    assert domains(host) == {}


def test_the_typed_client_does_the_same(fleet: Fleet, idle: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TYPED_CLIENT, name, str(idle)],
        cwd=REPOSITORY,
        env={**os.environ, **fleet.env},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    answer = json.loads(done.stdout)
    assert answer["spawned"]["state"] == "succeeded"
    assert answer["spawned"]["result"]["power"] == "running"
    assert answer["listed"] == [name]
    assert answer["destroyed"]["state"] == "succeeded"


def test_the_same_id_twice_spawns_once_and_both_get_the_record(
    command: Commands, scheduler: Scheduler, host: LabHost, spawn: Spawn, wanted: dict[str, Any]
) -> None:
    name, image, operation = wanted["name"], wanted["image"], f"twice-{wanted['name']}"
    first, second = (scheduler.send("spawn", operation_id=operation, **wanted) for _ in range(2))
    third = command("spawn", name, "--host=hosta", f"--image={image}", "--memory=64", f"--id={operation}", "--json")
    fourth = spawn(operation_id=operation, **wanted)
    records = [first.get(timeout=60), second.get(timeout=60), json.loads(third.stdout), fourth]
    assert third.returncode == 0
    assert all(record == records[0] for record in records)
    assert (records[0]["state"], records[0]["id"]) == ("succeeded", operation)
    assert domains(host) == {name: True}


def test_the_same_id_for_something_else_is_a_conflict(
    command: Commands, scheduler: Scheduler, host: LabHost, spawn: Spawn, wanted: dict[str, Any]
) -> None:
    name, operation = wanted["name"], f"once-{wanted['name']}"
    spawned = spawn(operation_id=operation, **wanted)
    by_name = scheduler.call("spawn", operation_id=operation, **{**wanted, "memory_mib": 96})
    assert (by_name["state"], by_name["error"]["code"]) == ("rejected", "operation_conflict")
    assert "memory_mib" in by_name["error"]["message"]
    by_command = command("power", "off", name, f"--id={operation}", "--json")
    assert by_command.returncode == 2
    assert json.loads(by_command.stdout)["error"]["code"] == "operation_conflict"
    assert json.loads(command("operation", operation, "--json").stdout) == spawned
    assert domains(host) == {name: True}
