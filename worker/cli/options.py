"""Options that several commands share, one by one and in groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from worker.cli.submit import submit
from worker.engine.requests import Request

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Instance = Annotated[str, typer.Argument(metavar="NAME", help="Name or uuid of an instance.")]


@dataclass(frozen=True)
class Call:
    """How an operation is asked for and followed."""

    operation_id: Annotated[
        str | None, typer.Option("--id", help="Operation id: the same id again attaches to the same operation.")
    ] = None
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the operation is accepted.")] = False
    wait_if_busy: Annotated[
        bool, typer.Option("--wait-if-busy", help="Queue behind the operation that owns the instance.")
    ] = False
    as_json: AsJson = False

    def submit(self, kind: type[Request], **asked: Any) -> None:
        """Submit the request, follow it, and exit with its code."""
        asked |= {"operation_id": self.operation_id, "wait_if_busy": self.wait_if_busy}
        submit(kind, no_wait=self.no_wait, as_json=self.as_json, **asked)


@dataclass(frozen=True)
class Shutdown:
    """How a guest is shut down."""

    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", help="Seconds to shut down in, then by force; 0: at once.")
    ] = 60.0
    retry_interval: Annotated[
        float, typer.Option("--retry-interval", metavar="S", help="Ask the guest again every S seconds.")
    ] = 10.0


@dataclass(frozen=True)
class NewSizes:
    """What an instance is to have from now on."""

    vcpus: Annotated[int | None, typer.Option("--vcpus", help="Virtual CPUs from now on.")] = None
    memory_mib: Annotated[int | None, typer.Option("--memory", metavar="MIB", help="Memory in MiB from now on.")] = None
    disk_gib: Annotated[
        int | None, typer.Option("--disk", metavar="GIB", help="Root disk in GiB; it never shrinks.")
    ] = None
    swap_mib: Annotated[
        int | None, typer.Option("--swap", metavar="MIB", help="Swap disk in MiB, made anew; 0: none.")
    ] = None
    ephemeral_gib: Annotated[
        list[int] | None,
        typer.Option("--ephemeral", metavar="GIB", help="An ephemeral disk in GiB, once for each: grown, or added."),
    ] = None


@dataclass(frozen=True)
class Readiness:
    """When a guest counts as up."""

    wait_for: Annotated[str, typer.Option("--wait-for", help="Ready when: running, agent or console.")] = "running"
    console_line: Annotated[
        str, typer.Option("--console-line", help="With --wait-for console: the text to wait for.")
    ] = ""
    ready_timeout: Annotated[
        float, typer.Option("--ready-timeout", metavar="S", help="Seconds until it must be ready.")
    ] = 300.0


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are groups stand for their options; it gets each group as one value."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        one.name: one.annotation for one in signature.parameters.values() if is_dataclass(one.annotation)
    }
    own = [one for one in signature.parameters.values() if one.name not in groups]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options = [option for group in groups.values() for option in _options(group)]
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return run


def _options(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
