"""What libvirt reports becomes the error that says whether to try again and what to do."""

from __future__ import annotations

import errno

import libvirt
import pytest

from worker import errors
from worker.virt.faults import translate, translated

ANY = libvirt.VIR_FROM_NONE
RPC = libvirt.VIR_FROM_RPC
REMOTE = libvirt.VIR_FROM_REMOTE
QEMU = libvirt.VIR_FROM_QEMU
STORAGE = libvirt.VIR_FROM_STORAGE
SECURITY = libvirt.VIR_FROM_SECURITY
SYSTEM = libvirt.VIR_ERR_SYSTEM_ERROR
INTERNAL = libvirt.VIR_ERR_INTERNAL_ERROR
OPERATION_FAILED = libvirt.VIR_ERR_OPERATION_FAILED
UNKNOWN_HOST_OR_TLS = -1

TABLE = [
    # the connection
    (SYSTEM, RPC, errno.EIO, "Cannot write data: Input/output error", errors.HostUnreachable),
    (SYSTEM, RPC, errno.EPIPE, "Cannot write data: Broken pipe", errors.HostUnreachable),
    (INTERNAL, RPC, 0, "internal error: client socket is closed", errors.HostUnreachable),
    (INTERNAL, RPC, 0, "internal error: received hangup event on socket", errors.HostUnreachable),
    (INTERNAL, RPC, 0, "connection closed due to keepalive timeout", errors.HostUnreachable),
    (INTERNAL, REMOTE, 0, "the caller doesn't support keepalive protocol", errors.HostUnreachable),
    (libvirt.VIR_ERR_RPC, RPC, 0, "no call waiting for reply with prog 5", errors.HostUnreachable),
    (SYSTEM, RPC, errno.ENOENT, "Failed to connect socket to '/run/libvirt-sock'", errors.HostUnreachable),
    (SYSTEM, RPC, errno.ECONNREFUSED, "unable to connect to server: refused", errors.HostUnreachable),
    (SYSTEM, RPC, errno.EHOSTUNREACH, "unable to connect: No route to host", errors.HostUnreachable),
    (SYSTEM, RPC, UNKNOWN_HOST_OR_TLS, "unable to resolve host: Name unknown", errors.HostUnreachable),
    (SYSTEM, RPC, UNKNOWN_HOST_OR_TLS, "certificate is not trusted", errors.ConnectionMisconfigured),
    (SYSTEM, RPC, errno.ENOENT, "Cannot read CA certificate '/x'", errors.ConnectionMisconfigured),
    (SYSTEM, RPC, errno.ECONNRESET, "Permission denied (publickey)", errors.ConnectionMisconfigured),
    (libvirt.VIR_ERR_NO_CONNECT, ANY, 0, "no connection driver available", errors.ConnectionMisconfigured),
    (libvirt.VIR_ERR_INVALID_ARG, REMOTE, 0, "transport in URL not recognised", errors.ConnectionMisconfigured),
    (libvirt.VIR_ERR_AUTH_FAILED, RPC, 0, "authentication failed", errors.ConnectionMisconfigured),
    # the guest's state
    (libvirt.VIR_ERR_OPERATION_TIMEOUT, QEMU, 0, "cannot acquire state change lock", errors.StateLockBusy),
    (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, QEMU, 0, "agent is not connected", errors.AgentUnresponsive),
    (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, QEMU, 0, "QEMU guest agent is not configured", errors.AgentUnresponsive),
    (libvirt.VIR_ERR_NO_DOMAIN, QEMU, 0, "Domain not found", errors.InstanceNotFound),
    (libvirt.VIR_ERR_DOM_EXIST, QEMU, 0, "this domain exists already", errors.InstanceExists),
    (OPERATION_FAILED, QEMU, 0, "domain 'a' already exists with uuid x", errors.InstanceExists),
    (OPERATION_FAILED, QEMU, 0, "domain backup job failed", errors.HypervisorError),
    (OPERATION_FAILED, QEMU, 0, "operation failed: job 'domain save' unexpectedly failed", errors.JobLost),
    (libvirt.VIR_ERR_OPERATION_INVALID, QEMU, 0, "domain is already running", errors.InvalidState),
    (libvirt.VIR_ERR_OPERATION_INVALID, QEMU, 0, "domain is not running", errors.InvalidState),
    (libvirt.VIR_ERR_BLOCK_COPY_ACTIVE, QEMU, 0, "disk already in active block job", errors.InvalidState),
    (libvirt.VIR_ERR_OPERATION_UNSUPPORTED, QEMU, 0, "disk has active block job", errors.InvalidState),
    (libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, QEMU, 0, "no domain checkpoint", errors.CheckpointMissing),
    # the definition, and what it names
    (libvirt.VIR_ERR_XML_DETAIL, libvirt.VIR_FROM_DOMAIN, 0, "(domain):1: parse error", errors.DomainRejected),
    (libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_FROM_DOMAIN, 0, "XML error: no such disk", errors.DomainRejected),
    (libvirt.VIR_ERR_NO_NAME, libvirt.VIR_FROM_DOMAIN, 0, "missing name", errors.DomainRejected),
    (libvirt.VIR_ERR_XML_INVALID_SCHEMA, libvirt.VIR_FROM_XML, 0, "failed to validate", errors.DomainRejected),
    (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, QEMU, 0, "CPU mode is not supported", errors.UnsupportedByHost),
    (libvirt.VIR_ERR_NO_SUPPORT, ANY, 0, "not supported by the driver", errors.UnsupportedByHost),
    (libvirt.VIR_ERR_OPERATION_UNSUPPORTED, QEMU, 0, "Operation not supported", errors.UnsupportedByHost),
    (SYSTEM, STORAGE, errno.ENOENT, "Cannot access storage file '/x'", errors.DomainRejected),
    (SYSTEM, SECURITY, errno.ENOENT, "unable to set security context", errors.DomainRejected),
    (SYSTEM, ANY, errno.ENODEV, "Cannot get interface MTU on 'br9'", errors.NetworkNotFound),
    (libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_FROM_NETWORK, 0, "Network not found", errors.NetworkNotFound),
    # QEMU
    (INTERNAL, QEMU, 0, "process exited while connecting to monitor: bad image", errors.DomainRejected),
    (INTERNAL, QEMU, 0, "process exited: cannot set up guest memory", errors.OutOfMemory),
    (INTERNAL, QEMU, 0, "process exited: Cannot allocate memory", errors.OutOfMemory),
    (SYSTEM, ANY, errno.ENOMEM, "Cannot fork child process", errors.OutOfMemory),
    (INTERNAL, QEMU, 0, 'process exited: Failed to get "write" lock', errors.InstanceLocked),
    (INTERNAL, QEMU, 0, 'process exited: Failed to get shared "write" lock', errors.InstanceLocked),
    (INTERNAL, QEMU, 0, "unable to execute QEMU command 'x': No space left on device", errors.NoSpace),
    (SYSTEM, ANY, errno.ENOSPC, "cannot write: No space left on device", errors.NoSpace),
    (libvirt.VIR_ERR_INVALID_ARG, QEMU, 0, "invalid path: disk 'vdz' not found", errors.HypervisorError),
    (9999, QEMU, 0, "something new", errors.HypervisorError),
]


