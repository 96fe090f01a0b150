"""Programs on the host end with their worker, when they are cancelled, and when they rest too long."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab.process import running, wait_until
from worker.context import Alone
from worker.errors import Cancelled, CommandFailed, InstanceLocked, Stalled, UnsupportedByHost
from worker.images.command import Command, run
from worker.images.files import locked

SLOW_WORKER = """
import sys
from worker.images.command import Command, run
script = 'echo $$ > "$0"; exec qemu-img convert -r 65536 -f raw -O raw "$1" "$2"'
run(Command(["sh", "-c", script, *sys.argv[1:]], "qemu-utils"))
"""


class CancelledAfter(Alone):
    """Cancels when a while has passed, and remembers how often it was asked."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.due = time.monotonic() + seconds
        self.asked: list[float] = []

    def check(self) -> None:
        self.asked.append(time.monotonic())
        if time.monotonic() >= self.due:
            raise Cancelled("stop")


def sh(script: str, *arguments: str | Path, **options: object) -> Command:
    return Command(["sh", "-c", script, *map(str, arguments)], "dash", **options)  # type: ignore[arg-type]


def test_output_is_returned() -> None:
    assert run(sh("echo hello; echo warning >&2")) == "hello\n"


def test_failure_names_the_program_its_exit_code_and_what_it_said() -> None:
    with pytest.raises(CommandFailed, match="sh ended with exit code 3: it is broken") as caught:
        run(sh("echo it is broken >&2; exit 3"))
    assert caught.value.details["exit_code"] == 3
    assert caught.value.details["stderr"] == "it is broken"


def test_program_ended_by_a_signal_is_a_failure() -> None:
    with pytest.raises(CommandFailed, match="signal SIGSEGV"):
        run(sh("kill -SEGV $$"))


def test_missing_program_names_the_package_to_install() -> None:
    with pytest.raises(UnsupportedByHost, match="no-such-program is not installed") as caught:
        run(Command(["no-such-program"], "no-such-package"))
    assert "apt install no-such-package" in caught.value.hint


def test_endless_output_does_not_fill_the_memory() -> None:
    with pytest.raises(CommandFailed) as caught:
        run(sh("head -c 20000000 /dev/zero >&2; echo last >&2; exit 1"))
    assert caught.value.details["stderr"].endswith("last")
    assert len(caught.value.details["stderr"]) <= 16 * 1024


def test_cancel_ends_the_program_within_a_second_even_if_it_ignores_sigterm(tmp_path: Path) -> None:
    watch = CancelledAfter(0.5)
    with pytest.raises(Cancelled):
        run(sh('trap "" TERM; echo $$ > "$0"; while :; do sleep 0.1; done', tmp_path / "pid"), watch=watch)
    assert time.monotonic() - watch.due < 1
    assert not running(int((tmp_path / "pid").read_text()))


def test_watcher_is_asked_at_least_twice_a_second() -> None:
    watch = CancelledAfter(2)
    with pytest.raises(Cancelled):
        run(sh("sleep 60"), watch=watch)
    assert max(later - earlier for earlier, later in zip(watch.asked, watch.asked[1:], strict=False)) < 0.5


def test_progress_is_reported_as_parsed() -> None:
    watch = Alone()
    run(sh(r"printf '1\r2\r'", parse=lambda line: (int(line), 2)), watch=watch)
    assert watch.last_progress[:2] == (2, 2)


def test_program_that_rests_is_ended() -> None:
    with pytest.raises(Stalled, match=r"moved nothing for 0\.5 s"):
        run(sh("sleep 60"), stall=0.5)


def test_program_that_reads_does_not_rest() -> None:
    """qemu-img check of a large image says nothing and writes nothing for a long time."""
    script = "for _ in range(8): file.read(65536), time.sleep(0.2)"
    reading = f"import time; file = open('/dev/zero', 'rb', 0)\n{script}"
    run(Command([sys.executable, "-c", reading], "python3"), stall=1.0)


def test_program_whose_output_grows_does_not_rest(tmp_path: Path) -> None:
    output = tmp_path / "output"
    script = 'for i in 1 2 3 4 5 6 7 8; do head -c 65536 /dev/zero >> "$0"; sleep 0.2; done'
    run(sh(script, output, output=output), stall=1.0)
    assert output.stat().st_size == 8 * 65536


def test_program_dies_with_its_worker(tmp_path: Path) -> None:
    """A worker killed by SIGKILL cannot end its children; a qemu-img that went on would write into foreign disks."""
    note = tmp_path / "pid"
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    source.write_bytes(b"x" * 16 * 1024**2)
    worker = subprocess.Popen([sys.executable, "-c", SLOW_WORKER, note, source, target])
    try:
        pid = int(wait_until(lambda: note.exists() and note.read_text().strip(), 20, "the program has begun"))
        wait_until(target.exists, 20, "qemu-img has begun to write")
        assert running(pid)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
    wait_until(lambda: not running(pid), 1, "qemu-img is gone with its worker")


def test_program_holds_the_lock_it_was_given(tmp_path: Path) -> None:
    """Until a child is really gone nobody else may work on the instance, even if our own process let go."""
    lock = tmp_path / ".lock"
    with locked(lock) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    try:
        with pytest.raises(InstanceLocked), locked(lock):
            pytest.fail("the child holds it")
    finally:
        child.kill()
        child.wait(10)
    with locked(lock):
        pass


def test_descriptors_are_passed_on_only_when_asked(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock") as descriptor:
        listing = sh(f"test -e /proc/self/fd/{descriptor} && echo yes || echo no")
        assert run(listing) == "no\n"
        assert run(listing, pass_fds=(descriptor,)) == "yes\n"


def test_limits_bind_the_program() -> None:
    with pytest.raises(CommandFailed, match=r"SIGKILL|SIGXCPU"):
        run(sh("while :; do :; done", cpu_seconds=1))
