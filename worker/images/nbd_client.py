"""A reading client of the NBD protocol: many reads under way on one connection, holes told apart from data.

QEMU's own programs copy whole exports only; a copy that goes on where it broke off has to ask for parts.
The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

T = TypeVar("T")

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sLL")
_OPTION_REPLY = struct.Struct(">QLLL")
_REQUEST = struct.Struct(">LHHQQL")
_CHUNK = struct.Struct(">LHHQL")
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QL")
_EXPORT = struct.Struct(">HQH")

_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_STARTTLS, _GO, _STRUCTURED_REPLY = 5, 7, 8
_ACK, _INFO, _UNKNOWN_EXPORT = 1, 3, 2**31 + 6
_INFO_EXPORT = 0
_READ = 0
_DONE, _DATA, _HOLES, _IS_ERROR = 1, 1, 2, 2**15
_LONGEST_REPLY = 64 * 1024
_ROOM = 1024**2  # bytes
_LOOK_EVERY = 0.5  # seconds
_GREETED_WITHIN = 2.0  # seconds
_CONNECT = 5.0  # seconds
_HANDSHAKE = 10.0  # seconds
_SILENCE = {  # a peer that is cut off is noticed after 15 s, as over ssh
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 2,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 15_000,
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
}


class NbdError(Exception):
    """The server refused, or said what the protocol does not know."""


class Broken(NbdError):
    """The connection is there no more."""


class NoSuchExport(NbdError):
    """The server has nothing of that name."""


class Busy(NbdError):
    """Somebody listens, and does not answer: the server has as many clients as it may have."""


@dataclass(frozen=True)
class Piece:
    """Part of the answer to a read: `length` bytes from `offset`, of which `data` holds none where there is a hole.

    `done`: the read is answered. To have its memory used again, hand `data` to `Connection.recycle`.
    """

    read: int
    offset: int
    length: int
    data: memoryview | None
    done: bool


class Connection:
    """A connection to one export, of `size` bytes. Raises `NbdError`."""

    def __init__(self, connected: socket.socket, *, patience: float, watch: Callable[[], None]) -> None:
        self._socket = connected
        self._patience, self._watch = patience, watch
        self._buffer = bytearray(0)
        self._unused: deque[bytearray] = deque()
        self.size = 0

    @classmethod
    def open(
        cls,
        address: tuple[str, int],
        export: str,
        tls: ssl.SSLContext | None,
        *,
        stall: float,
        watch: Callable[[], None],
    ) -> Connection:
        """Connect; over TLS unless `tls` is None. `watch` is called while it waits, and may end it by raising.

        Raises OSError too: when nobody listens (ConnectionRefusedError), or TLS is refused (ssl.SSLError).
        """
        connected = _connected(address, watch)
        try:
            for (level, option), value in _SILENCE.items():
                connected.setsockopt(level, option, value)
            connected.settimeout(_LOOK_EVERY)
            connection = cls(connected, patience=stall, watch=watch)
            connection._negotiate(address[0], export, tls)
        except BaseException:
            connected.close()
            raise
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, offset: int, length: int) -> None:
        """Ask for a part; answers come in any order, and name their read by its offset."""
        with _breaking():
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, offset, offset, length))

    def answer(self) -> Piece:
        """The next piece of any answer."""
        with _breaking():
            return self._answer()

    def recycle(self, data: memoryview) -> None:
        """Take a piece's `data` back, which nobody reads any more.

        Memory that is new each time costs the kernel as much as to receive what comes into it.
        """
        self._unused.append(cast("bytearray", data.obj))

    def _room(self, length: int) -> memoryview:
        with suppress(IndexError):
            if len(used := self._unused.popleft()) >= length:
                return memoryview(used)[:length]
        return memoryview(bytearray(max(length, _ROOM)))[:length]

    def _answer(self) -> Piece:
        magic, flags, kind, read, length = self._unpack(_CHUNK)
        if magic != _CHUNK_MAGIC:
            raise NbdError("the server's answer is none of the NBD protocol")
        done = bool(flags & _DONE)
        if kind == _DATA:
            (offset,) = self._unpack(_OFFSET)
            data = self._room(length - _OFFSET.size)
            self._fill(data)
            return Piece(read, offset, len(data), data, done)
        if kind == _HOLES:
            offset, hole = self._unpack(_HOLE)
            return Piece(read, offset, hole, None, done)
        said = bytes(self._read(min(length, _LONGEST_REPLY)))
        if kind & _IS_ERROR:
            number, text = int.from_bytes(said[:4]), said[6:].decode(errors="replace")
            raise NbdError(f"the server cannot read at {read}: {text or 'no reason given'} (error {number})")
        return Piece(read, read, 0, None, done)

    # --- the handshake --------------------------------------------------------------------------------------------

    def _negotiate(self, host: str, export: str, tls: ssl.SSLContext | None) -> None:
        patience, self._patience = self._patience, _GREETED_WITHIN
        try:
            magic, again, flags = self._unpack(_GREETING)
        except TimeoutError as error:
            raise Busy(f"{host} accepts connections, but does not answer") from error
        finally:
            self._patience = patience
        if (magic, again) != (b"NBDMAGIC", b"IHAVEOPT") or not flags & _FIXED_NEWSTYLE:
            raise NbdError(f"what listens on {host} is no NBD server of today")
        self._socket.sendall((_FIXED_NEWSTYLE | flags & _NO_ZEROES).to_bytes(4))
        if tls:
            self._require(_STARTTLS, b"", "has no TLS, and plain connections are not allowed")
            secured = tls.wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
            self._socket = secured
            try:
                _patiently(secured.do_handshake, _HANDSHAKE, self._watch)
            except BaseException:
                secured.close()  # who opened the connection holds the plain socket, which is an empty shell by now
                raise
        self._require(_STRUCTURED_REPLY, b"", "cannot tell holes from data")
        name = export.encode()
        self._require(_GO, len(name).to_bytes(4) + name + bytes(2), f"does not give {export}")

    def _require(self, option: int, data: bytes, otherwise: str) -> None:
        self._socket.sendall(_OPTION.pack(b"IHAVEOPT", option, len(data)) + data)
        while True:
            magic, about, kind, length = self._unpack(_OPTION_REPLY)
            if magic != _OPTION_REPLY_MAGIC or about != option or length > _LONGEST_REPLY:
                raise NbdError("the server's answer is none of the NBD protocol")
            said = bytes(self._read(length))
            if kind == _ACK:
                return
            if kind == _UNKNOWN_EXPORT:
                raise NoSuchExport(f"the server {otherwise}")
            if kind != _INFO:
                raise NbdError(f"the server {otherwise}: {said.decode(errors='replace') or f'reply {kind:#x}'}")
            if int.from_bytes(said[:2]) == _INFO_EXPORT:
                _, self.size, _ = _EXPORT.unpack(said)

    # --- bytes ----------------------------------------------------------------------------------------------------

    def _unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self._read(form.size))

    def _read(self, length: int) -> memoryview:
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        wanted = memoryview(self._buffer)[:length]
        self._fill(wanted)
        return wanted

    def _fill(self, wanted: memoryview) -> None:
        heard, got = time.monotonic(), 0
        while got < len(wanted):
            try:
                more = self._socket.recv_into(wanted[got:])
            except TimeoutError:
                self._watch()
                if time.monotonic() - heard > self._patience:
                    raise TimeoutError(f"nothing has come for {self._patience:g} s") from None
                continue
            if not more:
                raise ConnectionResetError("the server has closed the connection")
            got, heard = got + more, time.monotonic()


def _connected(address: tuple[str, int], watch: Callable[[], None]) -> socket.socket:
    return _patiently(lambda: socket.create_connection(address, timeout=_LOOK_EVERY * 2), _CONNECT, watch)


def _patiently(attempt: Callable[[], T], seconds: float, watch: Callable[[], None]) -> T:
    """Try until it does not time out, and look meanwhile whether to go on. Raises TimeoutError in the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except TimeoutError:
            watch()
            if time.monotonic() > deadline:
                raise


@contextmanager
def _breaking() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Broken(str(error)) from error