def libvirt_error(code: int, domain: int, int1: int, message: str) -> libvirt.libvirtError:
    error = libvirt.libvirtError(message)
    error.err = (code, domain, message, libvirt.VIR_ERR_ERROR, None, None, None, int1, -1)
    return error


@pytest.mark.parametrize(("code", "domain", "int1", "message", "expected"), TABLE)
def test_each_situation_has_its_error(
    code: int, domain: int, int1: int, message: str, expected: type[errors.FleetError]
) -> None:
    error = translate(libvirt_error(code, domain, int1, message), "start vm1", "kvm1")
    assert type(error) is expected
    assert error.message == f"cannot start vm1 on host kvm1: {message}"
    assert error.details == {
        "host": "kvm1",
        "libvirt_code": code,
        "libvirt_domain": domain,
        "libvirt_int1": int1,
    }


def test_an_error_without_details_of_libvirt_is_unknown_rather_than_lost() -> None:
    bare = libvirt.libvirtError("it failed")
    bare.err = None  # else it is the last error of whatever this thread did before
    error = translate(bare, "start vm1", "kvm1")
    assert type(error) is errors.HypervisorError
    assert str(bare) in error.message


def test_only_errors_of_libvirt_are_translated_and_their_cause_is_kept() -> None:
    cause = libvirt_error(libvirt.VIR_ERR_NO_DOMAIN, QEMU, 0, "Domain not found")
    with pytest.raises(errors.InstanceNotFound) as caught, translated("find vm1", "kvm1"):
        raise cause
    assert caught.value.__cause__ is cause
    with pytest.raises(KeyError), translated("find vm1", "kvm1"):
        raise KeyError


def test_a_disk_held_by_another_qemu_says_so() -> None:
    locked = libvirt_error(INTERNAL, QEMU, 0, 'process exited: Failed to get "write" lock')
    assert "another qemu process" in translate(locked, "start vm1", "kvm1").hint.lower()
