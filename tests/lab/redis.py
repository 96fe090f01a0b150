"""A private Redis server that loses nothing it has acknowledged, as the fleet requires."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import redis

from tests.lab.process import Keeper, Process, free_port, wait_until


class Redis:
    """redis-server on a free port of 127.0.0.1, its data in `folder`; port and data outlive restarts."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        folder.mkdir(parents=True, exist_ok=True)
        self._keeper = Keeper(folder / "keeper.log")
        self._server = Process(self._keeper, self._command(folder), folder / "redis.log")

    def _command(self, folder: Path) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        return ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._server.start()
        wait_until(self._answers_or_ended, 15, f"redis-server answers on port {self.port}", self._server.log)
        self._server.require_alive()

    def stop(self) -> None:
        """SIGTERM: an orderly shutdown."""
        self._server.stop()

    def kill9(self) -> None:
        self._server.kill9()

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Redis accepts connections in the `with` block, but answers nothing."""
        with self._server.frozen():
            yield

    def client(self, timeout: float = 5) -> redis.Redis:
        """A client that waits at most `timeout` seconds for an answer."""
        return redis.Redis.from_url(self.url, socket_timeout=timeout, decode_responses=True)

    def flushall(self) -> None:
        """Redis loses its memory."""
        with self.client() as client:
            client.flushall()

    def down(self) -> None:
        """Kill it for good; its files stay."""
        self._keeper.end()

    def processes(self) -> list[int]:
        """Pids of what runs, for a test that must know that it has ended."""
        return self._keeper.processes()

    def _answers_or_ended(self) -> bool:
        if not self._server.alive:
            return True
        with suppress(redis.ConnectionError, redis.TimeoutError), self.client(timeout=1) as client:
            return bool(client.ping())
        return False
