"""Operations that need no host: their steps sleep, fail or die on demand, and write down who did what and when."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

from celery import chain, group
from kombu.transport.redis import Channel

from worker import logs
from worker.app import app
from worker.engine.canvas import Canvas
from worker.engine.kinds import Operation
from worker.engine.operation import operation
from worker.engine.registry import HostRecord, Registry, registry
from worker.engine.requests import Request, Target
from worker.engine.retries import Retries
from worker.engine.step import step
from worker.engine.step_context import StepContext
from worker.engine.undo import undoes
from worker.engine.worker import run_worker
from worker.errors import (
    GOT_ON,
    HostUnreachable,
    InstanceLocked,
    InvalidSpec,
    InvalidState,
    NoSpace,
    NotItsTurn,
    TransferInterrupted,
)
from worker.models import Name

HOST = "h1"
TICK = 0.05
QUICKLY = Retries(attempts=5, first_pause=0.2, longest_pause=1)


class Asked(Request):
    """Work of so many `seconds` on the instance `name`, written down in the file `log`."""

    name: Name = "vm"
    log: str
    seconds: float = 0.0

    def target(self, fleet: Registry, operation_id: str) -> Target:
        return Target(self.name, str(uuid5(NAMESPACE_URL, self.name)), HOST)


def note(ctx: StepContext, what: str, **facts: Any) -> None:
    line = {"operation": ctx.operation, "step": ctx.lease.step, "fence": ctx.fence, "what": what, **facts}
    with open(ctx.record.request["log"], "a") as log:  # noqa: PTH123 - appends of one line do not mix
        log.write(json.dumps({**line, "pid": os.getpid(), "at": time.monotonic()}) + "\n")


@contextmanager
def noted(ctx: StepContext) -> Iterator[None]:
    note(ctx, "begin")
    try:
        yield
    finally:
        note(ctx, "end")


def work_for(ctx: StepContext, seconds: float, *, deaf: bool = False) -> None:
    """Be busy, and say so at every tick; the deaf hear of no cancel."""
    ticks = round(seconds / TICK)
    for tick in range(ticks):
        note(ctx, "tick")
        if not deaf:
            ctx.progress(tick, ticks)
        time.sleep(TICK)


@undoes("test.remove")
def remove(ctx: StepContext, thing: str) -> None:
    note(ctx, "undo", thing=thing)


@undoes("test.refuse")
def refuse(ctx: StepContext) -> None:
    raise InvalidState("cannot be undone")


# --- steps --------------------------------------------------------------------------------------------------------


@step("test.call", queue="control", retries=QUICKLY)
def call(ctx: StepContext, request: Asked) -> str:
    with noted(ctx):
        return f"{ctx.lease.step} called"


@step("test.long_call", queue="control", retries=QUICKLY)
def long_call(ctx: StepContext, request: Asked) -> str:
    with noted(ctx):
        work_for(ctx, request.seconds)
        return "called"


@step("test.copy", queue="disk", retries=QUICKLY)
def copy(ctx: StepContext, request: Asked) -> dict[str, int]:
    with noted(ctx):
        ctx.undo("test.remove", thing=ctx.lease.step)
        work_for(ctx, request.seconds)
        return {"bytes": 5}


@step("test.deaf", queue="disk", retries=QUICKLY)
def deaf(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        ctx.undo("test.remove", thing="deaf")
        work_for(ctx, request.seconds, deaf=True)
        ctx.check()


@step("test.ask", queue="disk", retries=QUICKLY)
def ask(ctx: StepContext, request: Asked) -> None:
    """Needs Redis for its work, as steps do that change the registry."""
    with noted(ctx):
        for _ in range(round(request.seconds / TICK)):
            ctx.registry.find("vm")
            time.sleep(TICK)


@step("test.flaky", queue="control", retries=QUICKLY)
def flaky(ctx: StepContext, request: Asked) -> int:
    with noted(ctx):
        if ctx.lease.attempt < 3:
            raise HostUnreachable("not yet")
        return ctx.lease.attempt


@step("test.queueing", queue="control", retries=Retries(attempts=2, first_pause=0.1, longest_pause=0.1))
def queueing(ctx: StepContext, request: Asked) -> int:
    """Others are served first: more often than it may be tried."""
    with noted(ctx):
        turns = Path(request.log).read_text().count('"what": "begin"')
        if turns < 5:
            raise NotItsTurn("not yet")
        return ctx.lease.attempt


TWICE = Retries(attempts=2, first_pause=0.1, longest_pause=0.1)


@step("test.locked", queue="control", retries=TWICE)
def locked(ctx: StepContext, request: Asked) -> int:
    """Another process holds the instance's lock: for longer than the step may be tried, and then it fails once."""
    with noted(ctx):
        if ctx.lease.attempt < 5:
            raise InstanceLocked("not yet")
        if ctx.lease.attempt < 6:
            raise HostUnreachable("not yet")
        return ctx.lease.attempt


