"""Files from another host, over a real sshd and a cable that can be cut."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.lab import LabHost, wait_until
from tests.lab.process import kill9
from worker.context import Alone
from worker.errors import Cancelled, CommandFailed, ConnectionMisconfigured, TransferInterrupted
from worker.images import remote
from worker.images.checksum import checksum_of
from worker.models import Peer

MIB = 1024**2


@pytest.fixture
def copying(host: LabHost, tmp_path: Path) -> remote.Copying:
    keys = host.folder.parent / "ssh"
    ssh = remote.Ssh(key=keys / "id", known_hosts=keys / "known_hosts")
    return remote.Copying(ssh, tmp_path, incoming=2, stall=60)


@pytest.fixture
def source(host: LabHost) -> Path:
    """16 MiB of data in a file of 64 MiB, with odd places and an odd end."""
    path = host.data / "a disk.raw"
    with path.open("wb") as file:
        for start in (0, 5, 20, 50):
            file.seek(start * MIB + 4096)
            file.write(os.urandom(4 * MIB))
        file.truncate(64 * MIB)
    return path


def digest(path: Path) -> str:
    return checksum_of(path, Alone())


def test_content_and_holes_arrive(peer: Peer, copying: remote.Copying, source: Path, tmp_path: Path) -> None:
    target, watch = tmp_path / "target", Alone()
    remote.fetch(peer, source, target, copying, watch, total=64 * MIB)
    assert digest(target) == digest(source)
    assert target.stat().st_blocks <= 1.02 * source.stat().st_blocks
    assert watch.last_progress[:2] == (64 * MIB, 64 * MIB)


@pytest.mark.parametrize("kept", [1, 5 * MIB + 17, 40 * MIB, 64 * MIB - 1])
def test_what_is_there_is_not_sent_again(
    host: LabHost, peer: Peer, copying: remote.Copying, source: Path, kept: int
) -> None:
    target = copying.slots / "target"
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)
    os.truncate(target, kept)
    assert host.cable
    before = host.cable.received()
    remote.fetch(peer, source, target, copying, Alone(), total=64 * MIB)
    assert digest(target) == digest(source)
    assert target.stat().st_blocks <= 1.05 * source.stat().st_blocks
    rest = sum(max(0, (start + 4) * MIB + 4096 - max(kept, start * MIB + 4096)) for start in (0, 5, 20, 50))
    assert host.cable.received() - before < rest * 1.1 + MIB


@pytest.mark.parametrize(("room", "most"), [(4096 * MIB, 1984 * MIB), (1024 * MIB, 32 * MIB)])
def test_the_rest_of_an_empty_disk_does_not_take_its_full_size(
    host: LabHost, peer: Peer, copying: remote.Copying, monkeypatch: pytest.MonkeyPatch, room: int, most: int
) -> None:
    """rsync writes zeros where it continues. How much of them lies there at a time depends on how busy this host is."""
    monkeypatch.setattr(remote, "available_space", lambda _: room)
    source, target, total = host.data / "empty.raw", copying.slots / "target", 2048 * MIB
    source.write_bytes(os.urandom(4 * MIB))
    os.truncate(source, total)
    shutil.copy(source, target)
    os.truncate(target, 2 * MIB)
    taken, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            taken.append(target.stat().st_blocks * 512)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            remote.fetch(peer, source, target, copying, Alone(), total=total)
        finally:
            ended.set()
        looking.result()
    assert digest(target) == digest(source)
    assert target.stat().st_blocks <= 1.05 * source.stat().st_blocks
    assert max(taken) < most


def test_a_host_whose_key_is_not_known_gets_no_connection(
    peer: Peer, copying: remote.Copying, source: Path, tmp_path: Path
) -> None:
    nobody = tmp_path / "known_hosts"
    nobody.touch()
    strange = replace(copying, ssh=replace(copying.ssh, known_hosts=nobody))
    with pytest.raises(ConnectionMisconfigured, match="host key is known"):
        remote.fetch(peer, source, tmp_path / "target", strange, Alone(), total=64 * MIB)


def test_a_key_that_is_not_allowed_is_named(peer: Peer, copying: remote.Copying, tmp_path: Path) -> None:
    key = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with pytest.raises(ConnectionMisconfigured, match="Permission denied") as refused:
        remote.reach(peer, replace(copying, ssh=replace(copying.ssh, key=key)), Alone())
    assert "VIRTFLEET_SSH_KEY" in refused.value.hint


def test_a_file_that_is_not_there_is_no_broken_connection(
    host: LabHost, peer: Peer, copying: remote.Copying, tmp_path: Path
) -> None:
    with pytest.raises(CommandFailed, match="No such file"):
        remote.fetch(peer, host.data / "nothing", tmp_path / "target", copying, Alone(), total=64 * MIB)


def test_a_dead_host_is_noticed(peer: Peer, copying: remote.Copying, source: Path, tmp_path: Path) -> None:
    gone = peer.model_copy(update={"address": "127.0.0.1"})
    with pytest.raises((TransferInterrupted, ConnectionMisconfigured)):
        remote.fetch(gone, source, tmp_path / "target", copying, Alone(), total=64 * MIB)


def arrived(target: Path, least: int) -> bool:
    return target.stat().st_size > least


def test_a_copy_that_breaks_off_tells_what_came(
    host: LabHost, peer: Peer, copying: remote.Copying, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copy(source, target)
    os.truncate(target, 2 * MIB)
    for least in (4 * MIB, 8 * MIB):  # what was there before does not count
        had = target.stat().st_size
        with ThreadPoolExecutor(1) as pool:
            slow = replace(copying, bandwidth=4 * MIB)
            running = pool.submit(remote.fetch, peer, source, target, slow, Alone(), total=64 * MIB)
            wait_until(partial(arrived, target, least), 30, "some of it has arrived")
            for pid in host.processes():
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"rsync\0--server"):
                    kill9(pid)
            with pytest.raises(TransferInterrupted) as broken:
                running.result(30)
        assert broken.value.details["moved"] == target.stat().st_size - had
        assert broken.value.got_on


class Stoppable(Alone):
    def __init__(self) -> None:
        super().__init__()
        self.stop = False
        self.notes: set[str] = set()

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self.notes.add(note)
        self.check()

    def check(self) -> None:
        if self.stop:
            raise Cancelled("stop")


@pytest.mark.thorough
def test_copies_wait_for_a_slot_on_the_other_host_and_can_be_cancelled_while_they_wait(
    host: LabHost, peer: Peer, copying: remote.Copying, source: Path, tmp_path: Path
) -> None:
    watch, target = Stoppable(), tmp_path / "target"
    with (host.data / ".outgoing-0.lock").open("w") as slot, ThreadPoolExecutor(1) as pool:
        fcntl.flock(slot, fcntl.LOCK_EX)  # as rsync holds it while it sends
        running = pool.submit(remote.fetch, peer, source, target, copying, watch, total=64 * MIB)
        wait_until(lambda: any("outgoing copies on hosta" in note for note in watch.notes), 30, "it waits")
        assert not target.exists()
        watch.stop = True
        with pytest.raises(Cancelled):
            running.result(10)
    remote.fetch(peer, source, target, copying, Alone(), total=64 * MIB)
    assert digest(target) == digest(source)
