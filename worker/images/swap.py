"""Swap disks, ready for the guest to use."""

from __future__ import annotations

from pathlib import Path

from worker.context import Watcher
from worker.images.command import Command, run
from worker.images.files import out_of_space_is_an_error, publish, temporary_beside
from worker.models import MIB

LABEL = "swap"


def make_swap(path: Path, mib: int, watch: Watcher | None = None) -> None:
    """Make a sparse raw swap disk of `mib` MiB with the label `swap`. Raises NoSpace, CommandFailed."""
    with out_of_space_is_an_error(path.parent), temporary_beside(path) as temporary:
        with temporary.open("xb") as file:
            file.truncate(mib * MIB)
        # Not readable by others: what the guest swaps out is its memory.
        temporary.chmod(0o600)
        run(Command(["mkswap", "--label", LABEL, str(temporary)], "util-linux"), watch=watch, stall=60.0)
        publish(temporary, path)
