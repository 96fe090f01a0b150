"""Resize on real hosts: what the guest sees afterwards, and that a failed one leaves it as it was."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from tests.fleet.instances import Lab, definition, domain, domains, lab_of, virtual_sizes
from tests.lab import lab_folder, wait_until

GIB = 1024**3
_names = (f"resized-{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_folder() as folder, lab_of(folder, "hosta") as lab:
        yield lab


@pytest.fixture(autouse=True)
def nothing_remains(lab: Lab) -> Iterator[None]:
    """Each test's instances go with it."""
    yield
    for one in lab.run("instances").record["instances"]:
        lab.succeed("destroy", one["name"])


@pytest.fixture
def name() -> str:
    return next(_names)


def kept(xml: str) -> list[str]:
    """Of a definition, what a resize must not change."""
    patterns = (
        r"machine='[^']*'",
        r"<cpu mode[^>]*>",
        r"<mac address[^>]*>",
        r"<nvram.*",
        r"<uuid>.*",
        r"<address type='pci'[^>]*>",
    )
    return sorted(found for pattern in patterns for found in re.findall(pattern, xml))


def disk_inodes(folder: Path) -> dict[str, int]:
    """Which file each disk with data is."""
    return {path.name: path.stat().st_ino for path in (*folder.glob("root.*"), *folder.glob("ephemeral*.qcow2"))}


@pytest.mark.parametrize(
    "root", ["overlay", *(pytest.param(root, marks=pytest.mark.thorough) for root in ("copy", "raw"))]
)
def test_the_guest_sees_its_new_sizes_and_keeps_its_data(lab: Lab, name: str, root: str) -> None:
    uuid = lab.spawn(name, "hosta", "--root-disk", root, "--ephemeral", "1", "--swap", "64", "--disk", "1")
    host = lab.fleet.hosts["hosta"]
    with domain(host, name) as found:
        found.setAutostart(1)
        found.setMetadata(2, "<note>mine</note>", "my", "urn:mine", 2)
    before, inodes = definition(host, name), disk_inodes(lab.folder("hosta", uuid))
    sizes = ("--vcpus", "2", "--memory", "160", "--disk", "2", "--swap", "32", "--ephemeral", "2", "--ephemeral", "1")
    record = lab.succeed("resize", name, *sizes)
    assert record["result"]["power"] == "running"
    told = lab.wait_told("hosta", uuid, 2)
    assert "mark-of-vda!" in told
    assert "mark-of-vdb!" in told
    assert f"vda: {2 * GIB} bytes" in told
    assert f"vdb: {2 * GIB} bytes" in told
    assert f"vdc: {GIB} bytes" in told
    assert "cpus: 2" in told
    assert virtual_sizes(lab.folder("hosta", uuid))["swap.raw"] == 32 * 1024**2
    assert inodes.items() <= disk_inodes(lab.folder("hosta", uuid)).items(), "no disk is copied"
    after = definition(host, name)
    assert set(kept(before)) <= set(kept(after))
    assert "<note>mine</note>" in after or "mine</" in after
    assert "<memory unit='KiB'>163840</memory>" in after
    with domain(host, name) as found:
        assert found.autostart() == 1
    listed = next(one for one in lab.run("instances").record["instances"] if one["name"] == name)
    assert (listed["vcpus"], listed["memory_mib"]) == (2, 160)
    assert not (lab.folder("hosta", uuid) / ".before-resize.json").exists()


@pytest.mark.thorough
def test_an_instance_that_is_off_stays_off(lab: Lab, name: str) -> None:
    uuid = lab.spawn(name, "hosta")
    lab.succeed("power", "off", name, "--timeout", "20")
    lab.succeed("resize", name, "--disk", "1", "--memory", "96")
    assert domains(lab.fleet.hosts["hosta"])[name] is False
    assert virtual_sizes(lab.folder("hosta", uuid))["root.qcow2"] == GIB
    again = lab.run("resize", name, "--disk", "1", "--memory", "96")
    assert again.record["result"]["note"] == "it has these sizes already: nothing was done"


