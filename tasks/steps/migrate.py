"""Steps of a move to another host and back, and what undoes them. Each stands on one of the two hosts."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from tasks.steps.confirmation import confirm_when_due
from tasks.steps.lending import LEND_RETRIES, are_fetched, lender_waits
from tasks.steps.local import local_host, local_instance, register
from tasks.steps.power import shut_down_for
from worker.compute import arrival, cargo, departure, provision
from worker.compute.cargo import Cargo, Fingerprint
from worker.compute.departure import Departure, Handover
from worker.compute.local import LocalInstance
from worker.compute.power import PowerChange
from worker.engine.patience import patiently
from worker.engine.record import StepState
from worker.engine.retries import FINISH_RETRIES, Retries
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.images.remote import Copying
from worker.models import Frozen, Instance, Outcome, PowerState

if TYPE_CHECKING:
    from tasks.migrate import ConfirmRequest, MigrateRequest, RevertRequest

COPY_RETRIES = Retries(attempts=30, first_pause=2.0, longest_pause=30.0)
"""A cut cable is waited for about a quarter of an hour; what has arrived is kept meanwhile."""


class Acknowledged(Frozen):
    """A host agrees, by this execution's fence, which host's copy counts from now on."""

    host: str
    fence: int
    authoritative: str


# --- to another host --------------------------------------------------------------------------------------------------


@step("describe_source", queue="disk")
def describe_source(ctx: StepContext, request: MigrateRequest) -> Departure:
    """Find out what there is to move, and mark its directory."""
    instance, files = local_instance(ctx), tuple(ctx.record.details["files"])
    cargo.require_lendable(instance.local, _how(ctx, request))
    return departure.describe(instance, request.sizes(), files, ctx, flatten=request.flatten)


@step("preflight", queue="disk")
def preflight(ctx: StepContext, request: MigrateRequest) -> arrival.Place:
    """Refuse what the destination cannot do; see whether it shares the source's storage; reserve space."""
    peer, how = ctx.registry.peer(ctx.record.host), _how(ctx, request)
    leaving = ctx.result(describe_source)
    return arrival.preflight(local_instance(ctx), leaving, peer, ctx, how=how, flatten=request.flatten)


@step("prepare_destination", queue="disk", retries=COPY_RETRIES)
def prepare_destination(ctx: StepContext, request: MigrateRequest) -> arrival.Base:
    """Make the directory, and bring the base image, while the guest still runs."""
    if ctx.result(preflight).shared:
        return arrival.Base()
    peer, how = ctx.registry.peer(ctx.record.host), _how(ctx, request)
    return arrival.prepare(local_instance(ctx), ctx.result(describe_source), peer, ctx, how=how)


@step("lend", queue="control", retries=LEND_RETRIES)
def lend(ctx: StepContext, request: MigrateRequest) -> None:
    """Lend the files that another host fetches over NBD meanwhile."""
    if ctx.result(preflight).shared:
        return
    local, leaving = local_host(ctx), ctx.result(describe_source)
    root = local.data.root
    if _part(ctx) == "base":
        paths = [local.data.instance(ctx.uuid).spec, *([local.data.images / leaving.base] if leaving.base else [])]
    else:
        paths = [root / part.path for part in ctx.result(prepare_source).parts.values()]
    cargo.lend(local, [path for path in paths if path.exists()], _how(ctx, request), partial(are_fetched, ctx), ctx)


@step("shut_down_source", queue="control")
def shut_down_source(ctx: StepContext, request: MigrateRequest) -> PowerChange:
    """Shut the guest down."""
    return shut_down_for(ctx, request.patience(), ctx.result(describe_source).power)


@step("set_aside", queue="control")
def set_aside(ctx: StepContext, request: MigrateRequest) -> Acknowledged:
    """Keep the source's copy, which still counts, where nothing starts it."""
    departure.set_aside(local_instance(ctx), _handover(ctx, request, "moving"), ctx)
    return Acknowledged(host=ctx.host, fence=ctx.fence, authoritative=ctx.host)


