"""Files from another host over NBD: lent there by QEMU's storage daemon, fetched here block by block, over TLS."""

from __future__ import annotations

import itertools
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worker.context import Watcher
from worker.errors import CommandFailed, ConnectionMisconfigured, FleetError, NotItsTurn, TransferInterrupted
from worker.images.checksum import BLOCK, combined, sum_of_block, sum_of_hole
from worker.images.command import Command, run
from worker.images.files import human_size, locked, out_of_space_is_an_error
from worker.images.nbd_client import Broken, Busy, Connection, NbdError, NoSuchExport, Piece
from worker.images.writeback import written_out
from worker.models import Peer

_AT_ONCE = 16  # reads of a block each under way on a connection
_WAITING = 8  # pieces that may wait for the disk
_SUM = 32  # bytes
_LOOK_AGAIN = 0.5  # seconds
_WITHOUT_TURN = 5.0  # seconds
HINT = (
    "VIRTFLEET_NBD_TLS_DIR must hold what libvirt needs for migration over TLS: ca-cert.pem, server-cert.pem, "
    "server-key.pem, client-cert.pem, client-key.pem (qemu(1), TLS); plain connections need VIRTFLEET_NBD_PLAIN=1."
)


@dataclass(frozen=True)
class Nbd:
    """How files travel over NBD: on which TCP ports, and with the certificates in which folder; None: plain.

    `session` sets what is lent for one purpose apart from the rest.
    """

    ports: range
    tls: Path | None
    session: str

    def export_of(self, path: Path, data_dir: Path) -> str:
        """The name by which a file below a host's data directory is lent."""
        return f"{self.session}/{path.relative_to(data_dir)}"

    def client(self) -> ssl.SSLContext | None:
        """What a client shows, and what it demands of a server. Raises `ConnectionMisconfigured`."""
        if self.tls is None:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.tls / "ca-cert.pem"))
            context.load_cert_chain(self.tls / "client-cert.pem", self.tls / "client-key.pem")
        except OSError as error:  # ssl.SSLError is one
            raise ConnectionMisconfigured(f"no certificates for NBD in {self.tls}: {error}", hint=HINT) from error
        return context


# --- the side that lends ----------------------------------------------------------------------------------------------


def lend(
    files: Mapping[str, Path], address: str, nbd: Nbd, watch: Watcher, *, clients: int, held: tuple[int, ...] = ()
) -> None:
    """Lend files, by export name, to at most `clients` connections at a time, until `watch` raises something.

    They are read only. The port, the first that is free, is closed when this ends, and when this process does.
    Raises ConnectionMisconfigured, TransferInterrupted (no port is free), and what `watch` raises.
    """
    server = f"addr.type=inet,addr.host={address},addr.port={nbd.ports[0]},addr.to={nbd.ports[-1]}"
    argv = ["qemu-storage-daemon"]
    if nbd.tls:
        # tls-creds-x509 without verify-peer would let in whoever connects.
        argv += ["--object", f"tls-creds-x509,id=tls,dir={_quoted(nbd.tls)},endpoint=server,verify-peer=on"]
        server += ",tls-creds=tls"
    for number, path in enumerate(files.values()):
        node = f"node-name=file{number},filename={_quoted(path)},read-only=on,auto-read-only=off"
        argv += ["--blockdev", f"driver=file,{node}"]
    argv += ["--nbd-server", f"{server},max-connections={clients}"]
    for number, name in enumerate(files):
        argv += ["--export", f"type=nbd,id=export{number},node-name=file{number},name={_quoted(name)}"]
    try:
        run(Command(argv, "qemu-system-common"), watch=watch, pass_fds=held)
    except CommandFailed as error:
        raise _not_lent(error, nbd) from error
    raise TransferInterrupted("QEMU's storage daemon ended, though nobody asked it to")


def _not_lent(error: CommandFailed, nbd: Nbd) -> Exception:
    said = str(error.details["stderr"])
    if "in use" in said:
        ports = f"{nbd.ports[0]}-{nbd.ports[-1]}"
        return TransferInterrupted(f"no TCP port of {ports} is free", hint="Widen VIRTFLEET_NBD_PORTS.")
    if "credentials" in said or "certificate" in said.lower():
        return ConnectionMisconfigured(f"files cannot be lent over NBD: {said}", hint=HINT)
    return error


def _quoted(name: Path | str) -> str:
    """A name within an option of QEMU's, where a comma would end it."""
    return str(name).replace(",", ",,")


