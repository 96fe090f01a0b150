"""The copy of a disk from host to host, proven end to end, against plain `rsync -S` and sha256sum at both ends."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import Result, interleaved, milliseconds, report
from tests.lab import LabHost, lab_folder
from worker.context import Alone
from worker.images import remote
from worker.images.digest import content_digest
from worker.images.files import publish
from worker.models import Peer

ROUNDS = 3
TARGET = 1.1
ALLOCATED = 1.02
MIB = 1024**2
DATA_MIB = 1024


def main() -> int:
    """Copy a raw disk of 2 GiB, every second 32 MiB of it empty, over ssh from a host in its own network namespace."""
    with lab_folder() as folder, LabHost("hosta", folder, networked=True) as host:
        source, target = host.data / "source.raw", folder / "target.raw"
        half_empty(source)
        assert host.cable
        peer = Peer(name="hosta", address=host.cable.address, data_dir=host.data, copies_out=2)
        ssh = remote.Ssh(key=folder / "ssh" / "id", known_hosts=folder / "ssh" / "known_hosts")
        copying = remote.Copying(ssh, folder, incoming=2, stall=60)
        allocated: list[float] = []

        def ours(_: int) -> float:
            target.unlink(missing_ok=True)
            taken = milliseconds(lambda: proven_copy(peer, source, target, copying))
            allocated.append(target.stat().st_blocks / source.stat().st_blocks)
            return taken

        def alone(_: int) -> float:
            target.unlink(missing_ok=True)
            return milliseconds(lambda: unproven_copy(peer, source, target, copying))

        def plain(_: int) -> float:
            target.unlink(missing_ok=True)
            return milliseconds(lambda: rsync(host, ssh, source, target))

        def plain_proven(number: int) -> float:
            return plain(number) + milliseconds(lambda: sums(source, target))

        proven, yardstick_proven, bare, yardstick = interleaved(ROUNDS, ours, plain_proven, alone, plain)
        print(f"allocated at the destination: {max(allocated):.3f} of the source (target ≤ {ALLOCATED:g})")
        results = [
            Result("copy with proof, against rsync -S and sha256sum at both ends", proven, yardstick_proven, TARGET),
            Result("copy with proof, against rsync -S without any", proven, yardstick, TARGET),
            Result("copy alone, against rsync -S", bare, yardstick, TARGET),
        ]
        return report(results) or int(max(allocated) > ALLOCATED)


def proven_copy(peer: Peer, source: Path, target: Path, copying: remote.Copying) -> None:
    """As the steps do it: the source is read while it is copied, the target from its disk afterwards."""
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(content_digest, source, Alone())
        unfinished = target.with_suffix(".part")
        here = remote.fetch(peer, source, unfinished, copying, Alone(), total=source.stat().st_size)
        if here != there.result():
            raise AssertionError("the copy differs")
    publish(unfinished, target)


def unproven_copy(peer: Peer, source: Path, target: Path, copying: remote.Copying) -> None:
    """The transport with what makes it durable, for comparison."""
    remote.fetch(peer, source, target, copying, Alone())
    publish(target, target.with_suffix(".done"))
    target.with_suffix(".done").rename(target)


def rsync(host: LabHost, ssh: remote.Ssh, source: Path, target: Path) -> None:
    """What a person would type."""
    assert host.cable
    shell = f"ssh -o StrictHostKeyChecking=yes -o UserKnownHostsFile={ssh.known_hosts} -i {ssh.key}"
    subprocess.run(["rsync", "-S", "-e", shell, f"root@{host.cable.address}:{source}", str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)


def sums(*files: Path) -> None:
    """The proof a person would type, both ends at once."""
    running = [subprocess.Popen(["sha256sum", str(file)], stdout=subprocess.PIPE, text=True) for file in files]
    answers = {process.communicate()[0].split()[0] for process in running}
    if len(answers) != 1:
        raise AssertionError("the copy differs")


def half_empty(path: Path) -> None:
    """Write a sparse file: 32 MiB of random data, then as much of nothing, and so on."""
    with path.open("wb") as file:
        for start in range(0, 2 * DATA_MIB, 64):
            file.seek(start * MIB)
            for _ in range(32):
                file.write(os.urandom(MIB))
        file.truncate(2 * DATA_MIB * MIB)
        os.fsync(file.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
