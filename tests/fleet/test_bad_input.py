"""Bad input is refused before anything is made: the message names the field, what was given, and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleet.parts import Commands, Scheduler, files, idle_image, redis_keys, remains
from tests.lab import Fleet, LabHost
from worker.models import GIB

NAMES = "1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"

# What is wrong, as by name, as options of the command, and what the message must tell.
CASES = [
    ("unknown host", {"host": "nowhere"}, ["--host=nowhere"], ["host", "'nowhere'", "allowed: hosta"]),
    ("name with a slash", {"name": "a/b"}, ["a/b"], ["name", "'a/b'", NAMES]),
    ("name with a space", {"name": "a b"}, ["a b"], ["name", "'a b'", NAMES]),
    ("empty name", {"name": ""}, [""], ["name", "''", NAMES]),
    ("name in Greek", {"name": "ναός"}, ["ναός"], ["name", "ναός", NAMES]),
    ("long name", {"name": "n" * 64}, ["n" * 64], ["name", NAMES]),
    ("no vcpu", {"vcpus": 0}, ["--vcpus=0"], ["vcpus", "given: 0", "greater than or equal to 1"]),
    ("negative vcpus", {"vcpus": -1}, ["--vcpus=-1"], ["vcpus", "given: -1", "greater than or equal to 1"]),
    ("negative memory", {"memory_mib": -64}, ["--memory=-64"], ["memory", "given: -64", "greater than or equal to 16"]),
    ("astronomic memory", {"memory_mib": 10**30}, [f"--memory={10**30}"], ["memory", "given: 1000", "less than"]),
    ("more memory than there is", {"memory_mib": 2**26}, [f"--memory={2**26}"], ["memory", f"{2**26}", "at most"]),
    ("negative disk", {"disk_gib": -1}, ["--disk=-1"], ["disk", "given: -1", "greater than or equal to 1"]),
    ("negative swap", {"swap_mib": -1}, ["--swap=-1"], ["swap", "given: -1", "greater than or equal to 0"]),
    ("negative ephemeral", {"ephemeral_gib": [-1]}, ["--ephemeral=-1"], ["ephemeral", "given: -1", "or equal to 1"]),
    ("disk smaller than the image", {"image": "LARGE", "disk_gib": 1}, ["--image=LARGE", "--disk=1"], ["disk", "2"]),
    ("missing image", {"image": "ROOT/nosuch.qcow2"}, ["--image=ROOT/nosuch.qcow2"], ["nosuch.qcow2", "No such file"]),
    ("image by a relative path", {"image": "x.qcow2"}, ["--image=x.qcow2"], ["image", "x.qcow2", "absolute path"]),
    ("image out of bounds", {"image": "/etc/passwd"}, ["--image=/etc/passwd"], ["image", "/etc/passwd", "below ROOT"]),
    ("image that is none", {"image": "ROOT/text"}, ["--image=ROOT/text"], ["ROOT/text", "found", "allowed", "qcow2"]),
    ("image that is a folder", {"image": "ROOT"}, ["--image=ROOT"], ["ROOT", "no regular file", "allowed"]),
    ("sha256 that is none", {"sha256": "abc"}, ["--sha256=abc"], ["sha256", "'abc'", "64 hexadecimal digits"]),
    ("sha256 of another", {"sha256": "0" * 64}, [f"--sha256={'0' * 64}"], ["sha256", "0" * 64]),
    (
        "unknown network",
        {"networks": ["network:nosuch"]},
        ["--network=network:nosuch"],
        ["nosuch", "active networks"],
    ),
    ("missing bridge", {"networks": ["bridge:nosuch0"]}, ["--network=bridge:nosuch0"], ["nosuch0", "its bridges"]),
    ("network that is none", {"networks": ["wlan"]}, ["--network=wlan"], ["networks", "'wlan'", "bridge:NAME"]),
    ("too much user-data", {"user_data": "#" * (2**20 + 1)}, ["--user-data=BIG"], ["user_data", "1048576", "1048577"]),
    ("key that is none", {"ssh_keys": ["PRIVATE"]}, ["--ssh-key=TEXT"], ["ssh_keys", "OpenSSH"]),
    ("unknown firmware", {"firmware": "coreboot"}, ["--firmware=coreboot"], ["firmware", "'coreboot'", "'efi'"]),
    ("unknown accelerator", {"accel": "xen"}, ["--accel=xen"], ["accel", "'xen'", "'kvm'"]),
    ("no time at all", {"ready_timeout": 0}, ["--ready-timeout=0"], ["ready_timeout", "given: 0", "greater than 0"]),
    ("time without end", {"ready_timeout": "inf"}, ["--ready-timeout=inf"], ["ready_timeout", "inf", "86400"]),
    ("nothing to wait for", {"wait_for": "console"}, ["--wait-for=console"], ["console_line"]),
    ("id that is none", {"operation_id": "a b"}, ["--id=a b"], ["operation_id", "'a b'", "1 to 100 letters"]),
    ("unknown field", {"cpus": 2}, ["--cpus=2"], ["cpus"]),
]


@pytest.fixture(scope="module")
def places(host: LabHost, scheduler: Scheduler) -> Iterator[dict[str, str]]:
    """What the words in capitals stand for."""
    text = host.images / "text"
    text.write_text("This is no disk image.\n" * 1000)
    big = host.folder / "user-data"
    big.write_text("#" * (2**20 + 1))
    large = idle_image(host.images / "large.qcow2", size=2 * GIB)
    # How large an image is shows when it is fetched: a sound one stays in the cache.
    scheduler.call("spawn", name="large", host="hosta", image=str(large), disk_gib=1)
    yield {"ROOT": str(host.images), "LARGE": str(large), "TEXT": str(text), "BIG": str(big), "PRIVATE": "-----BEGIN"}
    for path in (text, big, large):
        path.unlink()


def placed(value: Any, places: dict[str, str]) -> Any:
    """A value with the words in capitals replaced."""
    text = json.dumps(value)
    for word, place in places.items():
        text = text.replace(word, place)
    return json.loads(text)


@pytest.fixture
def untouched(fleet: Fleet, host: LabHost) -> Iterator[None]:
    """Afterwards the host is as before, and in Redis there is nothing new but records of rejections."""
    before_files, before_keys = files(host.data), redis_keys(fleet)
    yield
    assert remains(fleet) == {}
    assert files(host.data) - before_files == set()
    new = {key for key in redis_keys(fleet) - before_keys if not key.startswith(("celery-task-meta-", "_kombu."))}
    with fleet.redis.client() as client:
        states = {key: client.hget(key, "state") for key in new if key.startswith("virtfleet:op:")}
        assert all(state == "rejected" for state in states.values())
        # The journal's own: its index, and counters that never go back.
        assert new - set(states) <= {"virtfleet:operations", "virtfleet:fence", "virtfleet:reaper"}


@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in CASES])
@pytest.mark.usefixtures("untouched")
def test_it_is_refused_by_name_and_by_command(
    command: Commands, scheduler: Scheduler, wanted: dict[str, Any], places: dict[str, str], case: Any
) -> None:
    given, options, told = placed(case, places)
    record = scheduler.call("spawn", **{**wanted, **given})
    assert record["state"] == "rejected"
    assert_told(record["error"]["message"], told)
    shown = command("operation", record["id"], "--json")
    if "operation_id" in given:  # no record can bear this id
        assert shown.returncode == 2
    else:
        assert json.loads(shown.stdout)["error"] == record["error"]

    name = [] if "name" in given else [wanted["name"]]
    done = command("spawn", *name, "--host=hosta", f"--image={wanted['image']}", "--memory=64", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert_told(done.stdout + done.stderr, told)


def assert_told(message: str, words: list[str]) -> None:
    """The message has these words, whether fields are called by their names or by those of the options."""
    plain = message.replace("_", "-")
    assert [word for word in words if word.replace("_", "-") not in plain] == [], message


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"user_data": "\ud800"}, id="half a UTF-16 pair as user-data"),
        pytest.param({"name": "\ud800"}, id="half a UTF-16 pair as name"),
        pytest.param({"\ud800": 1}, id="half a UTF-16 pair as field"),
        pytest.param({"name": "n" * 1_000_000}, id="a name of a million letters"),
        pytest.param({f"field{number}": number for number in range(1000)}, id="a thousand unknown fields"),
        pytest.param({"name": {"first": "a", "last": "b"}, "vcpus": [], "host": None}, id="other types"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_an_odd_request_spoils_no_listing(
    command: Commands, scheduler: Scheduler, wanted: dict[str, Any], odd: dict[str, Any]
) -> None:
    record = scheduler.call("spawn", **{**wanted, **odd})
    assert (record["state"], record["error"]["code"]) == ("rejected", "invalid_spec")
    assert len(record["error"]["message"]) < 2000
    for words in (("operations",), ("operations", "--json"), ("operation", record["id"])):
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) < 500_000


def test_what_is_passed_to_the_guest_is_shown_in_no_refusal(scheduler: Scheduler, wanted: dict[str, Any]) -> None:
    record = scheduler.call("spawn", **wanted, user_data="password: geheim\n" + "#" * 2**20)
    assert record["state"] == "rejected"
    assert "geheim" not in json.dumps(record)
