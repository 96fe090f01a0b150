"""Spawn: a new instance from an image, running."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from celery import chain, group
from pydantic import Field, field_validator, model_validator

from tasks.steps.provision import build_seed, create_disks, fetch_image, lend_snapshot, spawn_instance, wait_ready
from worker.compute.provision import Readiness
from worker.compute.snapshots.elsewhere import Elsewhere
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import Registry
from worker.engine.requests import NewInstance, Target, is_operation_id
from worker.images.snapshots import no_root_disk
from worker.images.sources import SNAPSHOT
from worker.models import InstanceSpec, RootFile, SnapshotEntry, WaitFor
from worker.settings import get_settings


class SpawnRequest(NewInstance, InstanceSpec):
    """What to spawn, where, and when it counts as ready."""

    wait_for: WaitFor = "running"
    console_line: Annotated[str, Field(max_length=1000)] = ""
    ready_timeout: Annotated[float, Field(gt=0, le=86400)] = 300.0

    @model_validator(mode="after")
    def _console_needs_a_line(self) -> SpawnRequest:
        if self.wait_for == "console" and not self.console_line:
            raise ValueError("console_line: allowed: some text to wait for, when wait_for is 'console'")
        return self

    @field_validator("image")
    @classmethod
    def _snapshot_has_an_id(cls, image: str) -> str:
        if image.startswith(SNAPSHOT) and not is_operation_id(image.removeprefix(SNAPSHOT)):
            raise ValueError(f"allowed: {SNAPSHOT}ID with the id of a snapshot")
        return image

    def target(self, fleet: Registry, operation_id: str) -> Target:
        """Where the image is a snapshot, it must be known; one on another host is fetched by the fleet's transport."""
        target = super().target(fleet, operation_id)
        if not self.image.startswith(SNAPSHOT):
            return target
        entry = fleet.require_snapshot(self.image.removeprefix(SNAPSHOT))
        if entry.host == self.host:
            return target
        there = Elsewhere(id=entry.id, host=entry.host, layers=_layers(fleet, entry))
        details = {"snapshot": there.model_dump(mode="json"), "transport": get_settings().copy_transport}
        return replace(target, details=details)

    def readiness(self) -> Readiness:
        """When the guest counts as ready."""
        return Readiness(wait_for=self.wait_for, console_line=self.console_line, timeout=self.ready_timeout)

    def spec(self) -> InstanceSpec:
        """What the instance is made of, without where and when."""
        return InstanceSpec.model_validate(self.model_dump(include=set(InstanceSpec.model_fields)))


def _layers(fleet: Registry, entry: SnapshotEntry) -> tuple[RootFile, ...]:
    """The files of a snapshot's root disk, each of which builds on the next; a chain of increments lies on one host.

    Raises `SnapshotNotFound`, `InvalidSpec`.
    """
    layers = [_root(entry)]
    while (below := layers[-1].backing) is not None:
        layers.append(_root(fleet.require_snapshot(below)))
    return tuple(layers)


def _root(entry: SnapshotEntry) -> RootFile:
    if entry.root is None:
        raise no_root_disk(entry.id, entry.disks)
    return entry.root


@operation("virtfleet.spawn", SpawnRequest)
def spawn(op: Operation[SpawnRequest]) -> Canvas:
    """Make an instance and start it."""
    return chain(
        _image(op),
        create_disks.on(op),
        build_seed.on(op),
        spawn_instance.on(op),
        wait_ready.on(op),
    )


def _image(op: Operation[SpawnRequest]) -> Canvas:
    """A host takes a snapshot over ssh from where it lies; over NBD it has to be lent there meanwhile."""
    fetch = fetch_image.on(op)
    if op.details.get("transport") != "nbd":
        return fetch
    return group(fetch, lend_snapshot.on(op, host=op.details["snapshot"]["host"]))
