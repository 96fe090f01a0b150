"""A spawn that fails, at whatever step, leaves no domain, no file, no claim; and says what it undid."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid5

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Page, Record, Scheduler, WebServer, domains, files, idle_image, remains
from tests.lab import Fleet, LabHost, lab_folder, wait_until
from worker.engine.requests import NAMESPACE
from worker.models import MIB

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
"""Said aloud by -ra; a filled home of an ordinary user would be no test."""

UNDONE = [("remove_files", "done"), ("remove_domain", "done")]


def undone(record: Record) -> list[tuple[str, str]]:
    return [(entry["action"], entry["state"]) for entry in record["undo"]]


def test_a_guest_that_cannot_be_started_is_undone(fleet: Fleet, host: LabHost, spawn: Spawn) -> None:
    """Here because something is in the way of its console's log, which libvirt finds out as it starts the guest."""
    before = files(host.data / "images")
    (host.data / "instances" / str(uuid5(NAMESPACE, "in-the-way")) / "console.log").mkdir(parents=True)
    record = spawn(operation_id="in-the-way")
    assert record["state"] == "failed"
    assert (record["error"]["step"], record["error"]["host"]) == ("spawn_instance", "hosta")
    assert undone(record) == UNDONE
    assert remains(fleet) == {}
    assert not {path for path in files(host.data / "images") - before if path.endswith(".tmp")}


def test_a_disk_larger_than_the_file_system_allows_leaves_nothing(fleet: Fleet, spawn: Spawn) -> None:
    record = spawn(root_disk="raw", disk_gib=64 * 1024)
    if record["state"] != "succeeded":  # XFS holds files of that size, ext4 does not
        assert record["error"]["details"]["field"] == "disk_gib"
        assert remains(fleet) == {}


def test_a_guest_that_does_not_come_up_is_undone(fleet: Fleet, spawn: Spawn) -> None:
    record = spawn(wait_for="console", console_line="never said", ready_timeout=1)
    assert (record["state"], record["error"]["code"]) == ("failed", "guest_not_ready")
    assert "never said" in record["error"]["message"]
    assert undone(record) == UNDONE
    assert remains(fleet) == {}


def test_a_missing_bridge_is_refused_before_anything_is_made(fleet: Fleet, spawn: Spawn) -> None:
    record = spawn(networks=["bridge:nosuch0"])
    assert (record["state"], record["error"]["code"]) == ("rejected", "network_not_found")
    assert "nosuch0" in record["error"]["message"]
    assert record["undo"] == []
    assert remains(fleet) == {}


def test_cancel_between_two_attempts_undoes_at_once(
    command: Commands, scheduler: Scheduler, fleet: Fleet, host: LabHost, wanted: dict[str, Any]
) -> None:
    """A step that waits for its next attempt, here because the host lacks the memory, need not be waited for."""
    operation = f"huge-{wanted['name']}"
    with host.short_of_memory():
        sent = scheduler.send("spawn", operation_id=operation, **{**wanted, "memory_mib": 4096})
        wait_until(lambda: "retry" in command("operation", operation).stdout, 20, "the start is to be tried again")
        shown = command("operation", operation, "--json")
        [start] = [step for step in json.loads(shown.stdout)["steps"] if step["name"] == "spawn_instance"]
        assert start["error"]["code"] == "out_of_memory"
        cancelled = command("cancel", operation)
    assert cancelled.returncode == 3, cancelled.stdout + cancelled.stderr
    assert sent.get(timeout=10)["state"] == "cancelled"
    assert remains(fleet) == {}


# --- a host whose disk is full ----------------------------------------------------------------------------------------

DISK_MIB = 48


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose one host keeps its data on a file system of 48 MiB."""
    with ExitStack() as stack:
        folder = stack.enter_context(lab_folder())
        disk = stack.enter_context(lab_folder())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}M,mode=755", "vf-small", str(disk)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("VIRTFLEET_RESERVE_BYTES", "0")
        fleet = Fleet(folder, ["hosta"])
        fleet.hosts["hosta"].data = disk
        yield stack.enter_context(fleet)


@ROOT_ONLY
def test_a_disk_that_fills_up_during_a_download_is_left_as_it_was(small: Fleet, web: WebServer) -> None:
    """Nobody could know before: the server does not say how long the image is."""
    host = small.hosts["hosta"]
    address = web.put("/endless.qcow2", Page(os.urandom(MIB) * (DISK_MIB + 8), etag="", announce_length=False))
    record = Scheduler(small.redis.url).call("spawn", name="full", host="hosta", image=address)
    assert (record["state"], record["error"]["code"]) == ("failed", "no_space"), record["error"]
    assert "available" in record["error"]["message"]
    assert remains(small) == {}
    assert kept_of_images(host) == set()


@ROOT_ONLY
def test_a_full_disk_refuses_a_spawn_and_leaves_its_neighbour_alone(small: Fleet) -> None:
    host, scheduler = small.hosts["hosta"], Scheduler(small.redis.url)
    wanted: dict[str, Any] = {"host": "hosta", "image": str(idle_image(host.images / "idle.qcow2")), "memory_mib": 64}
    assert scheduler.call("spawn", name="before", **wanted)["state"] == "succeeded"
    ballast = host.data / "ballast"
    try:
        subprocess.run(["fallocate", "-l", f"{DISK_MIB - 8}M", str(ballast)], check=True)
        record = scheduler.call("spawn", name="after", **wanted)
        assert (record["state"], record["error"]["code"]) == ("failed", "no_space")
        assert record["error"]["details"]["needed"] > record["error"]["details"]["available"] > 0
        assert domains(host) == {"before": True}
        [kept] = (host.data / "instances").glob("*")
        assert kept.name != record["uuid"]
    finally:
        ballast.unlink()
        assert scheduler.call("destroy", instance="before")["state"] == "succeeded"
    assert remains(small) == {}


def kept_of_images(host: LabHost) -> set[str]:
    return {path for path in files(host.data / "images") if Path(path).suffix != ".lock"}
