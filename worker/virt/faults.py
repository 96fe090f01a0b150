"""What libvirt reports, in the fleet's words: decided by an error's code, domain and int1, as measured.

The message decides only where libvirt itself tells two causes apart by nothing else.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import libvirt

from worker.errors import (
    AgentUnresponsive,
    CheckpointMissing,
    ConnectionMisconfigured,
    DomainRejected,
    FleetError,
    HostUnreachable,
    HypervisorError,
    InstanceExists,
    InstanceLocked,
    InstanceNotFound,
    InvalidState,
    JobLost,
    NetworkNotFound,
    NoSpace,
    OutOfMemory,
    StateLockBusy,
    UnsupportedByHost,
)


@dataclass(frozen=True)
class Rule:
    """One row of the table: an empty set or pattern matches everything."""

    error: type[FleetError]
    codes: frozenset[int] = frozenset()
    domains: frozenset[int] = frozenset()
    int1s: frozenset[int] = frozenset()
    message: str = ""
    hint: str = ""

    def matches(self, code: int, domain: int, int1: int, message: str) -> bool:
        """Whether every condition of this row holds."""
        return (
            (not self.codes or code in self.codes)
            and (not self.domains or domain in self.domains)
            and (not self.int1s or int1 in self.int1s)
            and re.search(self.message, message) is not None
        )


def _of(*values: int) -> frozenset[int]:
    return frozenset(values)


_TRANSPORT = _of(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC)
_RPC = _of(libvirt.VIR_FROM_RPC)
_FILES = _of(libvirt.VIR_FROM_STORAGE, libvirt.VIR_FROM_SECURITY, libvirt.VIR_FROM_NONE)
_QEMU = _of(libvirt.VIR_FROM_QEMU)
_SYSTEM = _of(libvirt.VIR_ERR_SYSTEM_ERROR)
_INTERNAL = _of(libvirt.VIR_ERR_INTERNAL_ERROR)

# The first row that matches wins.
RULES: tuple[Rule, ...] = (
    # A refused key or certificate comes with the very numbers of a cut cable.
    Rule(
        ConnectionMisconfigured,
        _TRANSPORT,
        _RPC,
        message=r"certificate|Permission denied|Host key verification",
    ),
    Rule(HostUnreachable, _TRANSPORT, _RPC),
    # What libvirt also says of a connection that was closed before it was asked to keep it alive.
    Rule(HostUnreachable, _INTERNAL, _of(libvirt.VIR_FROM_REMOTE), message=r"keepalive protocol"),
    Rule(
        ConnectionMisconfigured,
        _of(
            libvirt.VIR_ERR_NO_CONNECT,
            libvirt.VIR_ERR_AUTH_FAILED,
            libvirt.VIR_ERR_AUTH_UNAVAILABLE,
            libvirt.VIR_ERR_ACCESS_DENIED,
        ),
    ),
    Rule(ConnectionMisconfigured, _of(libvirt.VIR_ERR_INVALID_ARG), _of(libvirt.VIR_FROM_REMOTE)),
    Rule(StateLockBusy, _of(libvirt.VIR_ERR_OPERATION_TIMEOUT)),
    Rule(AgentUnresponsive, _of(libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED)),
    Rule(AgentUnresponsive, _of(libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED), message=r"(?i)guest agent"),
    Rule(NoSpace, message=r"No space left on device"),
    Rule(OutOfMemory, _of(libvirt.VIR_ERR_NO_MEMORY)),
    Rule(OutOfMemory, _SYSTEM, int1s=_of(errno.ENOMEM)),
    Rule(OutOfMemory, _INTERNAL, _QEMU, message=r"annot allocate memory|cannot set up guest memory"),
    Rule(
        InstanceLocked,
        _INTERNAL,
        _QEMU,
        message=r'Failed to get .*"\w+" lock',
        hint="Another QEMU process has a disk of this guest open; it is tried again by itself.",
    ),
    # What libvirt says of a save whose end QEMU does not explain; the guest runs on.
    Rule(JobLost, _of(libvirt.VIR_ERR_OPERATION_FAILED), message=r"job '.*' unexpectedly failed"),
    # A block job that is done, or about to be.
    Rule(InvalidState, _INTERNAL, _QEMU, message=r"cannot accept command verb"),
    Rule(DomainRejected, _INTERNAL, _QEMU, message=r"process exited|unexpectedly closed the monitor"),
    Rule(NetworkNotFound, _SYSTEM, _FILES, _of(errno.ENODEV)),
    Rule(NetworkNotFound, _of(libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_ERR_NO_INTERFACE)),
    Rule(DomainRejected, _SYSTEM, _FILES, _of(errno.ENOENT, errno.EACCES)),
    Rule(InstanceNotFound, _of(libvirt.VIR_ERR_NO_DOMAIN)),
    Rule(InstanceExists, _of(libvirt.VIR_ERR_DOM_EXIST)),
    Rule(InstanceExists, _of(libvirt.VIR_ERR_OPERATION_FAILED), message=r"already exists|already defined"),
    Rule(
        InvalidState,
        _of(
            libvirt.VIR_ERR_OPERATION_INVALID,
            libvirt.VIR_ERR_BLOCK_COPY_ACTIVE,
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
        ),
    ),
    Rule(
        CheckpointMissing,
        _of(libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT),
    ),
    Rule(InvalidState, _of(libvirt.VIR_ERR_OPERATION_UNSUPPORTED), message=r"active block job"),
    Rule(
        DomainRejected,
        _of(
            libvirt.VIR_ERR_NO_NAME,
            libvirt.VIR_ERR_XML_ERROR,
            libvirt.VIR_ERR_XML_DETAIL,
            libvirt.VIR_ERR_XML_INVALID_SCHEMA,
        ),
    ),
    Rule(
        UnsupportedByHost,
        _of(
            libvirt.VIR_ERR_NO_SUPPORT,
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            libvirt.VIR_ERR_CPU_INCOMPATIBLE,
        ),
    ),
)
_UNKNOWN = Rule(HypervisorError)


def translate(error: libvirt.libvirtError, doing: str, where: str) -> FleetError:
    """The fleet's error for one of libvirt's; `details`: libvirt_code, libvirt_domain, libvirt_int1.

    `doing` completes "cannot ...", `where` is the host's name.
    """
    code, domain, int1 = error.get_error_code() or 0, error.get_error_domain() or 0, error.get_int1() or 0
    message = error.get_error_message() or str(error)
    rule = next((rule for rule in RULES if rule.matches(code, domain, int1, message)), _UNKNOWN)
    return rule.error(
        f"cannot {doing} on host {where}: {message}",
        hint=rule.hint,
        host=where,
        libvirt_code=code,
        libvirt_domain=domain,
        libvirt_int1=int1,
    )


@contextmanager
def translated(doing: str, where: str) -> Iterator[None]:
    """Round every call into libvirt: what it raises leaves as a `FleetError`. Serves as a decorator, too."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, doing, where) from error