# --- the side that fetches --------------------------------------------------------------------------------------------


def fetch(
    peer: Peer,
    source: Path,
    target: Path,
    nbd: Nbd,
    watch: Watcher,
    *,
    total: int,
    stall: float,
    bandwidth: int | None = None,
    waits: Callable[[], bool] = lambda: False,
) -> str:
    """Copy `source` of another host, of `total` bytes, to `target`, and return its checksum.

    What is there already and still is what arrived is kept; the sums of its blocks lie beside it. Each block is
    read back from the file, so that the checksum is that of the file; holes stay holes.
    Raises TransferInterrupted, ConnectionMisconfigured, NoSpace, InstanceLocked, and what `watch` raises; NotItsTurn
    while who is to lend it `waits` to do so: whoever has the slots there may need the place of this one here.
    """
    lock = target.with_name(f"{target.name}.lock")
    with (
        locked(lock, wait=20.0, watch=watch),
        out_of_space_is_an_error(target.parent),
        _Arrived(target, total) as arrived,
    ):
        arrived.prove(watch)
        had = arrived.done
        try:
            with _connected(
                peer, nbd.export_of(source, peer.data_dir), nbd, watch, stall=stall, waits=waits
            ) as connection:
                _copy(connection, arrived, watch, bandwidth)
        except NbdError as error:
            raise TransferInterrupted(
                f"the copy of {source} from host {peer.name} ({peer.address}) broke off after"
                f" {human_size(arrived.done)}: {error}",
                hint="What has arrived is kept and continued.",
                moved=arrived.done - had,
            ) from error
        return arrived.checksum()


def _copy(connection: Connection, arrived: _Arrived, watch: Watcher, bandwidth: int | None) -> None:
    """Copy what is missing; however it ends, what has arrived by then is noted."""
    with written_out(arrived.target):
        try:
            _copy_blocks(connection, arrived, watch, bandwidth=bandwidth)
        except FleetError:  # told to stop: what a slow disk has not taken by now is not waited for
            arrived.forget_the_rest()
            raise
        finally:
            arrived.settle()


def _copy_blocks(connection: Connection, arrived: _Arrived, watch: Watcher, *, bandwidth: int | None) -> None:
    """Keep as many reads under way as the link and the server can use, and take in what comes, in any order."""
    offsets = iter(range(arrived.done, arrived.total, BLOCK))
    began, travelled = time.monotonic(), 0
    for offset in itertools.islice(offsets, _AT_ONCE):
        connection.ask(offset, arrived.length_at(offset, connection.size))
    while arrived.done < arrived.total:
        piece = connection.answer()
        travelled += len(piece.data or b"")
        arrived.take_in(piece, connection.recycle)
        if not piece.done:
            continue
        for offset in itertools.islice(offsets, 1):
            connection.ask(offset, arrived.length_at(offset, connection.size))
        watch.progress(arrived.done, arrived.total, "copying")
        if bandwidth:
            _wait_until(began + travelled / bandwidth, watch)


def _wait_until(moment: float, watch: Watcher) -> None:
    while (left := moment - time.monotonic()) > 0:
        watch.check()
        time.sleep(min(left, _LOOK_AGAIN))


@contextmanager
def _connected(
    peer: Peer, export: str, nbd: Nbd, watch: Watcher, *, stall: float, waits: Callable[[], bool]
) -> Iterator[Connection]:
    """A connection to the export, on whichever port it is lent; waited for as long as the other host may rest."""
    began, tls = time.monotonic(), nbd.client()
    while (found := _find(peer, export, nbd, tls, watch.check, stall=stall)) is None:
        watch.progress(0, None, f"waiting until host {peer.name} lends {export.rpartition('/')[2]}")
        waited = time.monotonic() - began
        if waited > _WITHOUT_TURN and waits():
            raise NotItsTurn(f"host {peer.name} lends {export} once a slot for outgoing copies is free there")
        if waited > stall:
            raise TransferInterrupted(
                f"host {peer.name} ({peer.address}) does not lend {export} on any port from {nbd.ports[0]}"
                f" to {nbd.ports[-1]}",
                hint="Its control worker must run there; the ports must be the same in both hosts' "
                "VIRTFLEET_NBD_PORTS, and open between them.",
            )
        time.sleep(_LOOK_AGAIN)
    with found:
        yield found