@step("test.getting_on", queue="control", retries=TWICE)
def getting_on(ctx: StepContext, request: Asked) -> int:
    """Breaks off more often than it may be tried, but for one time with something to show for it; then for good."""
    moved = {1: 0, 2: GOT_ON, 3: GOT_ON, 4: 0, 5: GOT_ON}
    with noted(ctx):
        raise TransferInterrupted("the cable again", moved=moved.get(ctx.lease.attempt, GOT_ON - 1))


@step("test.killed", queue="disk", retries=TWICE)
def killed(ctx: StepContext, request: Asked) -> int:
    """Its process dies as often as the step may be tried, and then it fails once."""
    with noted(ctx):
        if ctx.lease.attempt < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if ctx.lease.attempt < 4:
            raise HostUnreachable("not yet")
        return ctx.lease.attempt


@step("test.no_way_back", queue="control", retries=Retries(attempts=1))
def no_way_back(ctx: StepContext, request: NoWayBackRequest) -> int:
    """Fails once, after part of what it removes has gone."""
    failures = {"retryable": HostUnreachable("not yet"), "permanent": InvalidState("not yet"), "os": OSError(EIO, "no")}
    with noted(ctx):
        ctx.make_irrevocable()
        if ctx.lease.attempt < 2:
            raise failures[request.failure]
        return ctx.lease.attempt


