"""Files from another host: sparse, continued where it broke off, one of a few at a time per host; by rsync or NBD."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.context import Watcher
from worker.errors import CommandFailed, ConnectionMisconfigured, InstanceLocked, TransferInterrupted
from worker.images import nbd
from worker.images.checksum import seal
from worker.images.command import Command, Progress, run
from worker.images.files import available_space, human_size, locked, size_of
from worker.images.nbd import Nbd
from worker.models import MIB, Peer

_SLOT_POLL = 0.5  # seconds
_SLOWEST_READ = 16 * 1024**2  # bytes per second, of a program that tells nothing while it reads a file
_DIG_AT_ONCE = 64 * MIB
_NO_SLOT = "virtfleet: all slots for outgoing copies are taken"
# rsync(1), EXIT VALUES, for what a broken connection looks like; 255 is ssh's own.
_BROKEN = {10, 12, 20, 30, 35, 255}
_REFUSED = re.compile(
    r"Permission denied \(|Host key verification failed|No \S+ host key is known|REMOTE HOST IDENTIFICATION HAS CHANGED"
)
_PROGRESS = re.compile(r"^\s*([\d,]+)\s+\d+%")


@dataclass(frozen=True)
class Ssh:
    """How to reach other hosts. The host's key must be known: nothing is ever accepted on first sight."""

    user: str = "root"
    port: int = 22
    key: Path | None = None
    known_hosts: Path | None = None

    def command(self) -> str:
        """The command that rsync starts; a connection that falls silent is given up after 15 s."""
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "Compression": "no",
            # Hardware does AES-GCM: half the CPU of OpenSSH's default cipher, which stays allowed.
            "Ciphers": "^aes128-gcm@openssh.com",
        }
        if self.key:
            options |= {"IdentityFile": str(self.key), "IdentitiesOnly": "yes"}
        if self.known_hosts:
            options["UserKnownHostsFile"] = str(self.known_hosts)
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return shlex.join(["ssh", "-l", self.user, "-p", str(self.port), *words])


@dataclass(frozen=True)
class Copying:
    """How a host copies: over which link, how many at a time, bytes per second per copy, seconds it may rest.

    Over ssh, unless `nbd` is given. Then `lender_waits` tells whether who lends the files only waits for its turn.
    """

    ssh: Ssh
    slots: Path
    incoming: int
    stall: float
    bandwidth: int | None = None
    nbd: Nbd | None = None
    lender_waits: Callable[[], bool] = lambda: False


def reach(peer: Peer, copying: Copying, watch: Watcher) -> None:
    """Raise `ConnectionMisconfigured` or `TransferInterrupted` unless files can be had from that host.

    Over NBD nothing is lent yet, so there is nothing to reach: only this host's certificates are looked at.
    """
    if copying.nbd:
        copying.nbd.client()
        return
    argv = ["rsync", "--list-only", "-s", "-e", copying.ssh.command(), _at(peer, peer.data_dir) + "/instances"]
    _run(peer, Command(argv, "rsync"), Path("its data directory"), stall=copying.stall, watch=watch)


def fetch(peer: Peer, source: Path, target: Path, copying: Copying, watch: Watcher, *, total: int) -> str:
    """Copy `source` of another host, of `total` bytes, to `target`, continuing what is there; holes stay holes.

    Returns the checksum of what is there now, read back. Progress in bytes.
    `target` is locked while anything still writes to it, also what a killed worker left running.
    Raises TransferInterrupted, ConnectionMisconfigured, NoSpace, Stalled, InstanceLocked, and what `watch` raises.
    """
    return bring(peer, source, target, copying, watch, total=total) or seal([target], watch)[target]


def bring(peer: Peer, source: Path, target: Path, copying: Copying, watch: Watcher, *, total: int) -> str | None:
    """`fetch` for who has another way to see that all is well: the checksum only where it costs nothing."""
    with _slot(copying, watch) as slot:
        if copying.nbd:
            stall, bandwidth = copying.stall, copying.bandwidth
            waits = copying.lender_waits
            return nbd.fetch(
                peer, source, target, copying.nbd, watch, total=total, stall=stall, bandwidth=bandwidth, waits=waits
            )
        _rsync(peer, source, target, copying, watch, total=total, slot=slot)
    return None


def _rsync(peer: Peer, source: Path, target: Path, copying: Copying, watch: Watcher, *, total: int, slot: int) -> None:
    lock = target.with_name(f"{target.name}.lock")
    with locked(lock, wait=20.0, watch=watch) as descriptor:
        continues = _may_continue(target, total)
        argv = [
            *("rsync", "--append-verify" if continues else "--sparse", "--inplace", "--protect-args"),
            # Holes travel as zeros: compressed they cost next to nothing, and lz4 wastes little time on the rest.
            "--compress-choice=lz4",
            *("--info=progress2", "--outbuf=L", f"--timeout={int(copying.stall)}"),
            *((f"--bwlimit={max(copying.bandwidth // 1024, 1)}",) if copying.bandwidth else ()),
            *("-e", copying.ssh.command(), f"--rsync-path={_sender(peer)}"),
            *(_at(peer, source), str(target)),
        ]
        command = Command(argv, "rsync", parse=_progress_of(total), output=target)
        held, digging = (slot, descriptor), _Digging(target, watch, stall=copying.stall)
        while not _copied(peer, command, source, stall=copying.stall, watch=digging if continues else watch, held=held):
            watch.progress(size_of(target), None, f"waiting for a slot for outgoing copies on {peer.name}")
            time.sleep(_SLOT_POLL)
        if continues:
            digging.dig_all()


