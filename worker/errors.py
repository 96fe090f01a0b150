"""Every error the fleet raises, in one tree: what went wrong, whether to try again, and what to do next.

An error's `code` is stable and machine-readable; its `hint` says what the user can do. Foreign errors (libvirt,
QEMU, httpx, Redis) are translated where the foreign call is made, so nothing above the nouns knows them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class FleetError(Exception):
    """Base of all errors of the fleet.

    `details` holds JSON-able facts (bytes, paths, names) for programs; `message` says the same for people.
    """

    code: ClassVar[str] = "fleet_error"
    retryable: ClassVar[bool] = False
    bad_input: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders (pool child to its parent): pickle must find the keyword arguments.
        return _rebuild, (type(self), self.message, self.hint, self.details)

    def as_dict(self) -> dict[str, Any]:
        """The error as the operation's record and `--json` show it."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            "bad_input": self.bad_input,
            "details": self.details,
        }


def _rebuild(kind: type[FleetError], message: str, hint: str, details: dict[str, Any]) -> FleetError:
    return kind(message, hint=hint, **details)


# --- worth trying again ---------------------------------------------------------------------------------------


class Retryable(FleetError):
    """Something outside the request stood in the way; the same step may succeed later."""

    code = "retryable"
    retryable = True


class HostUnreachable(Retryable):
    """libvirtd does not answer, or the connection broke."""

    code = "host_unreachable"
    default_hint = "Check that libvirtd runs there (virsh -c URI list) and that its URI is right (virtfleet hosts)."


class StateLockBusy(Retryable):
    """Another libvirt call holds the domain's job lock (VIR_ERR_OPERATION_TIMEOUT after 30 s)."""

    code = "state_lock_busy"
    default_hint = "Another job is changing this guest; it is tried again by itself."


class InstanceLocked(Retryable):
    """Another process on the host holds the lock in the instance's directory."""

    code = "instance_locked"
    default_hint = "The process that works on it has to end first; it is tried again by itself."


GOT_ON = 1024**2
"""Bytes: a file has an end, so a copy that gets on so far each time comes to it."""


class TransferInterrupted(Retryable):
    """A download or copy broke off; what has arrived is kept and continued. `moved`: bytes that came this time."""

    code = "transfer_interrupted"

    @property
    def got_on(self) -> bool:
        """Whether so much came that it need not be given up, however often it breaks off."""
        return int(self.details.get("moved", 0)) >= GOT_ON


class Stalled(Retryable):
    """A step moved nothing for as long as its kind of step may rest."""

    code = "stalled"


class HandedOver(Retryable):
    """The worker is being stopped: the step left off where it can be continued. It does not count as an attempt."""

    code = "handed_over"


class NotItsTurn(Retryable):
    """What the step needs is taken by other operations, which are served first. It does not count as an attempt."""

    code = "not_its_turn"


class JobLost(Retryable):
    """A job in the guest is gone, and nobody can say how it ended; it is begun anew."""

    code = "job_lost"


class LetGoTooEarly(Retryable):
    """A guest that was to stand still for its snapshot's instant was held too long, and let go of before it."""

    code = "let_go_too_early"


class OutOfMemory(Retryable):
    """The host had no memory to start the guest with."""

    code = "out_of_memory"
    default_hint = "Free memory on the host, or use another one."


class GuestHung(Retryable):
    """QEMU does not answer libvirt: what was asked of the guest may or may not happen."""

    code = "guest_hung"
    default_hint = "Take its power away: virtfleet power off NAME --timeout 0"


class FenceTooLow(Retryable):
    """The domain's mark has a higher fence than this execution. `details`: instance, fence, current_fence,
    current_operation.

    Either a newer execution was here, which the journal knows, or Redis is not the one that gave that fence out.
    """

    code = "fence_too_low"


# --- not worth trying again -----------------------------------------------------------------------------------


class Permanent(FleetError):
    """The same request would fail the same way again."""

    code = "permanent"


class BadInput(Permanent):
    """The request itself cannot be carried out; nothing was made for it."""

    code = "bad_input"
    bad_input = True


class InvalidSpec(BadInput):
    """A field of the request has a value that is not allowed. `details`: field, given, allowed."""

    code = "invalid_spec"


class UnknownHost(BadInput):
    """No host of that name has ever joined the fleet."""

    code = "unknown_host"


class InstanceNotFound(BadInput):
    """No instance of that name or uuid is known."""

    code = "instance_not_found"
    default_hint = "List what there is with: virtfleet instances   (rebuild the list with: virtfleet hosts sync)"


class InstanceExists(BadInput):
    """The name is taken by another instance or by a domain that is not the fleet's."""

    code = "instance_exists"
    default_hint = "Choose another name, or destroy the one that has it."


class NotOurs(BadInput):
    """The domain exists but carries no mark of the fleet."""

    code = "not_ours"
    default_hint = "The fleet leaves foreign domains alone unless told otherwise (--foreign)."


