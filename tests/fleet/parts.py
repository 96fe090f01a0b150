"""What the tests of the whole fleet drive it with and look at: a scheduler, the command, the host's truth, images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import libvirt
from celery import Celery
from celery.result import AsyncResult

from tests.lab import Fleet, LabHost
from tests.lab.process import REPOSITORY
from worker.images import snapshots as published
from worker.images.layout import DataDir
from worker.models import Snapshot

Record = dict[str, Any]

# cli; hlt; jmp to the hlt: a guest that idles, costs no CPU and hears no ACPI button.
IDLE_BOOT_SECTOR = bytes.fromhex("faf4ebfd").ljust(510, b"\0") + b"\x55\xaa"


class Scheduler:
    """A Celery client that knows of the fleet only Redis and the names of its operations."""

    def __init__(self, url: str) -> None:
        self.app = Celery("scheduler", broker=url, backend=url, set_as_current=False)

    def send(self, operation: str, **arguments: Any) -> AsyncResult[Record]:
        """Send an operation off."""
        return cast(
            "AsyncResult[Record]", self.app.send_task(f"virtfleet.{operation}", kwargs=arguments, queue="virtfleet")
        )

    def call(self, operation: str, **arguments: Any) -> Record:
        """Send an operation and wait for its final record, at most two minutes."""
        return self.send(operation, **arguments).get(timeout=120)


# Starting Python and importing the command takes most of a second: it is done once, and each command is a fork of it.
_COMMANDS = """
import json, os, sys, traceback
import worker.cli.main
from worker.cli.start import main

for line in sys.stdin:
    arguments, outputs = json.loads(line)
    pid = os.fork()
    if pid:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, code = ["virtfleet", *arguments], 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Commands:
    """The real `virtfleet` command as a client of a fleet, started in milliseconds."""

    def __init__(self, fleet: Fleet) -> None:
        self._outputs = [fleet.folder / "command.out", fleet.folder / "command.err"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            cwd=REPOSITORY,
            env={**os.environ, **fleet.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `virtfleet ARGUMENTS` to its end, whatever its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, [str(path) for path in self._outputs]]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = (path.read_text() for path in self._outputs)
        return subprocess.CompletedProcess(arguments, code, out, err)

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=10)


@contextmanager
def libvirt_of(host: LabHost) -> Iterator[libvirt.virConnect]:
    """The lab host's own libvirtd, past the fleet."""
    with closing(libvirt.open(host.uri)) as connection:
        yield connection


def domains(host: LabHost) -> dict[str, bool]:
    """All domains of a host, and whether each is active."""
    with libvirt_of(host) as connection:
        return {domain.name(): bool(domain.isActive()) for domain in connection.listAllDomains()}


def virsh(host: LabHost, *arguments: str) -> str:
    """Run virsh on a host, past the fleet."""
    command = ["virsh", "--quiet", "--connect", host.uri, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def files(folder: Path) -> set[str]:
    """The files below a folder, by their paths in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def snapshots(host: LabHost) -> list[Snapshot]:
    """The snapshots that lie on a host, oldest first, by their manifests."""
    return published.every(DataDir(host.data))


def disk_of(host: LabHost, snapshot: Snapshot, target: str) -> tuple[Path, str]:
    """The file of a disk in a snapshot, and its format."""
    disk = next(disk for disk in snapshot.disks if disk.target == target)
    return host.data / "snapshots" / snapshot.id / disk.file, disk.format


def redis_keys(fleet: Fleet, pattern: str = "*") -> set[str]:
    """The keys Redis holds."""
    with fleet.redis.client() as client:
        return set(cast("list[str]", client.keys(pattern)))


def remains(fleet: Fleet, within: float = 3.0) -> dict[str, Any]:
    """What is left on the host and in Redis of instances and of operations; empty when nothing is.

    Whoever waits for an operation is told a moment before its last traces go: they may take `within` seconds.
    """
    deadline = time.monotonic() + within
    while (left := _remains(fleet)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _remains(fleet: Fleet) -> dict[str, Any]:
    host = fleet.hosts["hosta"]
    found: dict[str, Any] = {
        "domains": sorted(domains(host)),
        "instances": sorted(path.name for path in (host.data / "instances").glob("*")),
        "tmp": sorted(path.name for path in (host.data / "tmp").glob("*")),
        "copies of records": sorted(path.name for path in (host.data / "operations").glob("*")),
        "snapshots": sorted(path.name for path in (host.data / "snapshots").glob("*")),
        "reserved": sorted(path.name for path in (host.data / "reserved").glob("*")),
        "guests": [pid for pid in host.processes() if b"qemu-system" in _command_line(pid)],
    }
    for what in ("claim", "lease", "waiting", "attention"):
        found[what] = sorted(redis_keys(fleet, f"virtfleet:{what}*"))
    with fleet.redis.client() as client:
        found["registry"] = sorted(cast("dict[str, str]", client.hgetall("virtfleet:instances")))
    return {what: names for what, names in found.items() if names}


def clear(fleet: Fleet) -> None:
    """Take away what a failed test has left, so that the next one is judged by itself."""
    host = fleet.hosts["hosta"]
    with libvirt_of(host) as connection:
        for domain in connection.listAllDomains():
            with suppress(libvirt.libvirtError):
                domain.destroy()
            with suppress(libvirt.libvirtError):
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
    for folder in ("instances", "tmp", "operations", "snapshots", "reserved"):
        for path in (host.data / folder).glob("*"):
            subprocess.run(["rm", "-rf", str(path)], check=True)
    with fleet.redis.client() as client:
        for what in ("claim", "lease", "waiting", "attention", "instances"):
            for key in redis_keys(fleet, f"virtfleet:{what}*"):
                client.delete(key)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def idle_image(path: Path, *, size: int = 1024**2) -> Path:
    """A qcow2 image whose guest idles from its first instruction on."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(IDLE_BOOT_SECTOR)
    qemu_img("resize", "-q", "-f", "raw", str(raw), str(size))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    raw.unlink()
    return path


def qemu_img(*arguments: str) -> str:
    """Run qemu-img."""
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def image_info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image, also while a guest has it open."""
    info: dict[str, Any] = json.loads(qemu_img("info", "-U", "--output=json", str(path)))
    return info


# --- a web server of images -------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What the server has at an address; `pause` seconds before each block of 64 KiB."""

    body: bytes
    etag: str = '"1"'
    pause: float = 0.0
    announce_length: bool = True
    answers: list[int] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)
        if page is None:
            self.send_error(404)
            return
        status = 304 if page.etag and self.headers.get("If-None-Match") == page.etag else 200
        page.answers.append(status)
        self.send_response(status)
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.announce_length and status == 200:
            self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if status == 200:
            self._send(page)

    def _send(self, page: Page) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(page.body), 65536):
                time.sleep(page.pause)
                self.wfile.write(page.body[start : start + 65536])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Tests read `answers`."""


class WebServer(ThreadingHTTPServer):
    """A server of images on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page] = {}

    def put(self, path: str, page: Page) -> str:
        """Serve a page; its address."""
        self.pages[path] = page
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A server that answers in the `with` block."""
    with WebServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
