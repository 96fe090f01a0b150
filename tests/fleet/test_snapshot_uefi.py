"""Guests that boot by UEFI: what their firmware keeps is part of a snapshot, and each restored guest has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Scheduler, snapshots, virsh
from tests.fleet.writer import console
from tests.lab import LabHost, wait_until

MARK = b"what UEFI keeps!"


def variables(host: LabHost, uuid: str) -> Path:
    return host.data / "instances" / uuid / "nvram.fd"


@pytest.mark.parametrize(
    "method", ["backup", *(pytest.param(method, marks=pytest.mark.thorough) for method in ("mirror", "cold"))]
)
def test_a_restored_guest_has_a_copy_of_what_its_firmware_kept(
    host: LabHost, spawn: Spawn, snapshot: Spawn, scheduler: Scheduler, real: Path, method: str
) -> None:
    guest = spawn(image=str(real), memory_mib=256, firmware="efi", wait_for="agent", ready_timeout=180)
    assert guest["state"] == "succeeded", guest["error"]
    kept = variables(host, guest["uuid"])
    with kept.open("r+b") as file:  # at the very end of the flash, which the firmware does not use
        file.seek(-len(MARK), 2)
        file.write(MARK)
    assert snapshot(guest["instance"], method=method)["state"] == "succeeded"
    [taken] = snapshots(host)
    assert taken.nvram
    copy = host.data / "snapshots" / taken.id / taken.nvram
    assert copy.read_bytes().endswith(MARK)
    assert copy.stat().st_mode & 0o777 == 0o400

    restored = scheduler.call("snapshot_restore", snapshot=taken.id, name="restored")
    try:
        assert restored["state"] == "succeeded", restored["error"]
        own = variables(host, restored["uuid"])
        assert own != kept
        assert f">{own}</nvram>" in virsh(host, "dumpxml", "restored")
        wait_until(lambda: "virtfleet-guest ready" in console(host, restored), 180, "the restored guest boots by UEFI")
        assert own.read_bytes().endswith(MARK)
    finally:
        scheduler.call("destroy", instance="restored")
    assert not own.exists()
    assert kept.exists()
