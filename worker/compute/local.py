"""The host this process stands on: its files, its libvirtd, and the lock that keeps a second actor away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from uuid import UUID

from worker.context import Context
from worker.errors import NotOurs
from worker.images.files import locked, remove_tree, remove_unfinished
from worker.images.layout import DataDir, InstanceDir
from worker.models import Owner
from worker.settings import Settings
from worker.virt.guest import Guest
from worker.virt.host import Host

LOCK_WAIT = 5.0
"""Seconds to wait for another process' lock on an instance before the step is put off."""


@dataclass(frozen=True)
class LocalHost:
    """A host as verbs see it."""

    name: str
    settings: Settings

    @property
    def data(self) -> DataDir:
        """The host's data directory."""
        return DataDir(self.settings.data_dir)

    def libvirt(self) -> AbstractContextManager[Host]:
        """A connection to the host's libvirtd for one step. Raises `HostUnreachable`."""
        return Host.open(self.settings.uri_of(self.name), name=self.name, timeout=self.settings.connect_timeout)


@dataclass(frozen=True)
class LocalInstance:
    """An instance on this host, whether it is there yet or not."""

    local: LocalHost
    name: str
    uuid: str
    is_aside: bool = False

    @property
    def folder(self) -> InstanceDir:
        """Where its files are."""
        return self.local.data.aside(self.uuid) if self.is_aside else self.local.data.instance(self.uuid)

    @property
    def aside(self) -> LocalInstance:
        """The copy of it that is kept after it has moved away."""
        return replace(self, is_aside=True)

    @contextmanager
    def owned(self, ctx: Context) -> Iterator[InstanceDir]:
        """Its directory, locked against every other process while the block runs.

        The lock is the host's own: it holds even if Redis hands the same step out twice. Raises `InstanceLocked`.
        """
        self.local.data.create()
        folder = self.folder.create()
        with locked(folder.lock, operation=ctx.operation, wait=LOCK_WAIT, watch=ctx):
            try:
                ctx.check()  # waiting for the lock, or for the processor, may have taken longer than the lease
                remove_unfinished(folder.path)  # who held the lock before may have been killed
                yield folder
            finally:
                self._leave_no_empty_folder()

    def _leave_no_empty_folder(self) -> None:
        """A directory with nothing but its lock was made by a look at what turned out not to be there."""
        path = self.folder.path
        if path.exists() and [entry.name for entry in path.iterdir()] == [self.folder.lock.name]:
            remove_tree(path, self.local.data.instances)

    def owner(self, ctx: Context, *, started: bool = False) -> Owner:
        """The mark that a step leaves in the domain's metadata when it changes something."""
        return Owner(name=self.name, uuid=UUID(self.uuid), operation=ctx.operation, fence=ctx.fence, started=started)


def require_ours(guest: Guest, *, foreign: bool = False) -> None:
    """Raise `NotOurs` for a domain without the fleet's mark, unless `foreign` ones are meant too."""
    if guest.owner() is None and not foreign:
        raise NotOurs(f"domain {guest.name!r} exists, but nothing in it says that it is the fleet's")
