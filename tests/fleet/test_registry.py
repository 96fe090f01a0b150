"""What runs where: listed as it is, and rebuilt from the hosts when Redis has lost its memory."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.conftest import settings
from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Scheduler, virsh
from tests.lab import Fleet, LabHost, wait_until
from worker.client import Fleet as Client


def listed(command: Commands, *arguments: str) -> dict[str, dict[str, Any]]:
    done = command("instances", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {instance["name"]: instance for instance in json.loads(done.stdout)["instances"]}


def test_instances_are_listed_with_where_and_what_they_are(
    command: Commands, scheduler: Scheduler, spawn: Spawn
) -> None:
    record = spawn(vcpus=2, memory_mib=96)
    name = record["instance"]
    entry = listed(command)[name]
    assert (entry["uuid"], entry["host"], entry["power"]) == (record["uuid"], "hosta", "running")
    assert (entry["vcpus"], entry["memory_mib"]) == (2, 96)
    scheduler.call("pause", instance=name)
    assert listed(command, "--host=hosta")[name]["power"] == "paused"
    unknown = command("instances", "--host=elsewhere")
    assert (unknown.returncode, "elsewhere" in unknown.stderr) == (2, True)
    shown = command("instances").stdout
    assert all(word in shown for word in (name, record["uuid"], "hosta", "paused", "96 MiB"))


def test_hosts_are_listed_with_their_workers(command: Commands, spawn: Spawn) -> None:
    spawn()
    [entry] = json.loads(command("hosts", "--json").stdout)["hosts"]
    assert (entry["name"], entry["control"], entry["disk"], entry["instances"]) == ("hosta", True, True, 1)
    assert entry["accel"] == "qemu"
    assert entry["libvirt"].count(".") == 2
    assert entry["qemu"].count(".") == 2
    shown = command("hosts").stdout
    assert all(word in shown for word in ("hosta", "up", "libvirt", "QEMU"))


def test_sync_finds_what_changed_behind_the_fleets_back(command: Commands, host: LabHost, spawn: Spawn) -> None:
    stopped, lost = spawn()["instance"], spawn()
    removed = lost["instance"]
    for name in (stopped, removed):
        virsh(host, "destroy", name)
    virsh(host, "undefine", removed)
    done = command("hosts", "sync", "--json")
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)["hosts"]
    assert [instance["name"] for instance in found["instances"]] == [stopped]
    assert {name: entry["power"] for name, entry in listed(command).items()} == {stopped: "off"}
    assert spawn(name=removed)["state"] == "succeeded", "the name is free"
    # The disks of the one without a domain may be the last copy of its data: nobody removes them unasked.
    kept = host.data / "instances" / lost["uuid"]
    assert (kept / "root.qcow2").exists()
    shutil.rmtree(kept)


def test_sync_of_an_unknown_host_is_bad_input(command: Commands) -> None:
    done = command("hosts", "sync", "nowhere")
    assert done.returncode == 2
    assert "'nowhere'" in done.stderr
    assert "allowed: hosta" in done.stderr


def test_sync_says_so_when_the_hosts_libvirtd_is_down(command: Commands, host: LabHost) -> None:
    host.libvirtd_stop()
    try:
        done = command("hosts", "sync", "hosta", "--json")
    finally:
        host.libvirtd_start()
    assert done.returncode == 4, done.stdout + done.stderr
    assert json.loads(done.stdout)["error"]["code"] in {"host_unreachable", "connection_misconfigured"}


def test_everything_comes_back_after_redis_lost_its_memory(
    fleet: Fleet, command: Commands, scheduler: Scheduler, host: LabHost, spawn: Spawn
) -> None:
    record = spawn(vcpus=2, memory_mib=96)
    name = record["instance"]
    before = listed(command)
    fleet.redis.flushall()
    wait_until(lambda: json.loads(command("hosts", "--json").stdout)["hosts"], 30, "the host has come back by itself")
    done = command("hosts", "sync")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    after = listed(command)
    assert drop_time(after[name]) == drop_time(before[name])
    fleet.wait_ready(30)
    assert scheduler.call("pause", instance=name)["state"] == "succeeded"
    assert virsh(host, "domstate", name).strip() == "paused"


def test_a_client_that_lives_through_a_restart_of_redis_is_answered_as_before(fleet: Fleet, host: LabHost) -> None:
    with settings(redis_url=fleet.redis.url):
        client = Client()
        client.sync("hosta")
        fleet.redis.kill9()
        fleet.redis.start()
        fleet.wait_ready(60)
        assert client.sync("hosta")["host"] == "hosta"


def drop_time(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "updated_at"}