@step("prepare_source", queue="disk")
def prepare_source(ctx: StepContext, request: MigrateRequest) -> Cargo:  # noqa: ARG001
    """See what there is to copy, now that it does not change any more; flatten the root disk if it has to be."""
    if ctx.result(preflight).shared:
        return Cargo()
    leaving = ctx.result(describe_source)
    flat = leaving.base is not None and ctx.result(prepare_destination).name is None
    return cargo.load(local_instance(ctx), leaving.files, ctx, flat=flat)


@step("copy_disk", queue="disk", retries=COPY_RETRIES)
def copy_disk(ctx: StepContext, request: MigrateRequest) -> arrival.Copied | None:
    """Copy one file, continuing what has arrived, and read it back."""
    if ctx.result(preflight).shared:
        return None
    name, peer = _part(ctx), ctx.registry.peer(ctx.record.host)
    part = ctx.result(prepare_source).parts[name]
    return arrival.copy_file(local_instance(ctx), name, part, peer, ctx, how=_how(ctx, request))


@step("fingerprint", queue="disk")
def fingerprint(ctx: StepContext, request: MigrateRequest) -> Fingerprint | None:  # noqa: ARG001
    """Read one file at its source, while it is copied."""
    if ctx.result(preflight).shared:
        return None
    return cargo.fingerprint(local_instance(ctx), _part(ctx), ctx.result(prepare_source), ctx)


@step("verify_disks", queue="disk")
def verify_disks(ctx: StepContext, request: MigrateRequest) -> None:  # noqa: ARG001
    """Compare what arrived with what was sent, then put it in place."""
    leaving = ctx.result(describe_source)
    if ctx.result(preflight).shared:
        return
    pairs = {}
    for name in leaving.files:
        sent, copied = ctx.result(fingerprint, f"fingerprint:{name}"), ctx.result(copy_disk, f"copy_disk:{name}")
        pairs[name] = (sent.sent if sent else "", copied.digest if copied else "")
    arrival.verify(local_instance(ctx), leaving, ctx.result(prepare_source), pairs, ctx)


@step("hand_over", queue="control")
def hand_over(ctx: StepContext, request: MigrateRequest) -> None:
    """From here on the destination may run its copy: the source takes its own back only after that is gone.

    Put down on the source: should Redis and the destination be lost at once, nothing else would tell it.
    """
    ctx.undo_on(request.to, "remove_arrived_domain", name=ctx.instance, uuid=ctx.uuid)


@step("define_destination", queue="control")
def define_destination(ctx: StepContext, request: MigrateRequest) -> None:
    """Define the domain on its new host."""
    arrival.define(local_instance(ctx), _handover(ctx, request, "moving"), ctx)


@step("start_destination", queue="control")
def start_destination(ctx: StepContext, request: MigrateRequest) -> None:
    """Start the guest, if it ran before, and wait until it is as far as the request wants it."""
    instance = local_instance(ctx)
    if arrival.start(instance, ctx.result(describe_source), ctx) is PowerState.RUNNING:
        provision.wait_ready(instance, request.readiness(), ctx)


@step("release", queue="control")
def release(ctx: StepContext, request: MigrateRequest) -> Acknowledged:
    """The source agrees that its copy does not count any more."""
    departure.release(local_instance(ctx), _handover(ctx, request, "moved"), ctx)
    return Acknowledged(host=ctx.host, fence=ctx.fence, authoritative=request.to)


@step("take_over", queue="control")
def take_over(ctx: StepContext, request: MigrateRequest) -> Outcome:
    """The destination's copy counts from here on; the source's is kept until that is confirmed."""
    instance = local_instance(ctx)
    wait = 0.0 if request.auto_confirm else ctx.settings.confirm_after or None
    due = {"confirm_at": None if wait is None else time.time() + wait}
    power = arrival.take_over(instance, _handover(ctx, request, "moved").model_copy(update=due), ctx)
    entry = register(ctx, power, provision.spec_of(instance.local, instance.uuid))
    patiently(confirm_when_due, entry)
    notes = (*ctx.result(describe_source).notes, *ctx.result(prepare_destination).notes)
    return Outcome.of(entry, *notes, _what_is_next(ctx, wait))