@step("test.put_off", queue="control", retries=Retries(first_pause=100, longest_pause=100))
def put_off(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        ctx.undo("test.remove", thing="put off")
        raise HostUnreachable("not for a long time")


@step("test.full", queue="control")
def full(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        raise NoSpace("the disk is full", path="/full", needed=5)


@step("test.defect", queue="control")
def defect(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        ctx.undo("test.remove", thing="defect")
        raise ValueError("a bug")


@step("test.refusal", queue="control")
def refusal(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        raise InvalidSpec("name: not this one", field="name")


@step("test.for_ever", queue="control")
def for_ever(ctx: StepContext, request: Asked) -> None:
    with noted(ctx):
        ctx.undo("test.remove", thing="never reached")
        ctx.undo("test.refuse")


# --- operations ---------------------------------------------------------------------------------------------------


class ChainRequest(Asked): ...


@operation("test.chain", ChainRequest)
def chained(op: Operation[ChainRequest]) -> Canvas:
    return chain(call.on(op, key="before"), copy.on(op), call.on(op, key="after"))


class CallRequest(Asked): ...


@operation("test.call_only", CallRequest)
def called(op: Operation[CallRequest]) -> Canvas:
    return long_call.on(op)


class GroupRequest(Asked): ...


@operation("test.group", GroupRequest)
def grouped(op: Operation[GroupRequest]) -> Canvas:
    copies = [copy.on(op, key=f"copy-{number}") for number in range(2)]
    return chain(call.on(op, key="before"), group(*copies), call.on(op, key="after"))


class HalfRequest(Asked): ...


@operation("test.half", HalfRequest)
def half(op: Operation[HalfRequest]) -> Canvas:
    """One step of a group fails while the other is at work."""
    return chain(group(copy.on(op), full.on(op)), call.on(op, key="after"))


class FailRequest(Asked): ...


@operation("test.fail", FailRequest)
def failing(op: Operation[FailRequest]) -> Canvas:
    copies = [copy.on(op, key=f"copy-{number}") for number in range(3)]
    return chain(*copies, full.on(op), call.on(op, key="after"))


class GateRequest(Asked):
    """Its admission waits for the file `gate`."""

    gate: Path

    def target(self, fleet: Registry, operation_id: str) -> Target:
        self.gate.with_suffix(".reached").touch()
        while not self.gate.exists():
            time.sleep(TICK)
        self.gate.with_suffix(".passed").touch()
        return super().target(fleet, operation_id)


@operation("test.gate", GateRequest)
def gated(op: Operation[GateRequest]) -> Canvas:
    return call.on(op)


class DeafRequest(Asked): ...


@operation("test.deaf_only", DeafRequest)
def deafened(op: Operation[DeafRequest]) -> Canvas:
    return deaf.on(op)


class AskRequest(Asked): ...


@operation("test.ask_only", AskRequest)
def asking(op: Operation[AskRequest]) -> Canvas:
    return ask.on(op)


class FlakyRequest(Asked): ...


@operation("test.flaky_only", FlakyRequest)
def flaking(op: Operation[FlakyRequest]) -> Canvas:
    return flaky.on(op)


class QueueingRequest(Asked): ...


@operation("test.queueing_only", QueueingRequest)
def queueing_up(op: Operation[QueueingRequest]) -> Canvas:
    return queueing.on(op)


class LockedRequest(Asked): ...


@operation("test.locked_only", LockedRequest)
def locked_out(op: Operation[LockedRequest]) -> Canvas:
    return locked.on(op)


class GettingOnRequest(Asked): ...


@operation("test.getting_on_only", GettingOnRequest)
def getting_somewhere(op: Operation[GettingOnRequest]) -> Canvas:
    return getting_on.on(op)


class KilledRequest(Asked): ...


@operation("test.killed_only", KilledRequest)
def killed_often(op: Operation[KilledRequest]) -> Canvas:
    return killed.on(op)


class NoWayBackRequest(Asked):
    failure: Literal["retryable", "permanent", "os"]


@operation("test.no_way_back_only", NoWayBackRequest)
def without_way_back(op: Operation[NoWayBackRequest]) -> Canvas:
    return no_way_back.on(op)


class PutOffRequest(Asked): ...


@operation("test.put_off_only", PutOffRequest)
def putting_off(op: Operation[PutOffRequest]) -> Canvas:
    return put_off.on(op)


class DefectRequest(Asked): ...


@operation("test.defect_only", DefectRequest)
def defective(op: Operation[DefectRequest]) -> Canvas:
    return defect.on(op)


class RefusalRequest(Asked): ...


@operation("test.refusal_only", RefusalRequest)
def refusing(op: Operation[RefusalRequest]) -> Canvas:
    return refusal.on(op)


class StuckRequest(Asked): ...


@operation("test.stuck", StuckRequest)
def sticking(op: Operation[StuckRequest]) -> Canvas:
    return chain(for_ever.on(op), full.on(op))


def deliver_twice() -> None:
    """Every message this process sends arrives twice, as Redis may do it to Celery."""
    channel: Any = Channel
    put = channel._put

    def put_twice(*args: Any, **kwargs: Any) -> None:
        put(*args, **kwargs)
        put(*args, **kwargs)

    channel._put = put_twice


def introduce(host: str) -> None:
    """Make the host known; there is nothing on it to be found."""
    registry().put_host(HostRecord(name=host, libvirt_uri="", data_dir=""))


def main() -> None:
    """Run a worker that knows these operations: `control` or `disk`, and `twice` to have messages doubled."""
    kind, *options = sys.argv[1:]
    sys.argv = sys.argv[:1]
    if "twice" in options:
        deliver_twice()
    app.conf.include = ["tests.integration.engine_tasks"]
    logs.configure("info")
    if kind == "disk":
        run_worker("disk", [HOST], introduce=lambda _: None, loglevel="info")
    else:
        run_worker("control", [HOST], introduce=introduce, loglevel="info")
