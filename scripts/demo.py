"""What scripts/demo does once all is set up: brings a private fleet up and uses it as a user would."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.lab import Fleet, LabError, guest_image, lab_folder, wait_until
from tests.lab.process import REPOSITORY, running

HOST = "hosta"
GUEST = "demo"
READY = "virtfleet-guest ready"
HELLO = "hello from user-data"
USER_DATA = f"""#!/bin/sh
echo "{HELLO}: this is $(hostname), running Linux $(uname -r)"
"""
VENV_BIN = Path(sys.executable).parent
COMMAND_SECONDS = 300
SIGNALS = (signal.SIGHUP, signal.SIGTERM)  # that end the demo; scripts/demo turns Ctrl-C into SIGTERM
NEXT = "scripts/test tests/integration/test_lab.py says which part does not work on this machine."

console = Console(highlight=False, soft_wrap=True)
complaints = Console(stderr=True, highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The fleet did not do what the demo shows."""


class Interrupted(BaseException):
    """A signal asked the demo to end."""


def interrupt(signum: int, _: object) -> NoReturn:
    """Unwind, once: a second signal must not interrupt the clean-up."""
    handle_signals(lambda *_: None)  # SIG_IGN would make Python complain of a signal that has come already
    raise Interrupted(128 + signum)


def handle_signals(handler: Any) -> None:
    """Set what they do."""
    for signum in SIGNALS:
        signal.signal(signum, handler)


# --- what the user sees -----------------------------------------------------------------------------------------------


def heading(text: str) -> None:
    """Say what comes next."""
    console.print(f"\n[bold]== {escape(text)}[/]")


def show_command(words: list[str]) -> None:
    """Print a command as a user would type it."""
    console.print(f"\n[bold cyan]$ {escape(shlex.join(words))}[/]")


class Stopwatch:
    """Says what is being done, and remembers how long it took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    @contextmanager
    def phase(self, doing: str, row: str) -> Iterator[None]:
        """Time what the `with` block does."""
        console.print(doing, end=" ")
        began = time.monotonic()
        yield
        took = f"{time.monotonic() - began:.1f} s"
        console.print(f"[dim]{took}[/]")
        self.rows.append((row, took))

    def operations(self, records: list[dict[str, Any]]) -> None:
        """Add what the journal says of ended operations and their steps."""
        for record in records:
            kind = record["kind"].removeprefix("virtfleet.").replace("_", " ")
            self.rows.append((f"{kind} {record['instance']}", f"{record['seconds']:.2f} s"))
            if len(record["steps"]) > 1:
                self.rows += [(f"  {step['key']}", f"{step['seconds']:.2f} s") for step in record["steps"]]

    def table(self) -> Table:
        """All that was done."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("what was done")
        table.add_column("took", justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


# --- the fleet and its user -------------------------------------------------------------------------------------------


class User:
    """Somebody at a shell who works with a fleet of one host."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.host = fleet.hosts[HOST]
        self.image = self.host.images / "guest.qcow2"
        self.user_data = fleet.folder / "hello.sh"
        self.exports = {**fleet.env, "LIBVIRT_DEFAULT_URI": self.host.uri}
        self.instances = self.host.data / "instances"
        self._console_seen = 0

    def prepare(self, image: Path) -> None:
        """Lay out the files that the commands name, and show the environment in which they run."""
        shutil.copy(image, self.image)
        self.user_data.write_text(USER_DATA)
        console.print()
        for name, value in self.exports.items():
            console.print(f"[bold cyan]$ export {name}={escape(shlex.quote(value))}[/]")

    def run(self, *command: str) -> None:
        """Run a command in front of the audience; raises DemoError if it fails."""
        show_command(list(command))
        env = {**os.environ, **self.exports, "PATH": f"{VENV_BIN}:{os.environ['PATH']}"}
        # In a session of its own Ctrl-C does not reach it, and virsh does not look for polkit's agent.
        with subprocess.Popen(command, cwd=REPOSITORY, env=env, start_new_session=True) as process:
            try:
                code = process.wait(COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise DemoError(f"{command[0]} did not end within {COMMAND_SECONDS} s") from None
            except Interrupted:
                process.terminate()
                process.wait()
                console.show_cursor()  # live bars hide it
                raise
        if code != 0:
            raise DemoError(f"{shlex.join(command)} ended with exit code {code}")

    def spawning(self, name: str) -> list[str]:
        """The command that spawns a guest and waits until it has booted."""
        options = {
            "--host": HOST,
            "--image": str(self.image),
            "--memory": "128",
            "--user-data": str(self.user_data),
            "--wait-for": "console",
            "--console-line": READY,
        }
        return ["virtfleet", "spawn", name, *(word for option in options.items() for word in option)]

    @property
    def console_log(self) -> Path:
        """What the one guest has said."""
        (log,) = self.instances.glob("*/console.log")
        return log

    def show_console(self) -> None:
        """Show what the guest has said since the last look, once user-data has spoken."""
        log = self.console_log
        wait_until(lambda: HELLO in self._unseen(log), COMMAND_SECONDS, f"the guest says: {HELLO}", log)
        lines = [line for line in self._unseen(log).splitlines() if "virtfleet-guest" in line or HELLO in line]
        self._console_seen = log.stat().st_size
        console.print(f"\nThe guest's console [dim]({log})[/]")
        for line in lines:
            style = "green" if READY in line or HELLO in line else "dim"
            console.print(f"  [{style}]{escape(line)}[/]")

    def _unseen(self, log: Path) -> str:
        return log.read_bytes()[self._console_seen :].decode(errors="replace").replace("\r", "")

    def operations(self) -> list[dict[str, Any]]:
        """The records of all operations, oldest first."""
        records: list[dict[str, Any]] = json.loads(self.fleet.cli("operations", "--json").stdout)["operations"]
        return records[::-1]

    def domains(self, *options: str) -> list[str]:
        """Names of the domains that virsh lists."""
        listing = ["virsh", "--connect", self.host.uri, "list", "--name", *options]
        return subprocess.run(listing, check=True, capture_output=True, text=True, timeout=30).stdout.split()


def play(user: User, *, keep: bool) -> None:
    """Do what the demo is there to show."""
    user.run("virtfleet", "hosts")
    heading("Spawn a guest: ready when its console says that it has booted")
    user.run(*user.spawning(GUEST))
    user.show_console()
    user.run("virtfleet", "instances")
    for_good = ("--persistent", "--state-running")
    user.run("virsh", "list", *for_good)
    require(GUEST in user.domains(*for_good), "the guest is not a running, persistent domain")
    heading("Power it off and on")
    user.run("virtfleet", "power", "off", GUEST)
    user.run("virtfleet", "power", "on", GUEST)
    user.show_console()
    if not keep:
        heading("Destroy it")
        user.run("virtfleet", "destroy", GUEST)
        user.run("virsh", "list", "--all")
        require(not user.domains("--all"), "a domain remains on the host")
        user.run("ls", "-A", str(user.instances))
        require(not any(user.instances.iterdir()), f"files remain in {user.instances}")
        console.print("[green]✓[/] Nothing of the guest remains: no domain, no file.")
    heading("What the journal has recorded")
    user.run("virtfleet", "operations")
    user.run("virtfleet", "operation", user.operations()[0]["id"])


def require(condition: bool, otherwise: str) -> None:
    """Raise DemoError unless the condition holds."""
    if not condition:
        raise DemoError(otherwise)


def run(*, keep: bool, set_up_seconds: int) -> None:
    """The demo, from the guest's image to the end of all that it started."""
    stopwatch = Stopwatch()
    stopwatch.rows.append(("set-up (scripts/bootstrap)", f"{set_up_seconds} s"))
    heading("A private fleet of one host")
    with stopwatch.phase("The guest's disk image, built from Debian packages unless .cache has it:", "guest image"):
        image = guest_image()
    with lab_folder() as folder, ExitStack() as stack:
        console.print(f"Its files are in {folder}. Guests run under emulation: /dev/kvm is not used.")
        with stopwatch.phase(f"Redis, libvirtd and the two workers of {HOST} start:", "start of the fleet"):
            fleet = stack.enter_context(Fleet(folder, [HOST]))
        flower = fleet.flower()
        console.print(f"Flower, to watch the tasks in a browser, starts meanwhile: {flower}")
        user = User(fleet)
        user.prepare(image)
        play(user, keep=keep)
        wait_until(lambda: answers(flower), 60, f"Flower answers at {flower}", folder / "flower.log")
        stopwatch.operations(user.operations())
        heading("Summary")
        console.print(stopwatch.table())
        if keep:
            explain_keeping(user, flower)
            detach()
    console.print("\nAll that the demo started has ended. Of its files only .venv and .cache of this checkout stay.")


def answers(url: str) -> bool:
    """Whether a web server gives out this page."""
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, follow_redirects=True).is_success
    return False


