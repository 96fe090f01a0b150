"""`virtfleet doctor`."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer
from rich.markup import escape

from tasks.doctor import examine_fleet, examine_here
from worker.cli import output
from worker.cli.options import AsJson
from worker.engine.connection import be_brief
from worker.engine.registry import registry
from worker.errors import BrokerUnavailable
from worker.findings import Finding, Severity
from worker.settings import get_settings

SIGNS = {Severity.INFO: "[cyan]info[/]", Severity.WARNING: "[yellow]warning[/]", Severity.ERROR: "[red]error[/]"}


def doctor(
    host: Annotated[list[str] | None, typer.Option("--host", help="Only this host; may be repeated.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what is safe to repair.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Examine this machine in this process: needs no worker and no Redis.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="S", min=1, help="Seconds a host has to answer.")] = 90.0,
    as_json: AsJson = False,
) -> None:
    """Examine hosts and Redis: what is not as it should be, and what to do about it.

    Exits with 1 while a warning or an error is left.
    """
    be_brief()
    with output.errors_told(as_json=as_json):
        if local:
            names = host or [get_settings().host]
            findings = [finding for name in names for finding in examine_here(name, fix=fix)]
        else:
            names, findings = _examine(host, fix=fix, timeout=timeout)
    if as_json:
        output.print_json({"findings": [finding.model_dump(mode="json") for finding in findings]})
    else:
        _show(findings, names, fix=fix)
    raise typer.Exit(_exit_code(findings))


def _examine(hosts: list[str] | None, *, fix: bool, timeout: float) -> tuple[list[str], list[Finding]]:
    try:
        names = hosts or [record.name for record in registry().hosts()]
        return names, examine_fleet(names, fix=fix, timeout=timeout)
    except BrokerUnavailable as error:
        hint = f"{error.hint} Examine this machine without it: virtfleet doctor --local"
        raise BrokerUnavailable(error.message, hint=hint) from error


def _exit_code(findings: list[Finding]) -> int:
    if any(finding.code == BrokerUnavailable.code for finding in findings):
        return output.UNREACHABLE
    return output.FAILED if any(finding.open for finding in findings) else output.OK


def _show(findings: list[Finding], hosts: list[str], *, fix: bool) -> None:
    told = [finding for finding in findings if finding.severity is not Severity.OK]
    for host, of_host in groupby(told, key=lambda finding: finding.host):
        rows = [_row(finding) for finding in of_host]
        output.table(f"[bold]{host or 'Redis'}[/]", ["", "what", "where", "remedy"], rows, empty="")
        output.console.print()
    checks = f"{len(findings)} checks of {', '.join(hosts) or 'Redis; no host has joined yet'}"
    problems = [finding for finding in told if finding.severity is not Severity.INFO]
    left = [finding for finding in problems if finding.open]
    if not problems:
        output.console.print(f"[green]Nothing to complain about[/] ({checks}).")
        return
    fixed = f", {len(problems) - len(left)} of them repaired" if fix else ""
    output.console.print(f"{len(problems)} findings{fixed} ({checks}).")
    if not fix and any(finding.fixable for finding in left):
        output.console.print("Repair what is safe to repair: virtfleet doctor --fix")


def _row(finding: Finding) -> list[str]:
    sign = "[green]repaired[/]" if finding.fixed else SIGNS[finding.severity]
    return [sign, escape(finding.what), escape(finding.where), escape("" if finding.fixed else finding.remedy)]
