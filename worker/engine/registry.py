"""What the fleet consists of: hosts, their workers, and which instance runs where."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, cast
from uuid import UUID

from worker.engine import keys
from worker.engine.connection import Redis, shared, translated
from worker.errors import HostsAreJoining, HostUnreachable, InstanceNotFound, SnapshotNotFound, UnknownHost
from worker.models import Frozen, Instance, Peer, SnapshotEntry
from worker.settings import get_settings

WorkerKind = Literal["control", "disk"]


class HostRecord(Frozen):
    """A host as its control worker describes it. Sizes in bytes."""

    name: str
    libvirt_uri: str
    data_dir: str
    address: str = ""
    copies_out: int = 2
    libvirt: str = ""
    qemu: str = ""
    accel: str = "unknown"
    accel_reason: str = ""
    seen_at: float = 0.0


class Registry:
    """Hosts and instances in Redis; the truth is on the hosts, this is the index to it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    # --- hosts ---------------------------------------------------------------------------------------------------

    def put_host(self, host: HostRecord) -> None:
        """Add a host or renew what is known of it."""
        with translated():
            self.redis.hset(keys.HOSTS, host.name, host.model_dump_json())

    def settle(self, host: str) -> None:
        """A host comes back of which Redis knows nothing: give the others time to do so, too.

        Each notices at a heartbeat, looks through its copies of operations, then through its guests.
        """
        settings = get_settings()
        patience = 2 * settings.heartbeat_interval + settings.connect_timeout + 5
        with translated():
            self.redis.set(keys.SETTLING, host, px=int(1000 * patience))

    def hosts(self) -> list[HostRecord]:
        """All hosts that have ever joined, by name."""
        with translated():
            found = cast("dict[str, str]", self.redis.hgetall(keys.HOSTS))
        return [HostRecord.model_validate_json(found[name]) for name in sorted(found)]

    def peer(self, name: str) -> Peer:
        """A host as copies see it. Raises `HostUnreachable`: it was known when the operation was admitted."""
        host = next((host for host in self.hosts() if host.name == name), None)
        if host is None:
            raise HostUnreachable(
                f"host {name} has not joined the fleet again since Redis lost its memory",
                hint=f"It does so by itself once its control worker runs: virtfleet worker control --host {name}",
            )
        return Peer(name=name, address=host.address or name, data_dir=Path(host.data_dir), copies_out=host.copies_out)

    def require_host(self, name: str) -> None:
        """Raise `UnknownHost` for a host that never joined, `HostsAreJoining` where it may do so any moment."""
        with translated():
            known = cast("list[str]", self.redis.hkeys(keys.HOSTS))
        if name not in known:
            self.require_settled(f"host {name!r}")
            raise UnknownHost(
                f"host: no host {name!r} is in the fleet; allowed: {', '.join(sorted(known))}",
                hint="A host joins when its control worker starts: virtfleet worker control --host NAME",
                field="host",
                given=name,
                allowed=sorted(known),
            )

    def require_settled(self, missing: str) -> None:
        """Raise `HostsAreJoining` while what is missing may only not be known yet, or not again."""
        with translated():
            is_settled = self.redis.exists(keys.HOSTS) and not self.redis.exists(keys.SETTLING)
        if not is_settled:
            raise HostsAreJoining(
                f"{missing} is not known, but Redis knew nothing a moment ago, and hosts are still joining",
                hint="Ask again in some seconds. Each host joins by its control worker: virtfleet worker control",
            )

    def knows(self, host: str) -> bool:
        """Whether a host is registered."""
        with translated():
            return bool(self.redis.hexists(keys.HOSTS, host))

    def heartbeat(self, host: str, kind: WorkerKind, facts: dict[str, Any]) -> None:
        """Say that a worker is alive; holds for three heartbeats."""
        ttl = int(get_settings().heartbeat_interval * 3000)
        with translated():
            self.redis.set(keys.alive(host, kind), json.dumps(facts), px=ttl)

    def farewell(self, host: str, kind: WorkerKind) -> None:
        """Say that a worker has stopped."""
        with translated():
            self.redis.delete(keys.alive(host, kind))

    def alive(self, host: str) -> dict[WorkerKind, dict[str, Any]]:
        """The workers that serve a host right now, with what they say of themselves."""
        kinds: tuple[WorkerKind, ...] = ("control", "disk")
        with translated():
            answers = cast("list[str | None]", self.redis.mget([keys.alive(host, kind) for kind in kinds]))
        return {kind: json.loads(answer) for kind, answer in zip(kinds, answers, strict=True) if answer}

    # --- instances -----------------------------------------------------------------------------------------------

    def put(self, instance: Instance) -> Instance:
        """Add an instance or renew what is known of it; the entry."""
        known = instance.model_copy(update={"updated_at": time.time()})
        with translated():
            pipe = self.redis.pipeline(transaction=True)
            pipe.hset(keys.INSTANCES, instance.name, known.model_dump_json())
            pipe.hset(keys.UUIDS, str(instance.uuid), instance.name)
            pipe.delete(keys.gone(instance.name))
            pipe.execute()
        return known

    def forget(self, name: str, uuid: UUID | str, *, destroyed_by: str = "", host: str = "") -> None:
        """Take an instance out; remember for a while which operation destroyed it."""
        with translated():
            pipe = self.redis.pipeline(transaction=True)
            pipe.hdel(keys.INSTANCES, name)
            pipe.hdel(keys.UUIDS, str(uuid))
            if destroyed_by:
                trace = json.dumps({"uuid": str(uuid), "host": host, "operation": destroyed_by, "at": time.time()})
                pipe.set(keys.gone(name), trace, ex=int(get_settings().keep_records))
            pipe.execute()

    def find(self, name_or_uuid: str) -> Instance | None:
        """An instance by its name or uuid, if it is known."""
        with translated():
            name = cast("str | None", self.redis.hget(keys.UUIDS, name_or_uuid)) or name_or_uuid
            found = cast("str | None", self.redis.hget(keys.INSTANCES, name))
        return Instance.model_validate_json(found) if found else None

    def require(self, name_or_uuid: str) -> Instance:
        """An instance by its name or uuid. Raises `InstanceNotFound`, `HostsAreJoining` as `require_host`."""
        found = self.find(name_or_uuid)
        if found is None:
            self.require_settled(f"instance {name_or_uuid!r}")
            raise InstanceNotFound(
                f"instance: no instance {name_or_uuid!r} is known", field="instance", given=name_or_uuid
            )
        return found

    def destroyed(self, name: str) -> dict[str, Any] | None:
        """Which operation destroyed an instance of this name lately, if one did."""
        with translated():
            trace = cast("str | None", self.redis.get(keys.gone(name)))
        return json.loads(trace) if trace else None

    def instances(self, host: str | None = None) -> list[Instance]:
        """All instances, or those of one host, by name."""
        with translated():
            found = cast("dict[str, str]", self.redis.hgetall(keys.INSTANCES))
        every = [Instance.model_validate_json(found[name]) for name in sorted(found)]
        return [instance for instance in every if host in (None, instance.host)]

    def replace(self, host: str, present: list[Instance], since: float) -> None:
        """Make the entries of one host equal to what was found there by a look that began at `since`.

        What was entered after that is newer than the look, and stays. So does what an operation owns: it may be on its
        way from one host to another, and on neither or on both for a moment.
        """
        known = {instance.name: instance for instance in self.instances()}
        newer = {name for name, instance in known.items() if instance.updated_at >= since}
        names = {instance.name for instance in present}
        for name, instance in known.items():
            if instance.host == host and name not in names | newer and not self._is_claimed(name):
                self.forget(name, instance.uuid)
        for instance in present:
            there = known.get(instance.name)
            moves = there is not None and there.host != host and self._is_claimed(instance.name)
            if instance.name not in newer and not moves:
                self.put(instance)

    def _is_claimed(self, name: str) -> bool:
        with translated():
            return bool(self.redis.exists(keys.claim(name)))

    # --- snapshots -----------------------------------------------------------------------------------------------

    def put_snapshot(self, snapshot: SnapshotEntry) -> None:
        """Add a snapshot."""
        known = snapshot.model_copy(update={"updated_at": time.time()})
        with translated():
            self.redis.hset(keys.SNAPSHOTS, snapshot.id, known.model_dump_json())

    def forget_snapshot(self, snapshot: str) -> None:
        """Take a snapshot out."""
        with translated():
            self.redis.hdel(keys.SNAPSHOTS, snapshot)

    def require_snapshot(self, snapshot: str) -> SnapshotEntry:
        """A snapshot by its id. Raises `SnapshotNotFound`, `HostsAreJoining` as `require_host`."""
        with translated():
            found = cast("str | None", self.redis.hget(keys.SNAPSHOTS, snapshot))
        if found is None:
            self.require_settled(f"snapshot {snapshot!r}")
            raise SnapshotNotFound(f"snapshot: no snapshot {snapshot!r} is known", field="snapshot", given=snapshot)
        return SnapshotEntry.model_validate_json(found)

    def snapshots(self, *, host: str | None = None, instance: str | None = None) -> list[SnapshotEntry]:
        """All snapshots, or those on one host or of one instance (name or uuid), oldest first."""
        with translated():
            found = cast("dict[str, str]", self.redis.hgetall(keys.SNAPSHOTS))
        every = sorted(map(SnapshotEntry.model_validate_json, found.values()), key=lambda one: one.taken_at)
        return [
            one
            for one in every
            if host in {None, one.host} and instance in {None, one.instance, str(one.instance_uuid)}
        ]

    def replace_snapshots(self, host: str, present: list[SnapshotEntry], since: float) -> None:
        """Make the entries of one host equal to the manifests found there by a look that began at `since`."""
        ids = {snapshot.id for snapshot in present}
        for snapshot in self.snapshots(host=host):
            if snapshot.id not in ids and snapshot.updated_at < since:
                self.forget_snapshot(snapshot.id)
        for snapshot in present:
            self.put_snapshot(snapshot)


def registry() -> Registry:
    """This process' registry."""
    return Registry(shared())