# --- keeping it running -----------------------------------------------------------------------------------------------


def explain_keeping(user: User, flower: str) -> None:
    """Say how to go on with the fleet."""
    heading("It all goes on running in the background. To go on with it, in any shell:")
    for name, value in {"PATH": f"{VENV_BIN}:$PATH", **user.exports}.items():
        console.print(f'  export {name}="{value}"')
    console.print("\nThen for example:")
    for words, comment in (
        (["virtfleet", "instances"], ""),
        (["virtfleet", "power", "reboot", GUEST], ""),
        (["virsh", "console", GUEST], "a shell in the guest: press Enter; leave it with Ctrl-]"),
        (["tail", "-f", str(user.console_log)], "what the guest says"),
        (user.spawning("another"), ""),
        (["virtfleet", "destroy", GUEST], ""),
        (["virtfleet", "--help"], "all else"),
    ):
        console.print(f"  {escape(shlex.join(words))}" + (f"  [dim]# {comment}[/]" if comment else ""))
    console.print(f"\nFlower: {flower}\nTo stop it all and remove its files: [bold]scripts/demo --stop[/]")


def detach() -> None:
    """Let the shell go on, and return in a background process, by Interrupted, once `scripts/demo --stop` says so."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.stdout.flush()
    if os.fork():
        os._exit(0)  # the fleet is the child's now
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.pause()


def kept() -> list[int]:
    """Pids of this user's detached demos of this checkout."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            argv = (folder / "cmdline").read_text(errors="replace").split("\0")
            mine = folder.stat().st_uid == os.geteuid() and os.getsid(int(folder.name)) == int(folder.name)
            if mine and argv[:3] == sys.orig_argv[:3] and "--keep" in argv:
                found.append(int(folder.name))
    return found


def stop() -> None:
    """End all that `--keep` left running."""
    pids = kept()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(map(running, pids)), 60, f"the demos with pids {pids} have ended")
    console.print("Stopped, and its files are removed." if pids else "No demo is running in the background.")


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--set-up-seconds", type=int, default=0)
    asked = parser.parse_args()
    try:
        if asked.stop:
            stop()
        else:
            handle_signals(interrupt)
            run(keep=asked.keep, set_up_seconds=asked.set_up_seconds)
    except Interrupted as interrupted:
        return int(interrupted.args[0])
    except (DemoError, LabError, OSError, subprocess.SubprocessError) as error:
        complaints.print(f"\n[red]error:[/] {escape(str(error))}", f"[cyan]next:[/] {NEXT}", sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
