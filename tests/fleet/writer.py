"""A guest that writes all the time: what it has written is in order, so a snapshot can be seen to show one instant."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.fleet.parts import Record, disk_of
from tests.lab import LabHost, wait_until
from worker.models import Snapshot

# Write n goes to vdb, then to vdc; vdd carries a file system, which is written to as well.
USER_DATA = """#!/bin/sh
blkid /dev/vdd >/dev/null || mkfs.ext4 -q /dev/vdd
mkdir /data
mount /dev/vdd /data
echo "writing"
n=0
while :; do
  n=$((n + 1))
  for disk in vdb vdc; do printf '%016d' $n | dd of=/dev/$disk conv=notrunc,fsync 2>/dev/null; done
  echo $n >/data/$((n % 50))
  [ $((n % 10)) != 0 ] || echo "write $n"
done
"""

WRITER: dict[str, Any] = {
    "memory_mib": 256,
    "ephemeral_gib": [1, 1, 1],
    "user_data": USER_DATA,
    "wait_for": "console",
    "console_line": "writing",
    "ready_timeout": 120,
}
"""A spawn of such a guest, besides its image."""


def console(host: LabHost, record: Record) -> str:
    """What the guest wrote to its console."""
    return (host.data / "instances" / str(record["uuid"]) / "console.log").read_text(errors="replace")


def writes(host: LabHost, record: Record) -> int:
    """The last write the guest has told of."""
    told = [line.split()[1] for line in console(host, record).splitlines() if line.startswith("write ")]
    return int(told[-1]) if told else 0


def goes_on(host: LabHost, record: Record) -> None:
    """Wait until the guest has written more than it has now: it is neither frozen nor paused, and has not booted."""
    before = writes(host, record)
    wait_until(lambda: writes(host, record) > before, 60, "the guest goes on writing")
    assert console(host, record).count("virtfleet-guest booting") == 1


def counters(host: LabHost, snapshot: Snapshot, scratch: Path) -> tuple[int, int]:
    """The write that each of both disks shows."""
    first, second = (_first_bytes(*disk_of(host, snapshot, disk), scratch) for disk in ("vdb", "vdc"))
    return int(first), int(second)


def _first_bytes(disk: Path, form: str, scratch: Path) -> bytes:
    out = scratch / "sector"
    place = f"driver=raw,offset=0,size=512,file.driver={form},file.file.filename={disk}"
    subprocess.run(["qemu-img", "convert", "-U", "--image-opts", place, "-O", "raw", str(out)], check=True)
    return out.read_bytes()[:16].rstrip(b"\0") or b"0"


def check_file_system(host: LabHost, snapshot: Snapshot, scratch: Path) -> str:
    """What e2fsck finds wrong with the file system on vdd; it repairs nothing, not even by replaying the journal."""
    path, form = disk_of(host, snapshot, "vdd")
    out = scratch / "file-system"
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(out)], check=True)
    done = subprocess.run(["e2fsck", "-fn", str(out)], check=False, capture_output=True, text=True)
    out.unlink()
    return "" if done.returncode == 0 and "recover" not in done.stdout + done.stderr else done.stdout + done.stderr