@pytest.mark.thorough
def test_a_paused_guest_is_paused_again(lab: Lab, name: str) -> None:
    uuid = lab.spawn(name, "hosta")
    lab.succeed("power", "pause", name)
    lab.succeed("resize", name, "--disk", "1", "--memory", "96", "--timeout", "0")
    with domain(lab.fleet.hosts["hosta"], name) as found:
        assert found.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert virtual_sizes(lab.folder("hosta", uuid))["root.qcow2"] == GIB
    lab.succeed("power", "resume", name)
    assert "mark-of-vda!" in lab.wait_told("hosta", uuid, 2)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        (["--disk", "1"], "disk_gib"),
        (["--ephemeral", "1", "--ephemeral", "1"], "ephemeral_gib"),
        (["--ephemeral", "2"], "ephemeral_gib"),
        (["--vcpus", "1000"], "vcpus"),
        (["--memory", str(64 * 1024 * 1024)], "memory_mib"),
    ],
)
def test_what_cannot_be_is_refused_while_the_guest_runs_on(lab: Lab, name: str, sizes: list[str], field: str) -> None:
    uuid = lab.spawn(name, "hosta", "--disk", "2", "--ephemeral", "2", "--ephemeral", "1")
    before = definition(lab.fleet.hosts["hosta"], name)
    ran = lab.run("resize", name, *sizes)
    assert ran.code == 2
    assert ran.record["state"] == "rejected"
    assert ran.record["error"]["code"] == "invalid_spec"
    assert ran.record["error"]["details"]["field"] == field
    assert lab.boots("hosta", uuid) == 1
    assert domains(lab.fleet.hosts["hosta"])[name] is True
    assert definition(lab.fleet.hosts["hosta"], name) == before


@pytest.mark.thorough
def test_a_size_that_cannot_start_is_taken_back_and_the_guest_runs_as_before(lab: Lab, name: str) -> None:
    uuid = lab.spawn(name, "hosta", "--ephemeral", "1", "--swap", "64", "--disk", "1")
    host, folder = lab.fleet.hosts["hosta"], lab.folder("hosta", uuid)
    (folder / "root.qcow2.bak").write_text("somebody's own")
    before, sizes, spec = definition(host, name), virtual_sizes(folder), (folder / "instance.json").read_text()
    wanted = ("--memory", "4096", "--disk", "3", "--swap", "128", "--ephemeral", "2", "--ephemeral", "1")
    with host.short_of_memory():
        ran = lab.run("resize", name, *wanted)
    assert ran.record["state"] == "failed", ran.record["error"]
    assert all(undo["state"] == "done" for undo in ran.record["undo"])
    assert "mark-of-vda!" in lab.wait_told("hosta", uuid, 2)
    assert virtual_sizes(folder) == sizes
    assert json.loads((folder / "instance.json").read_text())["spec"] == json.loads(spec)["spec"]
    assert (folder / "root.qcow2.bak").read_text() == "somebody's own"
    strip = re.compile(r"<virtfleet:instance [^>]*>")
    assert strip.sub("", definition(host, name)) == strip.sub("", before)


@pytest.mark.thorough
@pytest.mark.parametrize("step", ["plan_resize", "shut_down", "resize_disks", "redefine", "finish_resize"])
@pytest.mark.parametrize("fault", ["kill", "cancel"])
def test_a_killed_worker_or_a_cancel_in_any_step_leaves_one_of_the_two(
    lab: Lab, name: str, step: str, fault: str
) -> None:
    """Either all of the new sizes or all of the old ones, running, with its data."""
    uuid = lab.spawn(name, "hosta", "--disk", "1")
    folder = lab.folder("hosta", uuid)
    accepted = lab.succeed("resize", name, "--disk", "2", "--memory", "160", "--no-wait")
    operation = accepted["id"]

    def reached() -> bool:
        record = lab.run("operation", operation).record
        states = {one["key"]: one["state"] for one in record["steps"]}
        return states[step] in ("running", "done", "failed") or record["state"] in ("succeeded", "failed")

    wait_until(reached, 60, f"{operation} reaches {step}")
    if fault == "kill":
        for kind in ("control", "disk"):
            worker = lab.fleet.worker("hosta", kind)
            worker.kill9()
            worker.start()
    else:
        lab.run("cancel", operation)
    final = ("succeeded", "failed", "cancelled", "stuck")
    ended = wait_until(
        lambda: (found := lab.run("operation", operation).record)["state"] in final and found, 120, "it ends"
    )
    assert ended
    told = lab.wait_told("hosta", uuid, 2) if lab.boots("hosta", uuid) > 1 or step != "plan_resize" else ""
    size, memory = (2, 160) if ended["state"] == "succeeded" else (1, 128)
    assert ended["state"] in ("succeeded", "cancelled")
    assert domains(lab.fleet.hosts["hosta"])[name] is True
    assert virtual_sizes(folder)["root.qcow2"] == size * GIB
    assert f"<memory unit='KiB'>{memory * 1024}</memory>" in definition(lab.fleet.hosts["hosta"], name)
    assert not told or "mark-of-vda!" in told
    assert not (folder / ".before-resize.json").exists()
