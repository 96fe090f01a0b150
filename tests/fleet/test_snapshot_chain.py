"""Incremental snapshots: each holds what changed, each can be restored, and a broken chain begins anew and says so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Scheduler, disk_of, image_info, snapshots, virsh
from tests.fleet.writer import WRITER, check_file_system, console, counters, goes_on
from tests.lab import Fleet, LabHost, wait_until


def test_a_chain_shows_each_of_its_instants(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, tmp_path: Path
) -> None:
    guest = spawn(image=str(real), **WRITER)
    name = guest["instance"]
    for number in range(3):
        record = snapshot(name, incremental=True, quiesce="require", operation_id=f"night-{number}")
        assert record["state"] == "succeeded", record["error"]
        goes_on(host, guest)
    chain = snapshots(host)
    assert [one.parent for one in chain] == [None, "night-0", "night-1"]
    seen = [counters(host, one, tmp_path) for one in chain]
    assert seen == sorted(seen)
    assert len(set(seen)) == 3
    assert all(first - second in {0, 1} for first, second in seen)
    assert [check_file_system(host, one, tmp_path) for one in chain] == ["", "", ""]

    root, _ = disk_of(host, chain[2], "vda")
    assert image_info(root)["backing-filename"] == "../night-1/vda.qcow2"  # never the guest's own disk
    assert chain[2].disks[0].actual_size < chain[0].disks[0].actual_size / 10

    refused = scheduler.call("snapshot_delete", snapshot="night-1")
    assert (refused["state"], refused["error"]["code"]) == ("rejected", "snapshot_in_use")
    assert scheduler.call("snapshot_delete", snapshot="night-2")["state"] == "succeeded"
    assert virsh(host, "checkpoint-list", name, "--name").split() == ["virtfleet.night-0", "virtfleet.night-1"]
    # The checkpoint before it has taken over: the chain goes on from there.
    assert snapshot(name, incremental=True, operation_id="night-3")["state"] == "succeeded"
    assert snapshots(host)[-1].parent == "night-1"

    restored = scheduler.call("snapshot_restore", snapshot="night-1", name="restored")
    try:
        assert restored["state"] == "succeeded", restored["error"]
        wait_until(lambda: "writing" in console(host, restored), 90, "the restored guest writes")
    finally:
        scheduler.call("destroy", instance="restored")


def test_without_its_checkpoint_the_next_one_is_full_and_says_so(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn()
    name = guest["instance"]
    assert snapshot(name, incremental=True, operation_id="first")["state"] == "succeeded"
    virsh(host, "checkpoint-delete", name, "virtfleet.first")
    assert snapshot(name, incremental=True, operation_id="second")["state"] == "succeeded"
    assert snapshot(name, incremental=True, operation_id="third")["state"] == "succeeded"
    assert snapshot(name, incremental=True, full=True, operation_id="fourth")["state"] == "succeeded"
    taken = snapshots(host)
    assert [one.parent for one in taken] == [None, None, "second", None]
    assert "full instead of incremental" in taken[1].notes[-1]
    assert "full instead" not in str(taken[3].notes)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: libvirt's status files are elsewhere for others")
def test_where_libvirt_lets_no_backup_begin_the_next_one_is_full_and_the_doctor_says_why(
    fleet: Fleet, host: LabHost, spawn: Spawn, snapshot: Spawn
) -> None:
    name = spawn()["instance"]
    assert snapshot(name, incremental=True, operation_id="before")["state"] == "succeeded"
    host.lose_sight_of_backup(name)
    assert snapshot(name, incremental=True, operation_id="meanwhile")["state"] == "succeeded"
    refused = snapshot(name, method="backup")
    assert refused["state"] == "failed"
    findings = json.loads(fleet.cli("doctor", "--json").stdout)["findings"]
    remedy = next(one["remedy"] for one in findings if one["code"] == "lost_backup")
    assert remedy in refused["error"]["hint"]
    host.follow(remedy)
    assert snapshot(name, incremental=True, operation_id="after")["state"] == "succeeded"
    _, meanwhile, after = snapshots(host)
    assert (meanwhile.method, meanwhile.parent, meanwhile.checkpoint) == ("mirror", None, None)
    assert "full instead of incremental" in meanwhile.notes[-1]
    assert after.parent == "before"


def test_checkpoints_of_what_failed_are_gone(host: LabHost, spawn: Spawn, snapshot: Spawn) -> None:
    guest = spawn()
    failed = snapshot(guest["instance"], incremental=True, quiesce="require")
    assert failed["state"] == "failed"
    assert virsh(host, "checkpoint-list", guest["instance"], "--name").split() == []


def test_a_snapshot_serves_as_an_image(host: LabHost, spawn: Spawn, snapshot: Spawn, real: Path) -> None:
    guest = spawn(image=str(real), memory_mib=256)
    assert snapshot(guest["instance"], incremental=True, operation_id="base")["state"] == "succeeded"
    assert snapshot(guest["instance"], incremental=True, operation_id="golden")["state"] == "succeeded"
    ready = {"wait_for": "console", "console_line": "virtfleet-guest ready", "memory_mib": 256}
    made = spawn(image="snapshot:golden", **ready)
    assert made["state"] == "succeeded", made["error"]
    root = host.data / "instances" / made["uuid"] / "root.qcow2"
    assert Path(image_info(root)["backing-filename"]).parent == host.data / "images"
    missing = spawn(image="snapshot:nosuch")
    assert (missing["state"], missing["error"]["code"]) == ("rejected", "snapshot_not_found")
