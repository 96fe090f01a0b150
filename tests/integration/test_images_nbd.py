"""Files from another host over NBD and TLS, through a cable that can be cut."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab import LabHost, wait_until
from tests.lab.pki import Authority
from worker.context import Alone
from worker.errors import Cancelled, ConnectionMisconfigured, NoSpace, TransferInterrupted
from worker.images import nbd
from worker.images.checksum import checksum_of
from worker.images.nbd import Nbd
from worker.models import Peer

MIB = 1024**2
PORTS = range(10809, 10813)


@pytest.fixture
def how(host: LabHost) -> Nbd:
    return Nbd(PORTS, host.pki, "operation")


@pytest.fixture
def source(host: LabHost) -> Path:
    """16 MiB of data in a file of a little more than 64 MiB, with odd places and an odd end."""
    path = host.data / "a disk, raw"
    with path.open("wb") as file:
        for start in (0, 5, 20, 50):
            file.seek(start * MIB + 4096)
            file.write(os.urandom(4 * MIB))
        file.truncate(64 * MIB + 1001)
    return path


class Stoppable(Alone):
    """Somebody who can end the work, and who may be slow to let it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = False
        self.stop_at: int | None = None

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        super().progress(done, total, note)
        if self.stop_at is not None and done >= self.stop_at:
            self.stop = True
        self.check()

    def check(self) -> None:
        if self.stop:
            raise Cancelled("stop")


@contextmanager
def lent(host: LabHost, how: Nbd, *files: Path, clients: int = 2) -> Iterator[Future[None]]:
    """Lend files in the `with` block, as the host's own worker does: with its programs."""
    assert host.cable
    watch, exports = Stoppable(), {how.export_of(path, host.data): path for path in files}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setenv("PATH", host.env["PATH"])
        lending = pool.submit(nbd.lend, exports, host.cable.address, how, watch, clients=clients)
        try:
            yield lending
        finally:
            watch.stop = True
            lending.exception(20)


def fetch(peer: Peer, source: Path, target: Path, how: Nbd, watch: Alone | None = None, stall: float = 20) -> str:
    total = source.stat().st_size if source.exists() else MIB
    return nbd.fetch(peer, source, target, how, watch or Alone(), total=total, stall=stall)


def test_content_and_holes_arrive(host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path) -> None:
    target, watch = tmp_path / "target", Alone()
    with lent(host, how, source):
        found = fetch(peer, source, target, how, watch)
    assert target.read_bytes() == source.read_bytes()
    assert found == checksum_of(source, Alone())
    assert target.stat().st_blocks <= 1.02 * source.stat().st_blocks
    assert watch.last_progress[:2] == (target.stat().st_size, target.stat().st_size)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".sums"] == []


def test_what_has_arrived_is_not_sent_again(host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path) -> None:
    target, watch = tmp_path / "target", Stoppable()
    watch.stop_at = 40 * MIB
    assert host.cable
    with lent(host, how, source):
        with pytest.raises(Cancelled):
            fetch(peer, source, target, how, watch)
        verified = (tmp_path / "target.sums").stat().st_size // 32
        before = host.cable.received()
        fetch(peer, source, target, how)
    assert verified >= 24
    assert target.read_bytes() == source.read_bytes()
    rest = sum(max(0, (start + 4) * MIB + 4096 - max(verified * MIB, start * MIB + 4096)) for start in (0, 5, 20, 50))
    assert host.cable.received() - before < rest * 1.05 + MIB // 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