def _what_is_next(ctx: StepContext, wait: float | None) -> str:
    if ctx.result(preflight).shared:
        kept = f"nothing was copied: {ctx.record.host} has the same storage"
    else:
        kept = f"its former copy is kept on {ctx.record.host}"
    if wait == 0:
        return f"{kept}; it is confirmed by itself now"
    by_itself = f", which happens by itself in {wait:.0f} s" if wait else ""
    name = ctx.instance
    return f"{kept} until it is decided: virtfleet migration confirm {name}{by_itself}, or revert {name}"


def _handover(ctx: StepContext, request: MigrateRequest, phase: Literal["moving", "moved"]) -> Handover:
    source, destination = ctx.record.host, request.to
    leaving = ctx.result(describe_source)
    done = [name for name in leaving.files if ctx.record.steps[f"fingerprint:{name}"].state is StepState.DONE]
    found = {name: ctx.result(fingerprint, f"fingerprint:{name}") for name in done}
    return Handover(
        operation=ctx.operation,
        phase=phase,
        authoritative=source if phase == "moving" else destination,
        leftover=destination if phase == "moving" else source,
        shared=ctx.result(preflight).shared,
        departure=leaving,
        digests={name: prints.kept for name, prints in found.items() if prints},
    )


def _how(ctx: StepContext, request: MigrateRequest) -> Copying:
    transport = ctx.record.details.get("transport", "ssh")
    how = cargo.copying(local_host(ctx), transport, ctx.operation, request.bandwidth_mib)
    return replace(how, lender_waits=partial(lender_waits, ctx))


def _part(ctx: StepContext) -> str:
    return ctx.plan.key.partition(":")[2]


# --- confirmed --------------------------------------------------------------------------------------------------------


@step("prove_here", queue="disk")
def prove_here(ctx: StepContext, request: ConfirmRequest) -> None:  # noqa: ARG001
    """Make sure that the copy that counts is whole, before the other one goes."""
    arrival.prove_here(local_instance(ctx), ctx.record.details["migration"], ctx)


@step("remove_leftover", queue="disk", retries=FINISH_RETRIES)
def remove_leftover(ctx: StepContext, request: ConfirmRequest) -> bool:  # noqa: ARG001
    """Remove the copy that was set aside."""
    return departure.remove_aside(local_instance(ctx), ctx.record.details["migration"], ctx)


@step("settle", queue="control", retries=FINISH_RETRIES)
def settle(ctx: StepContext, request: ConfirmRequest) -> Instance:  # noqa: ARG001
    """The move is over."""
    instance = local_instance(ctx)
    power = arrival.settle(instance, ctx)
    return register(ctx, power, provision.spec_of(instance.local, instance.uuid))


# --- reverted ---------------------------------------------------------------------------------------------------------


@step("prove_source", queue="disk")
def prove_source(ctx: StepContext, request: RevertRequest) -> Handover:  # noqa: ARG001
    """Make sure that the copy that was set aside is what it was when the instance left."""
    return departure.prove_aside(local_instance(ctx), ctx.record.details["migration"], ctx)


@step("describe_destination", queue="disk")
def describe_destination(ctx: StepContext, request: RevertRequest) -> Departure:  # noqa: ARG001
    """Put down what the guest is where it is now."""
    instance = local_instance(ctx)
    return departure.describe(instance, departure.NOTHING_NEW, instance.folder.files(), ctx)


@step("shut_down_destination", queue="control")
def shut_down_destination(ctx: StepContext, request: RevertRequest) -> PowerChange:
    """Shut the guest down where it is now."""
    return shut_down_for(ctx, request.patience(), ctx.result(describe_destination).power)


@step("leave_destination", queue="control")
def leave_destination(ctx: StepContext, request: RevertRequest) -> Acknowledged:  # noqa: ARG001
    """Keep the copy that still counts where nothing starts it."""
    instance = local_instance(ctx)
    departure.set_aside(instance, _way_back(ctx, "moving"), ctx)
    ctx.undo_on(ctx.record.details["leftover"], "set_aside_again", **_set_aside_again(ctx))  # as in `hand_over`
    return Acknowledged(host=ctx.host, fence=ctx.fence, authoritative=ctx.host)


