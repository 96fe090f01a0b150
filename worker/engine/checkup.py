"""The engine's side of the doctor: is Redis fit to be trusted, and has anything in it been left behind?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import cast

from redis.exceptions import ResponseError

from worker.engine import keys, strays
from worker.engine.connection import Redis, translated
from worker.engine.journal import Journal
from worker.engine.mirror import Mirror
from worker.engine.registry import Registry
from worker.findings import Severity, Suspect, suspect
from worker.models import Instance

CLOCK_SKEW = 2.0
"""Seconds a host's clock may differ from Redis': the fleet goes by the latter, its users' logs by the former."""

OVERDUE = 30.0
"""Seconds: a reaper that is well looks at an operation within one or two of the time when it must."""

PERSISTENT = "appendonly yes, appendfsync always"


def look(book: Journal) -> Iterator[Suspect]:
    """All that there is to say of Redis and of what it holds."""
    yield from _settings(book.redis)
    yield from _reaper(book)
    yield from strays.claims(book)
    yield from strays.leases(book)
    yield from strays.operations(book)


def workers(fleet: Registry, host: str) -> Iterator[Suspect]:
    """The workers that a host should have and has not."""
    alive = fleet.alive(host)
    for kind in ("control", "disk"):
        if kind not in alive:
            what = f"no {kind} worker serves the host: what is meant for it waits"
            remedy = f"Start it there: virtfleet worker {kind} --host {host}"
            yield suspect(Severity.ERROR, f"no_{kind}_worker", what, where=f"{kind}@{host}", remedy=remedy)


def copies(mirror: Mirror) -> Iterator[Suspect]:
    """Copies of records on this host that could not be put back when Redis had lost them."""
    for path in mirror.aside():
        yield suspect(
            Severity.WARNING,
            "copy_set_aside",
            f"Redis has lost operation {path.stem}, and this host's copy of it was damaged or too old to be taken up",
            where=str(path),
            remedy=f"See in it what the operation did, and that its instance is well; then remove it: rm {path}",
        )


def clock(book: Journal) -> Suspect:
    """This machine's clock beside Redis'."""
    before = time.time()
    by_redis = book.now()
    skew = (before + time.time()) / 2 - by_redis
    if abs(skew) <= CLOCK_SKEW:
        return suspect(Severity.OK, "clock", f"the clock agrees with Redis' ({1000 * skew:+.0f} ms)")
    return suspect(
        Severity.WARNING,
        "clock",
        f"the clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} Redis': logs and records disagree",
        remedy="Let both machines follow a time server: timedatectl set-ntp true",
    )


def registered(fleet: Registry, host: str, present: list[Instance], sync: Callable[[], None]) -> Iterator[Suspect]:
    """Where the registry differs from what was found on a host just before; `sync` looks again and puts it right."""
    known = {instance.name: instance for instance in fleet.instances(host)}
    there = {instance.name: instance for instance in present}
    for name in sorted(known.keys() | there.keys()):
        what = _difference(known.get(name), there.get(name))
        if what:
            uuids = {one[name].uuid for one in (known, there) if name in one}
            yield suspect(
                Severity.WARNING,
                "registry",
                f"instance {name!r} {what}",
                where=name,
                remedy=f"virtfleet doctor --fix puts the registry right; so does: virtfleet hosts sync {host}",
                owners=[name, *uuids],
                repair=sync,
            )


def _difference(known: Instance | None, there: Instance | None) -> str:
    if known is None:
        return "is on the host, but not in the registry"
    if there is None:
        return "is in the registry, but not on the host"
    if known.uuid != there.uuid:
        return f"has uuid {there.uuid} on the host, {known.uuid} in the registry"
    if known.power is not there.power:
        return f"is {there.power} on the host, {known.power} in the registry"
    return ""


# --- Redis itself -----------------------------------------------------------------------------------------------------


def _settings(redis: Redis) -> Iterator[Suspect]:
    with translated():
        persistence, memory = redis.info("persistence"), redis.info("memory")
    yield _persistence(persistence.get("aof_enabled") == 1, _appendfsync(redis))
    if persistence.get("aof_last_write_status", "ok") != "ok":
        what = "Redis cannot write its append-only file, and so refuses every change"
        remedy = "Look into Redis' log; most often its disk is full."
        yield suspect(Severity.ERROR, "redis_write", what, where="aof_last_write_status", remedy=remedy)
    policy = memory.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        yield suspect(Severity.OK, "redis_eviction", "Redis forgets nothing to make room", where="maxmemory-policy")
        return
    yield suspect(
        Severity.ERROR,
        "redis_eviction",
        f"maxmemory-policy is {policy}: when its memory is full, Redis forgets operations that run",
        where="maxmemory-policy",
        remedy=_configure("maxmemory-policy noeviction"),
    )


def _persistence(appends: bool, fsync: str) -> Suspect:
    where = "appendonly, appendfsync"
    if appends and fsync == "always":
        return suspect(Severity.OK, "redis_persistence", "Redis keeps what it has acknowledged", where=where)
    if not appends:
        what = "appendonly is no: a restart of Redis loses every operation since its last snapshot"
        return suspect(Severity.ERROR, "redis_persistence", what, where=where, remedy=_configure(PERSISTENT))
    effect = "a power loss can lose operations that were accepted"
    what = (
        f"appendfsync is {fsync}: {effect}" if fsync else f"appendfsync cannot be read; if it is not always, {effect}"
    )
    return suspect(Severity.WARNING, "redis_persistence", what, where=where, remedy=_configure(PERSISTENT))


def _appendfsync(redis: Redis) -> str:
    """Empty where Redis does not tell: hosted ones refuse CONFIG."""
    try:
        with translated():
            return str(redis.config_get("appendfsync").get("appendfsync", ""))
    except ResponseError:
        return ""


def _configure(settings: str) -> str:
    commands = " && ".join(f"redis-cli config set {setting}" for setting in settings.split(", "))
    return f"{commands} && redis-cli config rewrite   (deploy/redis.conf has all that the fleet needs)"


def _reaper(book: Journal) -> Iterator[Suspect]:
    remedy = "It runs in every control worker; start one: virtfleet worker control"
    with translated():
        leader = cast("str | None", book.redis.get(keys.REAPER))
        late = book.now() - OVERDUE
        overdue = book.redis.zcount(keys.ATTENTION, "-inf", late)
        overdue += book.redis.zcount(keys.ATTENTION, keys.NOT_BEGUN, keys.NOT_BEGUN + late)
    if leader is None:
        what = "no reaper runs: what stands still is not set going again"
        yield suspect(Severity.ERROR, "reaper", what, where=keys.REAPER, remedy=remedy)
    elif overdue:
        what = f"{overdue} operations have waited more than {OVERDUE:.0f} s for the reaper ({leader})"
        remedy = f"Look into the log of {leader}; another control worker takes over when that one is stopped."
        yield suspect(Severity.WARNING, "reaper", what, where=keys.REAPER, remedy=remedy)
    else:
        yield suspect(Severity.OK, "reaper", f"the reaper runs in {leader}", where=keys.REAPER)
