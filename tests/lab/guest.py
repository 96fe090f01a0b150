"""The bootable guest of the tests and the demo: built once per version of its build script."""

from __future__ import annotations

import fcntl
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
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BUILD_SECONDS)
    if done.returncode != 0:
        raise LabError(f"{BUILD} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


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
