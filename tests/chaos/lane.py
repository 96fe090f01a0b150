"""A lane: a process with a fleet of its own that plays the rounds it is given, one JSON line each, and answers each
with its verdict. Several lanes run side by side and share nothing.

As root it runs in a mount namespace of its own, so that even SIGKILL leaves no mount behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.chaos.rounds import Round, Verdict, play
from tests.chaos.site import Site
from tests.lab import LabError, lab_folder
from tests.lab.process import REPOSITORY
from worker import logs

NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else []


class Lane:
    """The side of whoever gives the rounds; a context manager that starts and ends the process."""

    def __init__(self, log: Path, *, freeze_seconds: float, lease_ttl: float = 3.0, keep: Path | None = None) -> None:
        self.log = log
        options = {"--freeze-seconds": freeze_seconds, "--lease-ttl": lease_ttl, **({"--keep": keep} if keep else {})}
        words = [str(word) for option in options.items() for word in option]
        self._command = [*NAMESPACE, sys.executable, "-m", "tests.chaos.lane", *words]

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the owner, who then ends the lane in order
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(180)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def play(self, what: Round) -> Verdict:
        """Raises LabError when the lane has died."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(what)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise LabError(f"the lane has ended\n{self.log.read_text()[-3000:]}")
        return read_verdict(json.loads(answer))


def read_verdict(fields: dict[str, Any]) -> Verdict:
    """A verdict from its JSON."""
    return Verdict(**{**fields, "round": Round(**fields["round"])})


class Place:
    """The lane's site, built when it is needed: again after a round that broke it."""

    def __init__(self, freeze_seconds: float, lease_ttl: float, keep: Path | None) -> None:
        self._freeze_seconds, self._lease_ttl, self._keep = freeze_seconds, lease_ttl, keep
        self._stack = ExitStack()
        self._site: Site | None = None

    def site(self) -> Site:
        if self._site is None:
            folder = self._stack.enter_context(lab_folder())
            self._site = self._stack.enter_context(Site(folder, self._freeze_seconds, self._lease_ttl))
        return self._site

    def tear_down(self) -> None:
        self._site = None
        self._stack.close()

    def play(self, what: Round) -> Verdict:
        """A broken site is a violation of the round that found it so, and is built anew for the next one."""
        try:
            verdict = play(self.site(), what)
        except Exception as error:  # noqa: BLE001 - the other rounds are still to be played
            traceback.print_exc()
            verdict = Verdict(what, "unknown", "", 0.0, violations=[f"{type(error).__name__}: {error}"])
        if verdict.violations or verdict.slow:
            self._keep_logs(what)
        if verdict.violations:
            self.tear_down()
        return verdict

    def _keep_logs(self, what: Round) -> None:
        if self._keep is None or self._site is None:
            return
        folder = self._keep / f"round-{what.number}"
        folder.mkdir(parents=True, exist_ok=True)
        for log in [*self._site.folder.glob("*.log"), *self._site.folder.glob("*/*.log")]:
            shutil.copy(log, folder / "-".join(log.relative_to(self._site.folder).parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--freeze-seconds", type=float, required=True)
    parser.add_argument("--lease-ttl", type=float, required=True)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    logs.configure("error")
    place = Place(options.freeze_seconds, options.lease_ttl, options.keep)
    try:
        for line in sys.stdin:
            verdict = place.play(Round(**json.loads(line)))
            sys.stdout.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
            sys.stdout.flush()
    finally:
        place.tear_down()


if __name__ == "__main__":
    main()