@contextmanager
def outgoing_slots(folder: Path, most: int, wanted: int) -> Iterator[tuple[int, ...]]:
    """As many of this host's slots for outgoing copies as are wanted and free. Raises TransferInterrupted for none.

    The same that `rsync` holds when another host has started it here.
    """
    with ExitStack() as stack:
        taken: list[int] = []
        for number in range(most):
            if len(taken) < wanted:
                with suppress(InstanceLocked):
                    taken.append(stack.enter_context(locked(folder / f".outgoing-{number}.lock")))
        if not taken:
            raise TransferInterrupted(f"all {most} slots for outgoing copies are taken")
        yield tuple(taken)


def _may_continue(target: Path, total: int) -> bool:
    """Whether there is something to continue, and room for its rest even if that is nothing but zeros.

    rsync cannot continue a file sparsely (3.5.0 ends with "write failed: Success"). Where a disk that is all but empty
    could fill this host's, it is begun anew, with holes from the start.
    """
    return size_of(target) > 0 and available_space(target.parent) > total - size_of(target)


class _Digging:
    """A watcher that makes holes again of zeros that have arrived, as soon as many have."""

    def __init__(self, target: Path, watch: Watcher, *, stall: float) -> None:
        self._target, self._watch, self._stall = target, watch, stall
        self._dug = size_of(target) // MIB * MIB

    def progress(self, done: int, total: int | None = None, note: str = "") -> None:
        self._watch.progress(done, total, note)

    def check(self) -> None:
        self._watch.check()
        arrived = (size_of(self._target) - self._dug) // _DIG_AT_ONCE - 1  # rsync appends, at the last one
        if arrived > 0:
            self._dig(self._dug, arrived * _DIG_AT_ONCE)
            self._dug += arrived * _DIG_AT_ONCE

    def dig_all(self) -> None:
        """Make holes of all zeros, also of those that one who died had written."""
        self._dig(0, size_of(self._target))

    def _dig(self, start: int, length: int) -> None:
        where = ["--offset", str(start), "--length", str(length), str(self._target)]
        stall = max(self._stall, length / _SLOWEST_READ)
        run(Command(["fallocate", "--dig-holes", *where], "util-linux"), watch=self._watch, stall=stall)


def _copied(peer: Peer, command: Command, source: Path, **how: Any) -> bool:
    """Run the copy; False when the other host has no slot for it now."""
    try:
        _run(peer, command, source, **how)
    except TransferInterrupted as error:
        if _NO_SLOT not in error.message:
            raise
        return False
    return True


def _run(
    peer: Peer,
    command: Command,
    source: Path,
    *,
    stall: float,
    watch: Watcher | None = None,
    held: tuple[int, ...] = (),
) -> None:
    had = size_of(command.output) if command.output else 0
    try:
        run(command, watch=watch, stall=stall, pass_fds=held)
    except CommandFailed as error:
        said = str(error.details["stderr"])
        if _REFUSED.search(said):
            raise ConnectionMisconfigured(
                f"host {peer.name} ({peer.address}) refuses ssh: {said.splitlines()[0]}",
                hint="The worker's ssh key must be allowed there, and that host's key known here "
                "(VIRTFLEET_SSH_KEY, VIRTFLEET_SSH_KNOWN_HOSTS).",
            ) from error
        # With no slot there rsync ends with 12, or with the code of the shell, whichever it learns of first.
        if error.details["exit_code"] in _BROKEN or _NO_SLOT in said:
            has = size_of(command.output) if command.output else 0
            where = f"the copy of {source} from host {peer.name} ({peer.address})"
            raise TransferInterrupted(
                f"{where} broke off after {human_size(has)}: {said}",
                hint="What has arrived is kept and continued.",
                moved=has - had,
            ) from error
        raise


def _sender(peer: Peer) -> str:
    """rsync on the other host, holding one of its slots for outgoing copies for as long as it lives."""
    folder = shlex.quote(str(peer.data_dir))
    numbers = " ".join(map(str, range(peer.copies_out)))
    take = f'for n in {numbers}; do exec 9>>{folder}/.outgoing-$n.lock; flock -n 9 && exec rsync "$@"; done'
    return f"sh -c {shlex.quote(f'{take}; echo {shlex.quote(_NO_SLOT)} >&2; exit 75')} rsync"


@contextmanager
def _slot(copying: Copying, watch: Watcher) -> Iterator[int]:
    """One of this host's slots for incoming copies, waited for as long as it takes."""
    with ExitStack() as stack:
        while (descriptor := _free_slot(copying, stack)) is None:
            watch.progress(0, None, "waiting for a slot for incoming copies")
            time.sleep(_SLOT_POLL)
        yield descriptor


def _free_slot(copying: Copying, stack: ExitStack) -> int | None:
    for number in range(copying.incoming):
        try:
            return stack.enter_context(locked(copying.slots / f".incoming-{number}.lock"))
        except InstanceLocked:
            continue
    return None


def _progress_of(total: int | None) -> Callable[[str], Progress | None]:
    def parse(line: str) -> Progress | None:
        found = _PROGRESS.match(line)
        return (int(found[1].replace(",", "")), total) if found else None

    return parse


def _at(peer: Peer, path: Path) -> str:
    address = f"[{peer.address}]" if ":" in peer.address else peer.address  # IPv6
    return f"{address}:{path}"
