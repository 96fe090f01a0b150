"""Steps that make an instance, and what undoes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.steps.local import local_host, local_instance, register
from worker.compute import provision
from worker.compute.local import LocalInstance
from worker.engine.patience import patiently
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.models import BaseImage, Disk, DiskSet, Instance, PowerState

if TYPE_CHECKING:
    from tasks.spawn import SpawnRequest


@step("fetch_image", queue="disk")
def fetch_image(ctx: StepContext, request: SpawnRequest) -> BaseImage:
    """Check what the request needs of this host, then bring its image into the host's cache."""
    provision.check_request(local_instance(ctx), request.spec())
    return provision.fetch_image(local_host(ctx), request.spec(), ctx)


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


@undoes("remove_files")
def undo_disks(ctx: StepContext, uuid: str) -> None:
    """Remove the directory that the operation made for its instance."""
    provision.remove_files(LocalInstance(local_host(ctx), ctx.instance, uuid), ctx)


@undoes("remove_domain")
def undo_domain(ctx: StepContext, name: str, uuid: str) -> None:
    """Remove the domain that the operation defined."""
    provision.remove_domain(LocalInstance(local_host(ctx), name, uuid), ctx)
    patiently(ctx.registry.forget, name, uuid)
