"""What the doctor finds, and how it is settled: excused by a live operation, repaired, or told with its remedy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from worker.errors import FleetError
from worker.models import Frozen

SETTLE = 1.0
"""Seconds between the two looks at the journal before a repair: a worker whose record Redis has lost puts it back
with the next renewal of its lease, within half a second."""

Live = Callable[[], frozenset[str]]
"""Ids of the operations that are not over, with the uuids and names of their instances."""


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Finding(Frozen):
    """One thing the doctor looked at: what it is, on which host, where there, and what to do about it."""

    code: str
    severity: Severity
    what: str
    host: str = ""
    where: str = ""
    remedy: str = ""
    fixable: bool = False
    fixed: bool = False

    @property
    def open(self) -> bool:
        """Whether somebody still has to do something."""
        return self.severity in {Severity.WARNING, Severity.ERROR} and not self.fixed


@dataclass(frozen=True)
class Suspect:
    """A finding before it is settled.

    It is excused when one of its `owners` (an operation, a uuid, a name) is live. `repair` does only what is safe, and
    looks itself whether it still has to.
    """

    finding: Finding
    owners: frozenset[str] = frozenset()
    repair: Callable[[], None] | None = None


def suspect(
    severity: Severity,
    code: str,
    what: str,
    *,
    where: object = "",
    remedy: str = "",
    owners: Iterable[object] = (),
    repair: Callable[[], None] | None = None,
) -> Suspect:
    """A suspect in one call; `where` is a path, a domain or a key."""
    finding = Finding(
        code=code, severity=severity, what=what, where=str(where), remedy=remedy, fixable=repair is not None
    )
    return Suspect(finding, frozenset(str(owner) for owner in owners if owner), repair)


def settle(suspects: Iterable[Suspect], live: Live, *, fix: bool, host: str = "") -> list[Finding]:
    """Drop what live operations excuse, and repair what can be repaired, if asked to.

    The look comes first, then the journal: an operation is in the journal before it makes anything, so what was seen
    and belongs to none that is live is nobody's.
    """
    seen = list(suspects)
    left = _not_excused(seen, live())
    if fix and any(one.repair and one.owners for one in left):
        time.sleep(SETTLE)
        left = _not_excused(left, live())
    findings = [_repaired(one.finding, one.repair) if fix and one.repair else one.finding for one in left]
    return [finding.model_copy(update={"host": host}) for finding in findings]


def _not_excused(suspects: Sequence[Suspect], live: frozenset[str]) -> list[Suspect]:
    return [one for one in suspects if not one.owners & live]


def _repaired(finding: Finding, repair: Callable[[], None]) -> Finding:
    try:
        repair()
    except (FleetError, OSError) as error:
        return finding.model_copy(update={"what": f"{finding.what} (could not be repaired: {error})"})
    return finding.model_copy(update={"fixed": True})
