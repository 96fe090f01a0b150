"""The bootable guest of the tests and the demo: built once per version of its build script."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.process import REPOSITORY, LabError, wait_until

BUILD = REPOSITORY / "scripts" / "build-guest-image"
CACHE = REPOSITORY / ".cache"
BUILD_SECONDS = 600


def guest_image() -> Path:
    """Path of the guest's qcow2 disk, built if need be; raises LabError with the output of a failed build."""
    CACHE.mkdir(exist_ok=True)
    image = CACHE / f"guest-{_run('--fingerprint').strip()}.qcow2"
    with _lock(CACHE / "guest.lock"):
        if not image.exists():
            building = image.with_suffix(".building")
            _run(str(building))
            building.rename(image)
    return image


def _run(*arguments: str) -> str:
    command = [str(BUILD), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as build:
        try:
            output, _ = build.communicate(timeout=BUILD_SECONDS)
        except BaseException:
            # To all that it runs, or it would first wait for that; then it removes its temporary files.
            os.killpg(build.pid, signal.SIGTERM)
            build.wait(10)
            raise
    if build.returncode != 0:
        raise LabError(f"{shlex.join(command)} failed:\n{output}")
    return output


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        wait_until(lambda: _flock(file.fileno()), 2 * BUILD_SECONDS, f"{path} is free")
        yield


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