def _find(
    peer: Peer, export: str, nbd: Nbd, tls: ssl.SSLContext | None, check: Callable[[], None], *, stall: float
) -> Connection | None:
    for port in nbd.ports:
        check()
        try:
            return Connection.open((peer.address, port), export, tls, stall=stall, watch=check)
        except (ConnectionRefusedError, ConnectionResetError, ssl.SSLEOFError, NoSuchExport, Busy):
            continue
        except (ssl.SSLError, NbdError) as error:
            raise ConnectionMisconfigured(
                f"host {peer.name} ({peer.address}, port {port}) and this one do not agree on NBD: {error}", hint=HINT
            ) from error
        except OSError as error:
            raise Broken(f"port {port}: {error}") from error
    return None


class _Arrived:
    """A file on its way: which of its blocks are here, each with its sum in a file beside it.

    A thread of its own writes and sums up, while the next block comes over the link.
    """

    def __init__(self, target: Path, total: int) -> None:
        self.total, self.done = total, 0
        self.target, self._sums = target, target.with_name(f"{target.name}.sums")
        self._proven: list[bytes] = []
        self._writer = ThreadPoolExecutor(1)
        self._under_way: deque[Future[bytes | None]] = deque()
        self._finished: set[int] = set()
        self._with_data: set[int] = set()
        self._block = memoryview(bytearray(BLOCK))

    def __enter__(self) -> _Arrived:
        self._file = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._note = os.open(self._sums, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        os.close(self._file)
        os.close(self._note)

    def prove(self, watch: Watcher) -> None:
        """Keep what is here up to the first block that is not what its sum says."""
        noted = os.pread(self._note, os.fstat(self._note).st_size, 0)
        size = os.fstat(self._file).st_size
        for start in range(0, len(noted) - _SUM + 1, _SUM):
            offset, wanted = self.done, noted[start : start + _SUM]
            length = self.length_at(offset, self.total)
            if not length or offset + length > size or self._read_back(offset, length) != wanted:
                break
            self._proven.append(wanted)
            self.done += length
            watch.progress(self.done, self.total, "checking what has arrived")
        os.ftruncate(self._note, len(self._proven) * _SUM)
        os.lseek(self._note, 0, os.SEEK_END)
        os.ftruncate(self._file, self.done)
        os.ftruncate(self._file, self.total)

    def length_at(self, offset: int, size: int) -> int:
        """How long the block at `offset` is in a file or export of `size` bytes."""
        return max(0, min(BLOCK, size - offset))

    def take_in(self, piece: Piece, recycle: Callable[[memoryview], None]) -> None:
        """Have data written to its place, holes are there already; and blocks that are whole summed up, in turn.

        Raises what an earlier one met, such as a full disk.
        """
        if piece.data is not None:
            self._with_data.add(piece.read)
            data = piece.data[: max(0, self.total - piece.offset)]
            self._under_way.append(self._writer.submit(self._write, piece.offset, data, recycle))
        if piece.done:
            self._finished.add(piece.read)
        while self.done in self._finished:
            self._finished.remove(self.done)
            self._under_way.append(self._writer.submit(self._sum_of, self.done))
            self.done += self.length_at(self.done, self.total)
        while self._under_way and (self._under_way[0].done() or len(self._under_way) > _WAITING):
            self._note_next()

    def settle(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            self._note_next()

    def checksum(self) -> str:
        """The file's, once all of it is here; what was noted is needed no more."""
        self._sums.unlink(missing_ok=True)
        return combined(self._proven)

    def _note_next(self) -> None:
        try:
            found = self._under_way.popleft().result()
        except BaseException:
            self.forget_the_rest()  # of a block that could not be written no sum may be noted
            raise
        if found is not None:
            self._proven.append(found)
            os.write(self._note, found)

    def forget_the_rest(self) -> None:
        """Neither write nor note what still waits for the disk."""
        for later in self._under_way:
            later.cancel()
        self._under_way.clear()

    def _write(self, at: int, data: memoryview, recycle: Callable[[memoryview], None]) -> None:
        left = data
        while left:
            written = os.pwrite(self._file, left, at)
            at, left = at + written, left[written:]
        recycle(data)

    def _sum_of(self, offset: int) -> bytes:
        length = self.length_at(offset, self.total)
        if offset not in self._with_data:
            return sum_of_hole(length)
        self._with_data.discard(offset)
        return self._read_back(offset, length)

    def _read_back(self, offset: int, length: int) -> bytes:
        found = os.preadv(self._file, [self._block[:length]], offset)
        return sum_of_block(self._block[:found])
