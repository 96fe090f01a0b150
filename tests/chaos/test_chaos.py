"""Each fault once, each step once: what was accepted finishes or is undone, runs once at a time, and leaves nothing.

scripts/chaos plays the same rounds at random, as many as one likes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import Queue

import pytest

from tests.chaos import faults, scenarios
from tests.chaos.lane import Lane
from tests.chaos.rounds import Round, Verdict
from tests.lab import lab_folder

NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can mount a disk that is small enough to fill, and lay a cable between hosts"
)

# operation, fault, step, share of the step's usual time after which the fault strikes
QUICK = [
    ("spawn", "SIGKILL disk worker", "fetch_image", 0.5),
    ("spawn", "disk full", "create_disks", 0.0),
    ("spawn", "FLUSHALL, SIGKILL both", "spawn_instance", 0.5),
    ("spawn", "cancel", "spawn_instance", 0.5),
    ("power_on", "SIGKILL libvirtd", "power_on", 0.3),
    ("resume", "SIGKILL Redis", "resume", 0.1),
    ("resize", "SIGKILL disk worker", "resize_disks", 0.5),
    ("snapshot by backup", "SIGKILL pool child", "live_snapshot", 0.3),
    ("snapshot cold", "SIGKILL control worker", "managed_save", 0.3),
    ("destroy", "SIGKILL control worker", "destroy_instance", 0.5),
    ("migrate", "SIGKILL disk worker", "copy_disk:root.raw", 0.5),
    ("confirm", "cancel", "remove_leftover", 0.9),
    ("revert", "disk full", "start_source", 0.0),
]
THOROUGH = [
    ("spawn", "messages doubled", "admission", 0.0),
    ("spawn", "SIGKILL pool child", "create_disks", 0.3),
    ("spawn", "SIGTERM disk worker", "create_disks", 0.3),
    ("spawn", "FLUSHALL", "build_seed", 0.5),
    ("spawn", "SIGKILL QEMU", "wait_ready", 0.0),
    ("spawn", "SIGKILL control worker", "undo", 0.0),
    ("spawn", "SIGSTOP disk worker", "create_disks", 0.3),
    ("power_off", "SIGKILL control worker", "power_off", 0.3),
    ("reboot", "SIGSTOP libvirtd", "reboot", 0.3),
    ("reboot", "SIGSTOP control worker", "reboot", 0.3),
    ("power_off of one that is paused", "SIGTERM control worker", "power_off", 0.5),
    ("power_off of one that is paused", "SIGKILL control worker", "undo", 0.3),
    ("reboot of one that is paused", "cancel", "reboot", 0.5),
    ("pause", "connections dropped", "pause", 0.3),
    ("power_on", "SIGSTOP Redis", "power_on", 0.1),
    ("pause", "Redis away for long", "pause", 0.1),
    ("reboot", "SIGTERM control worker", "reboot", 0.3),
    ("resize", "cancel", "redefine", 0.5),
    ("resize", "SIGKILL control worker", "finish_resize", 0.5),
    ("resize", "FLUSHALL", "shut_down", 0.5),
    ("resize", "SIGKILL pool child", "plan_resize", 0.3),
    ("resize", "disk full", "redefine", 0.9),
    ("resize", "cancel", "finish_resize", 0.9),
    ("snapshot by backup", "SIGKILL disk worker", "reserve_space", 0.3),
    ("snapshot by backup", "SIGSTOP QEMU", "live_snapshot", 0.3),
    ("snapshot by backup", "FLUSHALL", "extract_snapshot", 0.3),
    ("snapshot by backup", "SIGKILL disk worker", "publish_snapshot", 0.3),
    ("snapshot by backup", "disk full", "live_snapshot", 0.3),
    ("snapshot by backup", "disk full", "publish_snapshot", 0.1),
    ("snapshot by mirror", "SIGKILL disk worker", "live_snapshot", 0.5),
    ("snapshot by mirror", "disk full", "extract_snapshot", 0.3),
    ("snapshot increment", "SIGKILL disk worker", "live_snapshot", 0.5),
    ("snapshot increment", "SIGKILL QEMU", "live_snapshot", 0.3),
    ("snapshot increment", "SIGKILL disk worker", "extract_snapshot", 0.3),
    ("snapshot of one that is off", "SIGKILL disk worker", "live_snapshot", 0.3),
    ("snapshot cold", "SIGKILL control worker", "note_power", 0.3),
    ("snapshot cold", "SIGKILL control worker", "restore_power", 0.3),
    ("snapshot delete", "SIGKILL disk worker", "delete_snapshot", 0.3),
    ("snapshot restore", "SIGKILL pool child", "restore_disks", 0.5),
    ("snapshot restore", "SIGKILL disk worker", "restore_seed", 0.3),
    ("snapshot restore", "cancel", "restore_instance", 0.3),
    ("migrate", "SIGSTOP disk worker", "describe_source", 0.3),
    ("migrate", "FLUSHALL, SIGKILL both", "preflight", 0.5),
    ("migrate", "SIGKILL pool child", "prepare_destination", 0.5),
    ("migrate", "SIGKILL QEMU", "shut_down_source", 0.3),
    ("migrate", "SIGKILL control worker", "set_aside", 0.3),
    ("migrate", "SIGTERM disk worker", "prepare_source", 0.3),
    ("migrate", "disk full", "copy_disk:root.raw", 0.3),
    ("migrate", "SIGKILL disk worker", "fingerprint:root.raw", 0.5),
    ("migrate", "SIGKILL Redis", "verify_disks", 0.3),
    ("migrate", "SIGKILL control worker", "hand_over", 0.3),
    ("migrate", "SIGKILL libvirtd", "define_destination", 0.3),
    ("migrate", "SIGSTOP control worker", "start_destination", 0.5),
    ("migrate", "FLUSHALL, SIGKILL both", "release", 0.3),
    ("migrate", "FLUSHALL, SIGKILL one host", "take_over", 0.3),
    ("migrate", "SIGKILL control worker", "undo", 0.3),
    ("migrate over NBD", "SIGKILL control worker", "lend:base", 0.5),
    ("migrate over NBD", "SIGKILL disk worker", "prepare_destination", 0.5),
    ("migrate over NBD", "disk full", "prepare_destination", 0.3),
    ("migrate over NBD", "SIGTERM control worker", "lend:disks", 0.5),
    ("migrate over NBD", "cables cut", "copy_disk:root.qcow2", 0.5),
    ("confirm", "FLUSHALL", "prove_here", 0.0),
    ("confirm", "SIGKILL disk worker", "prove_here", 0.3),
    ("confirm", "SIGKILL disk worker", "remove_leftover", 0.3),
    ("confirm", "FLUSHALL", "settle", 0.3),
    ("revert", "SIGKILL disk worker", "prove_source", 0.5),
    ("revert", "SIGKILL pool child", "describe_destination", 0.3),
    ("revert", "cancel", "shut_down_destination", 0.5),
    ("revert", "SIGKILL libvirtd", "leave_destination", 0.3),
    ("revert", "disk full", "leave_destination", 0.9),
    ("revert", "SIGKILL control worker", "return_source", 0.3),
    ("revert", "SIGSTOP libvirtd", "start_source", 0.5),
    ("revert", "FLUSHALL, SIGKILL both", "release_destination", 0.3),
    ("revert", "SIGKILL control worker", "take_back", 0.3),
]
CHOSEN = QUICK + THOROUGH


Verdicts = dict[Round, "Future[Verdict]"]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """Of all rounds that were selected: two fleets play them side by side, since most of a round is waiting."""
    selected = [
        item.callspec.params["chosen"]
        for item in request.session.items
        if hasattr(item, "callspec") and "chosen" in item.callspec.params
    ]
    with lab_folder() as folder, ExitStack() as stack:
        free: Queue[Lane] = Queue()
        for number in range(min(2, len(selected))):
            free.put(stack.enter_context(Lane(folder / f"lane{number}.log", freeze_seconds=3)))

        def play(what: Round) -> Verdict:
            lane = free.get()
            try:
                return lane.play(what)
            finally:
                free.put(lane)

        pool = ThreadPoolExecutor(2)
        try:
            yield {what: pool.submit(play, what) for what in selected}
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(
            Round(number, *row),
            id="-".join(row[:3]).replace(",", "").replace(" ", "_"),
            marks=[
                *([NEEDS_ROOT] if faults.BY_NAME[row[1]].as_root or scenarios.BY_NAME[row[0]].journey else []),
                *([pytest.mark.thorough] if row in THOROUGH else []),
            ],
        )
        for number, row in enumerate(CHOSEN)
    ],
)
def test_it_survives(verdicts: Verdicts, chosen: Round) -> None:
    assert verdicts[chosen].result().violations == []


def test_every_fault_and_every_step_is_among_the_chosen() -> None:
    assert {row[1] for row in CHOSEN} == set(faults.BY_NAME)
    assert {row[2] for row in CHOSEN} >= {step for one in scenarios.SCENARIOS for step in one.steps}
