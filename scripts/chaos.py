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
BEGIN, END = "<!-- scripts/chaos -->", "<!-- end of scripts/chaos -->"


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

    def stop(self) -> None:
        """Give out no more rounds."""
        with self._lock:
            self._rounds = iter(())

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
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="put the table into this page, such as docs/reliability.md"
    )
    return parser.parse_args(arguments)


def play(options: argparse.Namespace, choices: list[tuple[str, str, str]]) -> list[Verdict]:
    """Play all rounds, on several lanes; the verdicts in the order of the rounds. Ctrl-C ends it after those begun."""
    numbers = range(options.rounds) if options.only is None else [options.only]
    rounds = Rounds((drawn(options.seed, number, choices) for number in numbers), options)
    with lab_folder() as folder, ExitStack() as stack, ThreadPoolExecutor(options.lanes) as pool:
        times = {"freeze_seconds": options.freeze_seconds, "lease_ttl": options.lease_ttl}
        lanes = [
            stack.enter_context(Lane(folder / f"lane{number}.log", keep=options.keep, **times))
            for number in range(min(options.lanes, len(numbers)))
        ]
        try:
            list(pool.map(rounds.drive, lanes))
        except KeyboardInterrupt:
            print("interrupted: the rounds that are being played are played to their end", file=sys.stderr)
        finally:
            rounds.stop()
    return sorted(rounds.verdicts, key=lambda verdict: verdict.round.number)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's two markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: Sequence[str]) -> int:
    """Play the rounds; 0 when everything held, 1 when something did not."""
    options = parsed(arguments)
    choices = combinations(options.operation, options.fault, as_root=os.geteuid() == 0)
    if not choices:
        print("error: no step of this operation can be hit by this fault", file=sys.stderr)
        return 2
    print(f"{command(options, options.only)}: {len(choices)} combinations", flush=True)
    began = time.monotonic()
    verdicts = play(options, choices)
    took = f"{options.lanes} fleets side by side, {(time.monotonic() - began) / 60:.0f} min"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    title = f"`{command(options, options.only)}` ({date}, {took}):"
    text = "\n\n".join([title, report.summary(verdicts), report.table(verdicts)])
    print(f"\n{text}")
    if options.into:
        put_into(options.into, text)
    failed = any(verdict.violations for verdict in verdicts)
    if failed:
        print(f"\nLogs of the violated rounds: {options.keep}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