def test_what_found_no_room_is_not_taken_for_arrived(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    target, sums = folder / "target", folder / "target.sums"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        with lent(host, how, source):
            for room in range(3, 11):  # what the writer had begun by then is a matter of luck
                target.unlink(missing_ok=True)
                sums.unlink(missing_ok=True)
                subprocess.run(["mount", "-o", f"remount,size={room}m", str(folder)], check=True)
                with pytest.raises(NoSpace):
                    fetch(peer, source, target, how)
                arrived = sums.stat().st_size // 32 * MIB
                assert target.read_bytes()[:arrived] == source.read_bytes()[:arrived]
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            assert fetch(peer, source, target, how) == checksum_of(source, Alone())
        assert target.read_bytes() == source.read_bytes()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_is_not_as_it_arrived_is_sent_again(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    target, watch = tmp_path / "target", Stoppable()
    watch.stop_at = 60 * MIB
    with lent(host, how, source):
        with pytest.raises(Cancelled):
            fetch(peer, source, target, how, watch)
        with target.open("r+b") as file:
            file.seek(6 * MIB)
            file.write(b"something else")
        fetch(peer, source, target, how)
    assert target.read_bytes() == source.read_bytes()


def test_a_server_that_dies_is_a_broken_connection_that_can_be_continued(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    slow = Stoppable()
    with ThreadPoolExecutor(1) as pool:
        with lent(host, how, source):
            copying = pool.submit(
                nbd.fetch,
                peer,
                source,
                tmp_path / "target",
                how,
                slow,
                total=64 * MIB + 1001,
                stall=1,
                bandwidth=2 * MIB,
            )
            wait_until(lambda: slow.last_progress[0] > 6 * MIB, 20, "some of it has arrived")
        with pytest.raises(TransferInterrupted, match=r"broke off|does not lend") as broken:
            copying.result(30)
    assert broken.value.got_on
    with lent(host, how, source):
        fetch(peer, source, tmp_path / "target", how)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_no_port_is_left_open_and_a_taken_one_is_passed_over(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    other = replace(how, session="other")
    with lent(host, other, source), lent(host, how, source):
        fetch(peer, source, tmp_path / "target", how)
        fetch(peer, source, tmp_path / "another", other)
    with pytest.raises(TransferInterrupted, match="does not lend"):
        fetch(peer, source, tmp_path / "third", how, stall=1)


def test_no_free_port_is_told(host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path) -> None:
    one = replace(how, ports=range(10815, 10816))
    with lent(host, one, source):
        fetch(peer, source, tmp_path / "target", one)
        with lent(host, replace(one, session="other"), source) as second, pytest.raises(TransferInterrupted) as refused:
            second.result(10)
    assert "VIRTFLEET_NBD_PORTS" in refused.value.hint


def test_who_has_no_certificate_of_ours_gets_nothing(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    Authority(tmp_path / "authority").issue("stranger", "127.0.0.1", tmp_path / "pki")
    with lent(host, how, source):
        fetch(peer, source, tmp_path / "target", how)
        for strange in (tmp_path / "pki", None):
            with pytest.raises((ConnectionMisconfigured, TransferInterrupted)):
                fetch(peer, source, tmp_path / "nothing", replace(how, tls=strange), stall=2)
    assert not (tmp_path / "nothing").exists() or not (tmp_path / "nothing").read_bytes().strip(b"\0")


def test_a_host_without_certificates_says_what_it_needs(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    bare = replace(how, tls=tmp_path)
    with pytest.raises(ConnectionMisconfigured) as refused:
        bare.client()
    assert "VIRTFLEET_NBD_TLS_DIR" in refused.value.hint
    with lent(host, bare, source) as lending, pytest.raises(ConnectionMisconfigured, match="cannot be lent"):
        lending.result(10)


def test_plain_works_where_both_sides_allow_it(
    host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path
) -> None:
    plain = replace(how, tls=None)
    with lent(host, plain, source):
        fetch(peer, source, tmp_path / "target", plain)
        with pytest.raises(ConnectionMisconfigured, match="no TLS"):
            fetch(peer, source, tmp_path / "other", how, stall=2)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_a_limit_on_the_rate_is_kept(host: LabHost, peer: Peer, how: Nbd, source: Path, tmp_path: Path) -> None:
    with lent(host, how, source):
        fetch(peer, source, tmp_path / "fast", how)
        began = time.monotonic()
        total = source.stat().st_size
        nbd.fetch(peer, source, tmp_path / "slow", how, Alone(), total=total, stall=20, bandwidth=8 * MIB)
    assert 1.8 < time.monotonic() - began < 6