@step("return_source", queue="control")
def return_source(ctx: StepContext, request: RevertRequest) -> None:  # noqa: ARG001
    """Bring the copy that was set aside back to its place, its domain as it was."""
    ctx.undo("set_aside_again", **_set_aside_again(ctx))
    departure.put_back(local_instance(ctx), ctx, keep_note=True)


def _set_aside_again(ctx: StepContext) -> dict[str, str]:
    migration = ctx.record.details["migration"]
    return {"name": ctx.instance, "uuid": ctx.uuid, "migration": migration, "counts": ctx.record.host}


@step("start_source", queue="control")
def start_source(ctx: StepContext, request: RevertRequest) -> None:
    """Start the guest, if it ran before it left, and wait until it is as far as the request wants it."""
    instance = local_instance(ctx)
    departure.break_seal(instance, ctx)
    if arrival.start(instance, ctx.result(prove_source).departure, ctx) is PowerState.RUNNING:
        provision.wait_ready(instance, request.readiness(), ctx)


@step("release_destination", queue="control")
def release_destination(ctx: StepContext, request: RevertRequest) -> Acknowledged:  # noqa: ARG001
    """The host that the guest had moved to agrees that its copy does not count any more."""
    way_back = _way_back(ctx, "moved")
    departure.release(local_instance(ctx), way_back, ctx)
    return Acknowledged(host=ctx.host, fence=ctx.fence, authoritative=way_back.authoritative)


@step("take_back", queue="control")
def take_back(ctx: StepContext, request: RevertRequest) -> Instance:  # noqa: ARG001
    """The source's copy counts again; the other one goes as soon as this operation has ended."""
    instance = local_instance(ctx)
    counts = {"departure": ctx.result(prove_source).departure, "confirm_at": time.time()}
    power = arrival.take_over(instance, _way_back(ctx, "moved").model_copy(update=counts), ctx)
    entry = register(ctx, power, provision.spec_of(instance.local, instance.uuid))
    patiently(confirm_when_due, entry)
    return entry


def _way_back(ctx: StepContext, phase: Literal["moving", "moved"]) -> Handover:
    here, home = ctx.record.host, str(ctx.record.details["leftover"])
    return Handover(
        operation=ctx.operation,
        phase=phase,
        authoritative=here if phase == "moving" else home,
        leftover=home if phase == "moving" else here,
        shared=ctx.result(prove_source).shared,
        departure=ctx.result(describe_destination),
    )


# --- undone -----------------------------------------------------------------------------------------------------------


@undoes("forget_probe")
def undo_probe(ctx: StepContext, uuid: str) -> None:
    """Take the mark from the instance's directory."""
    departure.forget_probe(LocalInstance(local_host(ctx), ctx.instance, uuid), ctx.operation)


@undoes("release_reservation")
def undo_reservation(ctx: StepContext) -> None:
    """Give the reserved space free."""
    arrival.release(local_host(ctx).data, ctx.operation)


@undoes("remove_arrival")
def undo_arrival(ctx: StepContext, name: str, uuid: str) -> None:
    """Remove what has arrived. The source's copy is back in its place: that was undone before."""
    arrival.remove_arrival(LocalInstance(local_host(ctx), name, uuid), ctx)


@undoes("remove_arrived_domain")
def undo_definition(ctx: StepContext, name: str, uuid: str) -> None:
    """Take the domain from its new host."""
    arrival.remove_arrived_domain(LocalInstance(local_host(ctx), name, uuid), ctx)


@undoes("put_back")
def undo_set_aside(ctx: StepContext, name: str, uuid: str) -> None:
    """Bring the copy that was set aside back to its place."""
    instance = LocalInstance(local_host(ctx), name, uuid)
    power = departure.back_home(instance, ctx)
    register(ctx, power, provision.spec_of(instance.local, uuid))


@undoes("set_aside_again")
def undo_return(ctx: StepContext, name: str, uuid: str, migration: str, counts: str) -> None:
    """Set the copy aside again that a revert had brought back."""
    departure.set_aside_again(LocalInstance(local_host(ctx), name, uuid), migration, counts, ctx)
