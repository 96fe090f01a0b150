"""Flower shows what runs: readable names, instance and host in the arguments, and how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.fleet.parts import Commands, Page, Scheduler, WebServer
from tests.lab import Fleet, wait_until
from worker.models import MIB

Tasks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def flower(fleet: Fleet, scheduler: Scheduler) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLOWER_UNAUTHENTICATED_API", "true")
        address = fleet.flower()
    with httpx.Client(base_url=address, trust_env=False, timeout=10) as client:

        def hears() -> bool:
            # It answers before it hears of tasks, and never hears of what was sent before.
            scheduler.call("pause", instance="nobody")
            with suppress(httpx.TransportError):
                return bool(tasks_of(client, "nobody"))
            return False

        wait_until(hears, 60, "Flower hears of tasks", fleet.folder / "flower.log")
        yield client


def tasks_of(client: httpx.Client, word: str) -> Tasks:
    """The tasks that have a word in their arguments."""
    time.sleep(0.2)  # Flower answers and listens with one thread
    found = client.get("/api/tasks").json()
    return [task for task in found.values() if word in str(task["kwargs"])]


def test_a_running_fetch_is_seen_with_its_progress_and_the_end_with_its_result(
    flower: httpx.Client, command: Commands, scheduler: Scheduler, web: WebServer, wanted: dict[str, Any]
) -> None:
    operation = f"shown-{wanted['name']}"
    address = web.put("/shown.qcow2", Page(os.urandom(16 * MIB), pause=0.02))
    sent = scheduler.send("spawn", operation_id=operation, **{**wanted, "image": address})

    def in_progress() -> Tasks:
        return [task for task in tasks_of(flower, operation) if task["state"] == "PROGRESS"]

    [fetch] = wait_until(in_progress, 30, "a task in PROGRESS")
    assert fetch["name"] == "fetch_image"
    assert fetch["worker"] == "disk@hosta"
    assert all(word in fetch["kwargs"] for word in (operation, wanted["name"], "hosta"))
    assert "%" in fetch["result"]
    assert "of 16 MiB" in fetch["result"]

    assert command("cancel", operation).returncode == 3
    assert sent.get(timeout=10)["state"] == "cancelled"

    def ended() -> Tasks:
        return [task for task in tasks_of(flower, operation) if task["name"] == "virtfleet.spawn" and task["exception"]]

    [spawn] = wait_until(ended, 30, "the operation's end")
    assert spawn["state"] == "FAILURE"
    assert f"{operation} cancelled" in spawn["exception"]


def test_names_are_the_operations_and_the_steps(
    flower: httpx.Client, scheduler: Scheduler, wanted: dict[str, Any]
) -> None:
    operation = f"named-{wanted['name']}"
    assert scheduler.call("spawn", operation_id=operation, **wanted)["state"] == "succeeded"
    assert scheduler.call("destroy", instance=wanted["name"])["state"] == "succeeded"
    steps = {"fetch_image", "create_disks", "build_seed", "spawn_instance", "wait_ready"}

    def succeeded() -> bool:
        done = {task["name"] for task in tasks_of(flower, operation) if task["state"] == "SUCCESS"}
        return done == {"virtfleet.spawn", *steps}

    wait_until(succeeded, 30, "the operation and its steps are shown as succeeded")
    for task in tasks_of(flower, operation):
        assert wanted["name"] in task["kwargs"]
        assert "hosta" in task["kwargs"]
