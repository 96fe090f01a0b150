"""The first process of a lab: starts what its standard input asks for and, when that input ends, ends it all.

Run as a script by `tests.lab.process.Keeper`, also as PID 1 of a lab host; imports nothing of the project.
Input ends with its owner, however that dies. PR_SET_PDEATHSIG would follow the *thread* that forked, which
may end early, would miss a parent that died before the call, and would not reach grandchildren.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans below us, such as a daemonized QEMU, become our children


def children() -> list[int]:
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for pids in lists for pid in pids.read_text().split()]


def spawn(argv: list[str], env: dict[str, str], log: str) -> int:
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        argv[0],
        argv,
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, appending, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setpgroup=0,
        setsigdef=[signal.SIGPIPE],  # Python ignores it, and ignored signals stay ignored across exec
    )


def reap(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end() -> None:
    """SIGKILL until no descendant is left: the children of each one that dies become ours."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while pids := children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os.wait()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"pid": spawn(**request)}
    except OSError as error:
        return {"error": str(error)}


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
    end()


if __name__ == "__main__":
    main()
