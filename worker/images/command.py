"""Programs on the host: started so that they die with their worker, watched while they run, their errors translated."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.context import Alone, Watcher
from worker.errors import CommandFailed, NoSpace, Stalled, UnsupportedByHost
from worker.images.writeback import written_out

Progress = tuple[int, int | None]

KEPT_STDOUT = 8 * 1024**2
KEPT_STDERR = 16 * 1024
_LOOK_EVERY = 0.25  # seconds
_TERM_GRACE = 0.3  # seconds
_KILL_GRACE = 10.0  # seconds: only a process stuck in the kernel outlives SIGKILL
_LINE_END = re.compile(rb"[\r\n]")


@dataclass(frozen=True)
class Command:
    """A program to run.

    `parse` turns one line of its output into (done, total) or None; `output` is the file it writes, whose growth
    counts as progress, as does what the program reads. `cpu_seconds` and `memory_bytes` bound what it may use up (for
    files nobody has vouched for).
    """

    argv: Sequence[str]
    package: str
    parse: Callable[[str], Progress | None] | None = None
    output: Path | None = None
    success: tuple[int, ...] = (0,)
    cpu_seconds: int | None = None
    memory_bytes: int | None = None

    def full_argv(self) -> list[str]:
        """The command line with what ties the program to its worker, and its limits.

        A worker killed by SIGKILL leaves its children running (measured: a Celery pool child's qemu-img went on), and
        would write into a disk another worker has taken over. So the kernel is told to kill the child when the thread
        that started it ends: PR_SET_PDEATHSIG, which exec keeps; that thread is the one that waits in `run`.
        """
        argv = ["setpriv", "--pdeathsig", "KILL", "--"]
        if self.cpu_seconds is not None or self.memory_bytes is not None:
            argv.append("prlimit")
            argv += [f"--cpu={self.cpu_seconds}"] if self.cpu_seconds is not None else []
            argv += [f"--as={self.memory_bytes}"] if self.memory_bytes is not None else []
            argv.append("--")
        return [*argv, *self.argv]


def run(
    command: Command,
    *,
    watch: Watcher | None = None,
    stall: float | None = None,
    pass_fds: tuple[int, ...] = (),
) -> str:
    """Run the program to its end and return what it wrote to stdout.

    `stall`: seconds it may rest without progress. `pass_fds`: descriptors it inherits, such as a lock it must hold.
    Raises CommandFailed, NoSpace, Stalled, UnsupportedByHost (program missing), and what `watch` raises.
    """
    process = _start(command, pass_fds)
    running = _Running(process, command, watch or Alone(), stall)
    try:
        with written_out(*filter(None, [command.output])):
            exit_code = running.to_the_end()
    except BaseException:
        _kill(process)
        raise
    finally:
        running.close()
    if exit_code not in command.success:
        raise _failure(command, exit_code, running.stderr.decode(errors="replace").strip())
    return running.stdout.decode(errors="replace")


def _search_path() -> str:
    # mkswap lives in sbin, which is not in an ordinary user's PATH on Debian.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _start(command: Command, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    path = _search_path()
    for program, package in ((command.argv[0], command.package), ("setpriv", "util-linux")):
        if shutil.which(program, path=path) is None:
            raise UnsupportedByHost(
                f"The program {program} is not installed on this host.",
                hint=f"Install it, on Debian and Ubuntu with: apt install {package}",
                program=program,
                package=package,
            )
    return subprocess.Popen(
        command.full_argv(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LANG": "C", "LC_ALL": "C", "PATH": path},
        process_group=0,
        pass_fds=pass_fds,
    )


class _Running:
    """A program that runs: collects what it says and notices when it rests."""

    def __init__(self, process: subprocess.Popen[bytes], command: Command, watch: Watcher, stall: float | None) -> None:
        self.process, self.command, self.watch, self.stall = process, command, watch, stall
        self.stdout, self.stderr, self._line = bytearray(), bytearray(), b""
        self._progress: Progress | None = None
        self._position: tuple[Progress | None, int, int] = (None, 0, 0)
        self._moved_at = self._looked_at = time.monotonic()

    def to_the_end(self) -> int:
        """Follow the program until it has ended and all it wrote is read; returns its exit code."""
        with selectors.DefaultSelector() as selector:
            for stream, take in ((self.process.stdout, self._on_stdout), (self.process.stderr, self._on_stderr)):
                if stream is not None:
                    selector.register(stream, selectors.EVENT_READ, take)
            while selector.get_map():
                for key, _ in selector.select(_LOOK_EVERY):
                    if chunk := os.read(key.fd, 65536):
                        key.data(chunk)
                    else:
                        selector.unregister(key.fileobj)
                self._look()
        while True:
            try:
                return self.process.wait(_LOOK_EVERY)
            except subprocess.TimeoutExpired:
                self._look()

    def close(self) -> None:
        """Let go of the program's pipes."""
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _on_stderr(self, chunk: bytes) -> None:
        self.stderr += chunk
        del self.stderr[:-KEPT_STDERR]

    def _on_stdout(self, chunk: bytes) -> None:
        self.stdout += chunk
        del self.stdout[:-KEPT_STDOUT]
        if self.command.parse is None:
            return
        *lines, self._line = _LINE_END.split(self._line + chunk)
        for line in lines:
            progress = self.command.parse(line.decode(errors="replace"))
            if progress is not None:
                self._progress = progress
                self.watch.progress(*progress)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY:
            return
        self._looked_at = now
        self.watch.check()
        position = (self._progress, _allocated(self.command.output), _read_by(self.process))
        if position != self._position:
            self._position, self._moved_at = position, now
        elif self.stall is not None and now - self._moved_at > self.stall:
            raise Stalled(
                f"{self.command.argv[0]} has moved nothing for {self.stall:g} s and was ended.",
                hint="Look at the storage of the data directory: it does not answer or is overloaded.",
                argv=list(self.command.argv),
                seconds=self.stall,
            )


def _allocated(path: Path | None) -> int:
    if path is None:
        return 0
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _read_by(process: subprocess.Popen[bytes]) -> int:
    """Bytes that the program itself has read; 0 where the kernel does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^rchar: (\d+)", Path(f"/proc/{process.pid}/io").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, _TERM_GRACE), (signal.SIGKILL, _KILL_GRACE)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _failure(command: Command, exit_code: int, stderr: str) -> CommandFailed | NoSpace:
    program = Path(command.argv[0]).name
    if "No space left on device" in stderr:
        folder = command.output.parent if command.output else None
        available = shutil.disk_usage(folder).free if folder else None
        return NoSpace(
            f"{program} found no space left while it wrote {command.output or 'its output'}.",
            needed=None,
            available=available,
            path=str(folder or ""),
        )
    ended = f"exit code {exit_code}" if exit_code >= 0 else f"signal {signal.Signals(-exit_code).name}"
    return CommandFailed(
        f"{program} ended with {ended}: {stderr or 'it gave no reason'}",
        argv=list(command.argv),
        exit_code=exit_code,
        stderr=stderr,
    )
