"""A whole fleet on one machine: Redis, hosts, and next to each host its control and disk workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

from tests.lab.host import LabHost
from tests.lab.process import REPOSITORY, Keeper, LabError, Process, free_port, wait_until
from tests.lab.redis import Redis

WorkerKind = Literal["control", "disk"]
KINDS: tuple[WorkerKind, ...] = ("control", "disk")
COMMAND = [sys.executable, "-m", "worker.cli"]


class Fleet:
    """Redis, hosts and workers with their files in `folder`; a context manager that brings them up and down.

    With `networked` each host is at the end of a cable that can be cut, and workers reach the other hosts by ssh.
    `with Fleet(folder, ["hosta", "hostb"]) as fleet:` returns when every worker serves its host.
    """

    def __init__(self, folder: Path, hosts: Sequence[str] = ("hosta",), *, networked: bool = False) -> None:
        self.folder = folder
        self.redis = Redis(folder / "redis")
        self.hosts = {name: LabHost(name, folder, networked=networked) for name in hosts}
        self._workers: dict[tuple[str, WorkerKind], Process] = {}
        self._keeper: Keeper | None = None
        self._listing_log = folder / "hosts.log"
        self._stack = ExitStack()

    @property
    def env(self) -> dict[str, str]:
        """Environment of a client of the fleet, which knows Redis and no host."""
        return {"VIRTFLEET_REDIS_URL": self.redis.url}

    def __enter__(self) -> Self:
        with self._stack:
            self._start()
            self.wait_ready()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def worker(self, host: str, kind: WorkerKind) -> Process:
        """The worker process of a host."""
        return self._workers[host, kind]

    def cli(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run `virtfleet ARGUMENTS` as a client, for up to `timeout` seconds, whatever its exit code."""
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **self.env},
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def wait_ready(self, timeout: float = 90) -> None:
        """Wait until both workers of every host serve it; raises LabError with the log of one that ended."""
        names = ", ".join(self.hosts)
        wait_until(self._ready, timeout, f"`virtfleet hosts` shows the workers of {names}", self._listing_log)

    def flower(self) -> str:
        """Start Flower; returns the address where it soon answers."""
        port = free_port()
        self._process("flower", "flower", "--port", str(port), "--address", "127.0.0.1").start()
        return f"http://127.0.0.1:{port}"

    def _start(self) -> None:
        self._stack.enter_context(self.redis)
        for host in self.hosts.values():
            self._stack.callback(host.down)
        with ThreadPoolExecutor() as pool:
            list(pool.map(LabHost.up, self.hosts.values()))
        self._keeper = Keeper(self.folder / "workers.log")
        self._stack.callback(self._keeper.end)
        for name, host in self.hosts.items():
            for kind in KINDS:
                arguments = ("worker", kind, "--host", name)
                self._workers[name, kind] = self._process(f"{name}-{kind}", *arguments, env=host.env).start()

    def _process(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Process:
        if not self._keeper:
            raise LabError("the fleet is not up")
        # A prefork pool that is killed leaves its temporary folder behind.
        environment = {**self.env, **(env or {}), "TMPDIR": str(self.folder)}
        return Process(self._keeper, [*COMMAND, *arguments], self.folder / f"{name}.log", environment)

    def _ready(self) -> bool:
        for worker in self._workers.values():
            worker.require_alive()
        alive = self.redis.client().keys("virtfleet:alive:*")  # cheaper than a command that cannot say yes yet
        if len(alive) < len(self._workers):
            return False
        listing = self.cli("hosts", "--json")
        self._listing_log.write_text(listing.stdout + listing.stderr)
        return listing.returncode == 0 and serves(json.loads(listing.stdout), self.hosts)


def serves(listing: dict[str, Any], hosts: Iterable[str]) -> bool:
    """Whether the output of `virtfleet hosts --json` shows both workers of all these hosts alive."""
    alive = {host["name"] for host in listing["hosts"] if all(host[kind] for kind in KINDS)}
    return alive >= set(hosts)
