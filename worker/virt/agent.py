"""Freezing and thawing a guest's file systems through its agent: bounded, and thawed whatever happens."""

from __future__ import annotations

import json
from contextlib import suppress

import libvirt
import libvirt_qemu

from worker.errors import FleetError, InstanceNotFound, InvalidState
from worker.virt.faults import translated
from worker.virt.guest import Guest

ANSWER_WITHIN = 10
"""Seconds the agent has to freeze or thaw. A busy guest flushes its caches first; libvirt alone would wait for ever."""

_OS_INFO = '{"execute":"guest-get-osinfo"}'


def freeze(guest: Guest) -> int:
    """Flush and freeze the guest's file systems; how many. Raises AgentUnresponsive, InvalidState when not running.

    Also after an error the guest may be frozen, or become so when its agent catches up: thaw it in any case.
    """
    _bound(guest, ANSWER_WITHIN)
    with translated(f"freeze the file systems of {guest.name}", guest.host):
        return int(guest.domain.fsFreeze())


def thaw(guest: Guest) -> None:
    """Thaw the guest's file systems; thawed already, off or gone is success. Raises AgentUnresponsive."""
    try:
        _bound(guest, ANSWER_WITHIN)
        with translated(f"thaw the file systems of {guest.name}", guest.host):
            guest.domain.fsThaw()
    except (InvalidState, InstanceNotFound):
        if guest.is_active():
            raise


def relax(guest: Guest) -> None:
    """Let libvirt wait for the agent as long as it did before a freeze or thaw.

    Apart from these: beside a backup that has just begun, the call has taken 0.3 s.
    """
    with suppress(FleetError):  # not worth an error
        _bound(guest, libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)


def freezes_applications(guest: Guest) -> bool:
    """Whether a freeze also makes applications write their data out, as Windows does with its shadow copies (VSS).

    On other systems the agent may run hooks that do the same, but it does not tell whether it has any.
    """
    try:
        answer = _ask(guest, _OS_INFO)
    except FleetError:
        return False
    return isinstance(answer, dict) and answer.get("id") == "mswindows"


def _ask(guest: Guest, command: str) -> object:
    with translated(f"ask the agent of {guest.name}", guest.host):
        answer = libvirt_qemu.qemuAgentCommand(guest.domain, command, ANSWER_WITHIN, 0)
    return json.loads(answer).get("return")


def _bound(guest: Guest, seconds: int) -> None:
    with translated(f"bound the wait for the agent of {guest.name}", guest.host):
        guest.domain.agentSetResponseTimeout(seconds, 0)
