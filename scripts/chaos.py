"""What scripts/chaos runs: random rounds on several lanes, and a table of what they have shown."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import faults, report, scenarios
from tests.chaos.lane import Lane
from tests.chaos.rounds import Round, Verdict, combinations, drawn
from tests.lab import LabError, lab_folder
from tests.lab.process import REPOSITORY

DEFAULT_TTL = 3.0
KEEP = REPOSITORY / ".cache" / "chaos"


class Rounds:
    """The rounds to play, given out one by one to the lanes; and what became of them."""

    def __init__(self, rounds: Iterator[Round], options: argparse.Namespace) -> None:
        self.verdicts: list[Verdict] = []
        self._rounds, self._options = rounds, options
        self._lock = threading.Lock()

    def drive(self, lane: Lane) -> None:
        """Play rounds on a lane until none is left."""
        while (what := self._next()) is not None:
            try:
                verdict = lane.play(what)
            except LabError as error:
                verdict = Verdict(what, "unknown", "", 0.0, violations=[str(error)])
            with self._lock:
                self._tell(verdict)

    def _next(self) -> Round | None:
        with self._lock:
            return next(self._rounds, None)

    def _tell(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print(report.line(verdict), flush=True)
        for violation in verdict.violations:
            print(f"      {violation}")
        if verdict.violations:
            print(f"      again: {command(self._options, only=verdict.round.number)}", flush=True)


def command(options: argparse.Namespace, only: int | None = None) -> str:
    """The command that plays these rounds, or only that one, again."""
    words = ["scripts/chaos", "--seed", str(options.seed)]
    words += ["--rounds", str(options.rounds)] if only is None else ["--only", str(only)]
    for name in ("operation", "fault"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    if options.lease_ttl != DEFAULT_TTL:
        words += ["--lease-ttl", f"{options.lease_ttl:g}"]
    return shlex.join(words)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser("scripts/chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed chooses the same rounds")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="play only the round of this number")
    parser.add_argument("--operation", action="append", default=[], choices=list(scenarios.BY_NAME))
    parser.add_argument("--fault", action="append", default=[], choices=list(faults.BY_NAME))
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="fleets side by side")
    parser.add_argument("--lease-ttl", type=float, default=DEFAULT_TTL, help="seconds")
    parser.add_argument("--freeze-seconds", type=float, default=20.0, help="how long libvirtd is stopped")
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder for the logs of rounds that did not go well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Play the rounds; 0 when everything held, 1 when something did not."""
    options = parsed(arguments)
    choices = combinations(options.operation, options.fault, as_root=os.geteuid() == 0)
    if not choices:
        print("error: no step of this operation can be hit by this fault", file=sys.stderr)
        return 2
    numbers = range(options.rounds) if options.only is None else [options.only]
    rounds = Rounds((drawn(options.seed, number, choices) for number in numbers), options)
    print(f"{command(options, options.only)}: {len(choices)} combinations", flush=True)
    began = time.monotonic()
    with lab_folder() as folder, ExitStack() as stack, ThreadPoolExecutor(options.lanes) as pool:
        lanes = [
            stack.enter_context(
                Lane(
                    folder / f"lane{number}.log",
                    freeze_seconds=options.freeze_seconds,
                    lease_ttl=options.lease_ttl,
                    keep=options.keep,
                )
            )
            for number in range(min(options.lanes, len(numbers)))
        ]
        list(pool.map(rounds.drive, lanes))
    minutes = (time.monotonic() - began) / 60
    verdicts = sorted(rounds.verdicts, key=lambda verdict: verdict.round.number)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    print(f"\n{date}: {command(options, options.only)} ({options.lanes} lanes, {minutes:.0f} min)\n")
    print(report.summary(verdicts), report.table(verdicts), sep="\n\n")
    failed = any(verdict.violations for verdict in verdicts)
    if failed:
        print(f"\nLogs of the violated rounds: {options.keep}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
