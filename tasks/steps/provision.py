"""Steps that make an instance, and what undoes them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tasks.steps.lending import LEND_RETRIES, are_fetched, lender_waits
from tasks.steps.local import local_host, local_instance, register
from worker.compute import cargo, provision
from worker.compute.local import LocalInstance
from worker.compute.snapshots import elsewhere
from worker.compute.snapshots.elsewhere import Elsewhere, Link
from worker.engine.patience import patiently
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.images.remote import Copying
from worker.models import BaseImage, Disk, DiskSet, Instance, PowerState

if TYPE_CHECKING:
    from tasks.spawn import SpawnRequest


@step("fetch_image", queue="disk")
def fetch_image(ctx: StepContext, request: SpawnRequest) -> BaseImage:
    """Check what the request needs of this host, then bring its image into the host's cache."""
    local, spec = local_host(ctx), request.spec()
    provision.check_request(local_instance(ctx), spec)
    if "snapshot" not in ctx.record.details:
        return provision.fetch_image(local, spec, ctx)
    there = _elsewhere(ctx)
    return elsewhere.fetch(local, spec, there, Link(ctx.registry.peer(there.host), _how(ctx)), ctx)


@step("lend_snapshot", queue="control", retries=LEND_RETRIES)
def lend_snapshot(ctx: StepContext, request: SpawnRequest) -> None:  # noqa: ARG001
    """Lend the snapshot that another host makes an instance of, while that fetches it over NBD."""
    elsewhere.lend(local_host(ctx), _elsewhere(ctx), _how(ctx), partial(are_fetched, ctx), ctx)


def _elsewhere(ctx: StepContext) -> Elsewhere:
    return Elsewhere.model_validate(ctx.record.details["snapshot"])


def _how(ctx: StepContext) -> Copying:
    # Not by operation: of several on one host one fetches and the others wait, whose lenders may have all the slots.
    session = f"{_elsewhere(ctx).id}@{ctx.record.host}"
    how = cargo.copying(local_host(ctx), ctx.record.details["transport"], session)
    return replace(how, lender_waits=partial(lender_waits, ctx))


@step("create_disks", queue="disk")
def create_disks(ctx: StepContext, request: SpawnRequest) -> DiskSet:
    """Make root, ephemeral and swap disks."""
    return provision.create_disks(local_instance(ctx), request.spec(), ctx.result(fetch_image), ctx)


@step("build_seed", queue="disk")
def build_seed(ctx: StepContext, request: SpawnRequest) -> Disk:
    """Make the cloud-init seed."""
    return provision.build_seed(local_instance(ctx), request.spec(), ctx)


@step("spawn_instance", queue="control")
def spawn_instance(ctx: StepContext, request: SpawnRequest) -> PowerState:
    """Define the domain and start it."""
    disks = DiskSet(disks=(*ctx.result(create_disks).disks, ctx.result(build_seed)))
    power = provision.spawn(local_instance(ctx), request.spec(), disks, ctx)
    register(ctx, power, request.spec())
    return power


@step("wait_ready", queue="control")
def wait_ready(ctx: StepContext, request: SpawnRequest) -> Instance:
    """Wait until the guest is as far as the request wants it."""
    power = provision.wait_ready(local_instance(ctx), request.readiness(), ctx)
    return register(ctx, power, request.spec())


@undoes("discard_fetched")
def undo_fetch(ctx: StepContext, key: str) -> None:
    """Remove what has arrived of a snapshot or a base image from another host."""
    cargo.discard_arriving(local_host(ctx), key, ctx)


@undoes("remove_files")
def undo_disks(ctx: StepContext, uuid: str) -> None:
    """Remove the directory that the operation made for its instance."""
    provision.remove_files(LocalInstance(local_host(ctx), ctx.instance, uuid), ctx)


@undoes("remove_domain")
def undo_domain(ctx: StepContext, name: str, uuid: str) -> None:
    """Remove the domain that the operation defined."""
    provision.remove_domain(LocalInstance(local_host(ctx), name, uuid), ctx)
    patiently(ctx.registry.forget, name, uuid)
