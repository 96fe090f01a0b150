"""Processes of a lab: each belongs to a keeper, and none outlives the Python process that owns the keeper."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
KEEPER = Path(__file__).with_name("keeper.py")
# Debian keeps libvirtd and virtlogd out of an ordinary user's PATH.
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"


class LabError(Exception):
    """A part of the lab did not do what was asked; the message ends with its log."""


@contextmanager
def lab_folder() -> Iterator[Path]:
    """A folder for one lab, removed afterwards.

    Directly under /tmp: paths of unix sockets end at 107 bytes. 0755: QEMU runs as another user.
    """
    folder = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], T], timeout: float, what: str, log: Path | None = None) -> T:
    """The first true value of `condition` within `timeout` seconds; raises LabError saying `what` was due."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain: {what}" + (f"\n{tail(log)}" if log else ""))
        time.sleep(0.02)
    return value


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[int]:
    """Pids of a process' children, zombies included; none if it does not exist."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, task.read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Pids of the children of a process, then of their children, and so on."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def tail(log: Path, lines: int = 20) -> str:
    """The end of a log file, indented, under its path."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n    ".join([f"{log}:", *text.splitlines()[-lines:]])


class Keeper:
    """Starts processes and guarantees their end: by `end()`, or when this process dies, even by SIGKILL.

    `prefix` is a command that runs the keeper in namespaces of its own.
    """

    def __init__(self, log: Path, prefix: Sequence[str] = ()) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self._popen = subprocess.Popen(
                [*prefix, sys.executable, "-I", "-S", str(KEEPER)],
                cwd=REPOSITORY,
                env={**os.environ, "PATH": os.environ.get("PATH", os.defpath) + SBIN},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C is for the owner, who then ends the lab in order
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._requests, self._answers = self._popen.stdin, self._popen.stdout

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        """Start a command with exactly this environment; returns its pid as seen by this process."""
        request = json.dumps({"argv": argv, "env": env, "log": str(log)})
        answer = json.loads(self._ask(request) or '{"error": "its keeper has ended"}')
        if "error" in answer:
            raise LabError(f"cannot start {argv[0]}: {answer['error']}\n{tail(self.log)}")
        for pid in self.processes():
            if _innermost_pid(pid) == answer["pid"]:
                return pid
        raise LabError(f"{argv[0]} ended as soon as it was started\n{tail(log)}")

    def processes(self) -> list[int]:
        """Pids of everything that runs under the keeper, parents before their children."""
        return [pid for pid in descendants(self._popen.pid) if running(pid)]

    def end(self) -> None:
        """SIGKILL everything the keeper started, and their descendants, and wait until they are gone."""
        with suppress(BrokenPipeError):
            self._requests.close()
        # Its output ends with it, also for a process forked from its parent, which cannot wait for it.
        select.select([self._answers], [], [], 30)
        self._answers.close()
        try:
            self._popen.wait(30)
        except subprocess.TimeoutExpired:
            survivors = self.processes()
            self._popen.kill()
            raise LabError(f"processes {survivors} do not end\n{tail(self.log)}") from None

    def _ask(self, request: str) -> str:
        with suppress(BrokenPipeError):
            self._requests.write(request + "\n")
            self._requests.flush()
        if not select.select([self._answers], [], [], 30)[0]:
            raise LabError(f"the keeper does not answer\n{tail(self.log)}")
        return self._answers.readline()


def _innermost_pid(pid: int) -> int | None:
    """A process' pid as it sees itself, in its own PID namespace."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


class Process:
    """One command under a keeper, with a log file; it can be killed, stopped, frozen and started again."""

    def __init__(self, keeper: Keeper, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        self.pid = 0
        self._keeper = keeper
        self._env = dict(env or {})

    def start(self) -> Self:
        """Start it; raises LabError if it cannot be started or runs already."""
        if self.alive:
            raise LabError(f"{self.argv[0]} runs already, as pid {self.pid}")
        environment = {**os.environ, **self._env}
        environment["PATH"] = environment.get("PATH", os.defpath) + SBIN
        self.pid = self._keeper.spawn(self.argv, environment, self.log)
        return self

    @property
    def alive(self) -> bool:
        return self.pid > 0 and running(self.pid)

    def children(self) -> list[int]:
        """Pids of its children that run."""
        return [pid for pid in children(self.pid) if running(pid)]

    def kill(self, sig: signal.Signals) -> None:
        os.kill(self.pid, sig)

    def kill9(self) -> None:
        """SIGKILL, and wait until it is gone. Its children live on, as they would in an accident."""
        kill9(self.pid)

    def stop(self, timeout: float = 10) -> None:
        """SIGTERM; SIGKILL if it has not ended after `timeout` seconds. Does nothing to what has ended."""
        if not self.alive:
            return
        with suppress(ProcessLookupError):
            self.kill(signal.SIGTERM)
        try:
            wait_until(lambda: not self.alive, timeout, f"{self.argv[0]} ends after SIGTERM")
        except LabError:
            self.kill9()

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It is stopped (SIGSTOP) in the `with` block: it exists, listens, and does nothing."""
        self.kill(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                self.kill(signal.SIGCONT)

    def require_alive(self) -> None:
        """Raise LabError with the end of the log if it does not run."""
        if not self.alive:
            raise LabError(f"ended: {' '.join(self.argv)}\n{tail(self.log)}")


def kill9(pid: int) -> None:
    """SIGKILL one process and wait until it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not running(pid), 10, f"process {pid} ends after SIGKILL")
