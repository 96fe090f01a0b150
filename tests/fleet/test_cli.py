"""The command: JSON for programs, exit codes for scripts, and never a traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, WebServer, domains
from tests.lab import Fleet, LabHost, free_port
from tests.lab.fleet import COMMAND
from tests.lab.process import REPOSITORY


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with variables of its own, as a user would who has set them wrongly."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_command_speaks_json(command: Commands, wanted: dict[str, Any]) -> None:
    name, operation = wanted["name"], f"json-{wanted['name']}"
    spawned = command(
        "spawn", name, "--host=hosta", f"--image={wanted['image']}", "--memory=64", f"--id={operation}", "--json"
    )
    commands: list[tuple[str, ...]] = [
        ("operations",),
        ("operations", "--unfinished"),
        ("operation", operation),
        ("watch", operation),
        ("instances",),
        ("hosts",),
        ("hosts", "sync"),
        ("hosts", "sync", "hosta"),
        ("power", "pause", name),
        ("power", "resume", name),
        ("power", "reboot", name, "--hard"),
        ("power", "off", name, "--timeout=0"),
        ("power", "on", name),
        ("power", "on", name, "--no-wait", f"--id=on-{name}"),
        ("cancel", operation, "--no-wait"),
        ("destroy", name, "--wait-if-busy"),
    ]
    done = [spawned, *(command(*words, "--json") for words in commands)]
    for one in done:
        assert one.returncode == 0, (one.args, one.stdout, one.stderr)
        assert isinstance(json.loads(one.stdout), dict)
        assert one.stderr == ""
    assert json.loads(spawned.stdout)["state"] == "succeeded"


def test_errors_are_json_too(command: Commands) -> None:
    for words in (
        ("operation", "nosuch"),
        ("watch", "nosuch"),
        ("cancel", "nosuch"),
        ("power", "on", "nosuch"),
        ("destroy", "nosuch"),
        ("spawn", "a b", "--host=hosta", "--image=/x"),
        ("hosts", "sync", "nosuch"),
    ):
        done = command(*words, "--json")
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        error = json.loads(done.stdout)["error"]
        assert error["code"]
        assert error["message"]


def test_a_failed_operation_ends_with_1_and_says_what_where_why_and_what_was_undone(
    command: Commands, wanted: dict[str, Any]
) -> None:
    silent = ("--wait-for=console", "--console-line=never said", "--ready-timeout=0.5")
    broken = ("spawn", wanted["name"], "--host=hosta", f"--image={wanted['image']}", "--memory=64", *silent)
    done = command(*broken)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "[guest_not_ready]" in said
    assert "step wait_ready on hosta" in said
    assert "Undone: remove_domain, remove_files" in said
    as_json = command(*broken, "--json")
    assert as_json.returncode == 1
    record = json.loads(as_json.stdout)
    assert (record["state"], record["error"]["code"]) == ("failed", "guest_not_ready")
    assert record["request"]["console_line"] == "never said"


def test_what_the_host_cannot_give_is_found_before_anything_is_made(command: Commands, wanted: dict[str, Any]) -> None:
    asked = ("spawn", wanted["name"], "--host=hosta", f"--image={wanted['image']}", "--memory=64")
    many = command(*asked, "--vcpus=1000")
    assert many.returncode == 2
    assert "vcpus: allowed: at most" in many.stderr
    accelerated = command(*asked, "--accel=kvm", "--json")
    assert accelerated.returncode == 1
    record = json.loads(accelerated.stdout)
    assert (record["error"]["code"], record["undo"]) == ("unsupported_by_host", [])


def test_wrong_usage_is_told_in_json_too(command: Commands) -> None:
    for wrong in (("spawn", "--json"), ("operations", "--json", "--limit=none"), ("nosuch", "--json")):
        done = command(*wrong)
        assert done.returncode == 2
        assert json.loads(done.stdout)["error"]["message"]


def test_an_accepted_operation_can_be_watched_later(command: Commands, spawn: Spawn) -> None:
    name = spawn()["instance"]
    accepted = command("power", "off", name, "--timeout=1", f"--id=later-{name}", "--no-wait")
    assert accepted.returncode == 0
    assert f"virtfleet watch later-{name}" in accepted.stdout
    for _ in range(2):  # while it runs, and when it is over
        watched = command("watch", f"later-{name}")
        assert watched.returncode == 0, watched.stderr
        assert "power_off" in watched.stdout
        assert "did not shut down within 1 s" in watched.stdout


def test_user_data_is_kept_out_of_records_and_listings(command: Commands, spawn: Spawn) -> None:
    record = spawn(user_data="#cloud-config\npassword: geheim\n")
    shown = command("operation", record["id"], "--json")
    assert shown.returncode == 0
    assert "geheim" not in json.dumps(record) + shown.stdout + command("operations", "--json").stdout
    assert record["request"]["user_data"] == "<31 bytes>"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nosuch",), "No such command"),
        (("power", "of", "x"), "No such command"),
        (("spawn",), "Missing argument"),
        (("spawn", "x"), "Missing option"),
        (("spawn", "x", "--host=hosta", "--image=/x", "--vcpus=two"), "unable to parse string as an integer"),
        (("spawn", "x", "--host=hosta", "--image=/x", f"--memory={'9' * 5000}"), "memory"),
        (("spawn", "x", "--host=hosta", "--image=/x", "--user-data=/nosuch"), "cannot read /nosuch: No such file"),
        (("spawn", "x", "--host=hosta", "--image=/x", "--user-data=/"), "cannot read /: Is a directory"),
        (("spawn", "x", "--host=hosta", "--image=/x", "--ssh-key=/nosuch"), "cannot read /nosuch"),
        (("spawn", "x", "--host=hosta", "--image=/x\udcff"), "image"),
        (("spawn", "x", "--host=hosta", "--image=/x\0y"), "image"),
        (("spawn", "x", "--host=hosta", "--image=http://[::1"), "image"),
        (("spawn", "x", "--host=h\u202eosta", "--image=/x"), "host"),
        (("spawn", "[red]x[/red]", "--host=hosta", "--image=/x"), "[red]x[/red]"),
        (("power", "off", "x", "--timeout=nan"), "timeout"),
        (("power", "off", "x", "--timeout=1e400"), "timeout"),
        (("power", "off", "x", "--retry-interval=0"), "retry_interval"),
        (("operation", "nosuch"), "no operation 'nosuch'"),
        (("operation", "a", "b", "c"), "allowed"),
        (("watch", "\u2603"), "no operation"),
        (("operations", "--limit=0"), "limit"),
        (("worker", "disk", "--host=a b"), "--host"),
        (("flower", "--port=99999"), "port"),
        (("flower", "--address=0.0.0.0"), "--basic-auth"),
    ],
)
def test_a_mistake_is_explained(command: Commands, words: tuple[str, ...], told: str) -> None:
    if "\0" in "".join(words):
        words = tuple(word.replace("\0", "%00") for word in words)  # no argument can hold one
    done = command(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert told in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_binary_user_data_is_explained(command: Commands, host: LabHost) -> None:
    path = host.folder / "binary"
    path.write_bytes(b"\x1f\x8b\xff\xfe")
    done = command("spawn", "x", "--host=hosta", "--image=/x", f"--user-data={path}")
    path.unlink()
    assert done.returncode == 2
    assert "is no UTF-8 text" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_TTL", "soon"),
        ("REDIS_URL", "localhost"),
        ("REDIS_URL", "redis://127.0.0.1:99999"),
        ("IMAGE_ROOTS", "/srv"),
        ("ACCEL", "xen"),
    ],
)
def test_a_wrong_setting_is_explained(name: str, value: str) -> None:
    done = run("hosts", **{f"VIRTFLEET_{name}": value})
    assert done.returncode == 2
    assert f"VIRTFLEET_{name}: allowed" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_redis_every_command_ends_with_4_within_seconds() -> None:
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    for words in (("instances",), ("spawn", "x", "--host=h", "--image=/x"), ("watch", "x", "--json")):
        began = time.monotonic()
        done = run(*words, VIRTFLEET_REDIS_URL=nobody)
        assert time.monotonic() - began < 10, "most of it the start of Python, on a busy machine"
        assert done.returncode == 4, done.stdout + done.stderr
        said = done.stdout + done.stderr
        assert "broker_unavailable" in said
        assert nobody in said
        assert "VIRTFLEET_REDIS_URL" in said


def test_a_redis_that_does_not_answer_is_given_up_too(fleet: Fleet) -> None:
    with fleet.redis.paused():
        began = time.monotonic()
        done = run("instances", **fleet.env)
    assert done.returncode == 4, done.stdout + done.stderr
    assert time.monotonic() - began < 15
    assert "broker_unavailable" in done.stderr


def test_a_database_redis_does_not_have_is_explained(fleet: Fleet) -> None:
    done = run("instances", VIRTFLEET_REDIS_URL=f"{fleet.redis.url}9999")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "DB index is out of range" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_no_redis_is_explained(web: WebServer) -> None:
    done = run("instances", VIRTFLEET_REDIS_URL=f"redis://127.0.0.1:{web.server_port}/0")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "VIRTFLEET_REDIS_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_password_of_redis_is_shown_to_nobody() -> None:
    done = run("instances", VIRTFLEET_REDIS_URL=f"redis://:geheim@127.0.0.1:{free_port()}/0")
    assert done.returncode == 4
    assert "geheim" not in done.stdout + done.stderr


def test_interrupting_the_command_does_not_stop_the_operation(fleet: Fleet, host: LabHost, spawn: Spawn) -> None:
    name = spawn()["instance"]
    with subprocess.Popen(
        [*COMMAND, "power", "off", name, "--timeout=3", f"--id=interrupted-{name}"],
        cwd=REPOSITORY,
        env={**os.environ, **fleet.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout is not None
        following.stdout.readline()  # the step has begun
        following.send_signal(2)
        _, said = following.communicate(timeout=20)
    assert following.returncode == 130
    assert "goes on without this command" in said
    assert "Traceback" not in said
    watched = fleet.cli("watch", f"interrupted-{name}")
    assert watched.returncode == 0, watched.stderr
    assert domains(host) == {name: False}