class ImageNotFound(BadInput):
    """The image's path or address leads to nothing."""

    code = "image_not_found"


class ImageRejected(BadInput):
    """The image is none, is dangerous, or is not what was promised."""

    code = "image_rejected"


class ChecksumMismatch(BadInput):
    """The image's content is not the one the given sha256 stands for."""

    code = "checksum_mismatch"


class SnapshotNotFound(BadInput):
    """No snapshot of that id is known."""

    code = "snapshot_not_found"
    default_hint = "List what there is with: virtfleet snapshots   (rebuild the list with: virtfleet hosts sync)"


class SnapshotExists(BadInput):
    """A snapshot of that id is there already, and it is another one."""

    code = "snapshot_exists"
    default_hint = "A snapshot is called like its operation: choose another operation id."


class SnapshotInUse(BadInput):
    """Later snapshots hold only what changed since this one. `details`: used_by."""

    code = "snapshot_in_use"


class NetworkNotFound(BadInput):
    """The host has no such bridge or libvirt network, or it is not active."""

    code = "network_not_found"


class RecordUnreadable(Permanent):
    """The record of an operation is damaged, or written by a newer version."""

    code = "record_unreadable"
    default_hint = "virtfleet doctor tells of all such records."


class OperationNotFound(BadInput):
    """No operation of that id is in the journal."""

    code = "operation_not_found"
    default_hint = "List what there is with: virtfleet operations"


class OperationConflict(BadInput):
    """The operation id was used before for something else (it is an idempotency key)."""

    code = "operation_conflict"
    default_hint = "Use a new id, or repeat the first request unchanged to attach to it."


class InstanceBusy(Permanent):
    """Another operation owns the instance. `details`: owner."""

    code = "instance_busy"


class NoSpace(Permanent):
    """The data directory cannot hold what is needed. `details`: needed, available (bytes), path."""

    code = "no_space"
    default_hint = "Free space on the host's data directory, or choose another host."


class UnsupportedByHost(Permanent):
    """This host's libvirt or QEMU cannot do what was asked."""

    code = "unsupported_by_host"


class InvalidState(Permanent):
    """The guest is in a state in which this cannot be done."""

    code = "invalid_state"


class GuestNotReady(Permanent):
    """The guest did not come up as the request demanded within its time."""

    code = "guest_not_ready"


class AgentUnresponsive(Permanent):
    """The guest's agent is not there or does not answer; ACPI may still reach the guest."""

    code = "agent_unresponsive"
    default_hint = "Install qemu-guest-agent in the guest and start it."


class QuiesceFailed(Permanent):
    """The guest's file systems could not be frozen, and the request demanded it."""

    code = "quiesce_failed"
    default_hint = "Look at the guest agent in the guest, or ask with --quiesce auto for what can be had."


class CheckpointMissing(Permanent):
    """The guest's disks no longer say what changed since the last snapshot."""

    code = "checkpoint_missing"
    default_hint = "Take a full snapshot: it begins a new chain."


class SnapshotDamaged(Permanent):
    """A snapshot's file is not what it must be; it was not published."""

    code = "snapshot_damaged"
    default_hint = "Look at the host's storage and log, and take it again."


class DomainRejected(Permanent):
    """libvirt or QEMU refused the domain's definition or could not start it."""

    code = "domain_rejected"


class ConnectionMisconfigured(Permanent):
    """The host's URI, certificate or key is wrong: trying again cannot help."""

    code = "connection_misconfigured"
    default_hint = "Check the host's libvirt URI and the certificates or ssh key that it needs."


class CommandFailed(Permanent):
    """A program on the host ended with an error. `details`: argv, exit_code, stderr."""

    code = "command_failed"


class FencedOff(Permanent):
    """A newer execution owns this step: this one must not change anything more."""

    code = "fenced_off"


class WorkerLost(Permanent):
    """The worker died in this step each time it was tried."""

    code = "worker_lost"
    default_hint = "Look into the worker's log and the host's (out of memory?) before asking for it again."


class HypervisorError(Permanent):
    """libvirt reported something that none of the rules knows. `details`: libvirt code, domain, int1."""

    code = "hypervisor_error"


class InternalError(Permanent):
    """A defect of the fleet itself; repeating disk work blindly is unsafe, so the step fails."""

    code = "internal_error"
    default_hint = "This is a bug in virtfleet: the worker's log has the traceback."


# --- neither --------------------------------------------------------------------------------------------------


class Cancelled(FleetError):
    """Somebody asked for the operation to stop."""

    code = "cancelled"


class BrokerUnavailable(FleetError):
    """Redis does not answer. Nothing was accepted."""

    code = "broker_unavailable"
    default_hint = "Check that Redis runs and that VIRTFLEET_REDIS_URL points to it."


class HostsAreJoining(BrokerUnavailable):
    """Redis has just lost what it knew, and hosts tell it again. To clients it is as if it were away."""
