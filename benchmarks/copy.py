"""The copy of a disk from host to host, proven end to end, over ssh and over NBD with TLS: against `rsync -S` and
nbdcopy, with the same proof afterwards and without any."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Result, interleaved, milliseconds, report, take_memory
from tests.lab import LabHost, lab_folder
from worker.context import Alone
from worker.images import nbd, remote
from worker.images.checksum import checksum_of
from worker.images.files import publish
from worker.models import Peer

ROUNDS = 3
SSH_TARGET, NBD_TARGET = 1.1, 1.2
ALLOCATED = 1.02
MIB = 1024**2
DATA_MIB = 1024
PORT = 10809


def main() -> int:
    """Copy a raw disk of 2 GiB, every second 32 MiB of it empty, from a host in its own network namespace."""
    with lab_folder() as folder, LabHost("hosta", folder, networked=True) as host:
        source, target = host.data / "source.raw", folder / "target.raw"
        half_empty(source)
        assert host.cable
        peer = Peer(name="hosta", address=host.cable.address, data_dir=host.data, copies_out=2)
        keys = remote.Ssh(key=folder / "ssh" / "id", known_hosts=folder / "ssh" / "known_hosts")
        over_ssh = remote.Copying(keys, folder, incoming=2, stall=60)
        over_nbd = replace(over_ssh, nbd=nbd.Nbd(range(PORT, PORT + 1), host.pki, "benchmark"))
        allocated: list[float] = []

        def timed(copy: Callable[[], None]) -> Callable[[int], float]:
            def run(_: int) -> float:
                target.unlink(missing_ok=True)
                take_memory(folder / "scratch", DATA_MIB)
                return milliseconds(copy)

            return run

        def ours(copying: remote.Copying) -> Callable[[int], float]:
            def copy() -> None:
                proven_copy(peer, source, target, copying)
                allocated.append(target.stat().st_blocks / source.stat().st_blocks)

            return timed(copy)

        def summed(copy: Callable[[int], float]) -> Callable[[int], float]:
            return lambda number: copy(number) + milliseconds(lambda: sums(source, target))

        by_rsync = timed(lambda: rsync(host, keys, source, target))
        by_nbdcopy = timed(lambda: nbdcopy(host, source, target))
        with lent(host, over_nbd, source):
            runs = [ours(over_ssh), by_rsync, summed(by_rsync), ours(over_nbd), by_nbdcopy, summed(by_nbdcopy)]
            ssh, rsynced, rsynced_summed, by_nbd, nbdcopied, nbdcopied_summed = interleaved(ROUNDS, *runs)
        print(f"allocated at the destination: {max(allocated):.3f} of the source (target ≤ {ALLOCATED:g})")
        results = [
            Result("over ssh with proof, against rsync -S and the same proof", ssh, rsynced_summed, SSH_TARGET),
            Result("over ssh with proof, against rsync -S without any", ssh, rsynced, SSH_TARGET),
            Result("over NBD with proof, against nbdcopy and the same proof", by_nbd, nbdcopied_summed, NBD_TARGET),
            Result("over NBD with proof, against nbdcopy without any", by_nbd, nbdcopied, NBD_TARGET),
        ]
        return report(results) or int(max(allocated) > ALLOCATED)


def proven_copy(peer: Peer, source: Path, target: Path, copying: remote.Copying) -> None:
    """As the steps do it: the source is read while it is copied, the target is read back."""
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(checksum_of, source, Alone())
        unfinished = target.with_suffix(".part")
        here = remote.fetch(peer, source, unfinished, copying, Alone(), total=source.stat().st_size)
        if here != there.result():
            raise AssertionError("the copy differs")
    publish(unfinished, target)


class _UntilTold(Alone):
    """Somebody who lets work go on until it is told to end."""

    over = False

    def check(self) -> None:
        if self.over:
            raise InterruptedError


@contextmanager
def lent(host: LabHost, copying: remote.Copying, source: Path) -> Iterator[None]:
    """Have the host lend its disk in the `with` block."""
    assert host.cable
    assert copying.nbd
    os.environ["PATH"] = host.env["PATH"]
    watch, files = _UntilTold(), {copying.nbd.export_of(source, host.data): source}
    with ThreadPoolExecutor(1) as pool:
        lending = pool.submit(nbd.lend, files, host.cable.address, copying.nbd, watch, clients=8)
        try:
            yield
        finally:
            watch.over = True
            lending.exception(30)


def rsync(host: LabHost, ssh: remote.Ssh, source: Path, target: Path) -> None:
    """What a person would type."""
    assert host.cable
    shell = f"ssh -o StrictHostKeyChecking=yes -o UserKnownHostsFile={ssh.known_hosts} -i {ssh.key}"
    subprocess.run(["rsync", "-S", "-e", shell, f"root@{host.cable.address}:{source}", str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)


def nbdcopy(host: LabHost, source: Path, target: Path) -> None:
    """What a person would type, with the server there already."""
    assert host.cable
    name = f"benchmark/{source.relative_to(host.data)}"
    uri = f"nbds://{host.cable.address}:{PORT}/{name}?tls-certificates={host.pki}&tls-verify-peer=true"
    subprocess.run(["nbdcopy", uri, str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)


def sums(*files: Path) -> None:
    """The same proof, once both files lie there: both ends at once."""
    with ThreadPoolExecutor(len(files)) as pool:
        answers = set(pool.map(lambda file: checksum_of(file, Alone()), files))
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
