"""Freezing and thawing a guest's file systems through its agent: bounded, and thawed whatever happens."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import libvirt
import libvirt_qemu

from worker.errors import (
    AgentUnresponsive,
    FleetError,
    HypervisorError,
    InstanceNotFound,
    InvalidState,
    UnsupportedByHost,
)
from worker.virt.faults import translated
from worker.virt.guest import Guest

ANSWER_WITHIN = 10
"""Seconds the agent has to freeze or thaw. A busy guest flushes its caches first; libvirt alone would wait for ever."""

WINDOWS = "mswindows"
"""A system whose freeze makes applications write their data out, too, through its shadow copies (VSS).

On others the agent may run hooks that do the same, but it does not tell whether it has any.
"""

_UNKNOWN_COMMAND = re.compile(r"command \S+ has (been disabled|not been found)")
_OS_INFO = '{"execute":"guest-get-osinfo"}'


def freeze(guest: Guest) -> int:
    """Flush and freeze the guest's file systems; how many.

    Raises AgentUnresponsive, InvalidState when not running, HypervisorError when the agent says that it failed.

    Also after an error the guest may be frozen, or become so when its agent catches up: thaw it in any case.
    """
    _bound(guest, ANSWER_WITHIN)
    with translated(f"freeze the file systems of {guest.name}", guest.host):
        return int(guest.domain.fsFreeze())


def thaw(guest: Guest) -> None:
    """Thaw the guest's file systems; thawed already, off or gone is success. Raises AgentUnresponsive.

    So is an agent that cannot thaw at all: it cannot have frozen any.
    """
    try:
        _bound(guest, ANSWER_WITHIN)
        with translated(f"thaw the file systems of {guest.name}", guest.host):
            guest.domain.fsThaw()
    except (InvalidState, InstanceNotFound):
        if guest.is_active():
            raise
    except (HypervisorError, UnsupportedByHost) as error:
        if not _UNKNOWN_COMMAND.search(error.message):
            raise


def relax(guest: Guest) -> None:
    """Let libvirt wait for the agent as long as it did before a freeze or thaw.

    Apart from these: beside a backup that has just begun, the call has taken 0.3 s.
    """
    with suppress(FleetError):  # not worth an error
        _bound(guest, libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)


def system_of(guest: Guest, within: int) -> str | None:
    """What the agent calls the guest's operating system, empty where it does not tell; `within` so many seconds.

    No channel, no agent, a silent one and a guest that is off are all None.
    """
    try:
        with translated(f"ask the agent of {guest.name}", guest.host):
            answer = libvirt_qemu.qemuAgentCommand(guest.domain, _OS_INFO, within, 0)
    except (AgentUnresponsive, InvalidState, InstanceNotFound):
        return None
    except HypervisorError:  # "command guest-get-osinfo has not been found": it answers
        return ""
    try:
        return str(json.loads(answer)["return"]["id"])
    except (ValueError, LookupError, TypeError):  # any program in the guest may answer
        return ""


def _bound(guest: Guest, seconds: int) -> None:
    with translated(f"bound the wait for the agent of {guest.name}", guest.host):
        guest.domain.agentSetResponseTimeout(seconds, 0)
