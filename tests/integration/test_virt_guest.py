"""Guests on a real libvirtd and QEMU: each verb reaches its goal, repeated or interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.lab.guest import guest_image
from tests.lab.host import LabHost
from tests.lab.process import lab_folder, wait_until
from worker import errors
from worker.models import Disk, DomainConfig, Owner, PowerState
from worker.virt.domain_xml import parse
from worker.virt.guest import Guest
from worker.virt.host import Host

Define = Callable[..., Guest]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabHost]:
    with lab_folder() as folder, LabHost("virta", folder) as lab:
        yield lab


@pytest.fixture
def host(lab: LabHost) -> Iterator[Host]:
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        yield host


@pytest.fixture
def define(lab: LabHost, host: Host) -> Iterator[Define]:
    """Defines guests that have a blank disk, or an overlay of a given base."""
    made: list[Guest] = []

    def define(backing: Path | None = None, **fields: object) -> Guest:
        made.append(host.define(config(lab, backing).model_copy(update=fields)))
        return made[-1]

    yield define
    with Host.open(lab.uri, name=lab.name, timeout=10) as fresh:
        for guest in [fresh.guest(old.uuid) for old in made if fresh.find_uuid(old.uuid)]:
            guest.destroy()
            guest.undefine()


def config(lab: LabHost, backing: Path | None = None) -> DomainConfig:
    uuid = uuid4()
    name = f"g-{uuid.hex[:8]}"
    path = lab.data / f"{name}.qcow2"
    chain = ["-b", str(backing), "-F", "qcow2"] if backing else []
    size = [] if backing else ["64M"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *chain, str(path), *size], check=True)
    disk = Disk(role="root", target="vda", path=path, format="qcow2", virtual_size=2**26, backing=backing)
    return DomainConfig(
        name=name,
        uuid=uuid,
        owner=Owner(name=name, uuid=uuid, operation="op-1", fence=1),
        vcpus=1,
        memory_mib=256 if backing else 64,
        disks=(disk,),
        accel="qemu",
        emulator=Path("/usr/bin/qemu-system-x86_64"),
        console_log=lab.data / f"{name}.log",
    )


def owner_of(guest: Guest, fence: int) -> Owner:
    return Owner(name=guest.name, uuid=guest.uuid, operation=f"op-{fence}", fence=fence)


def test_a_guest_lives_through_all_power_states_however_often_each_verb_is_repeated(define: Define) -> None:
    guest = define()
    assert guest.power() is PowerState.OFF
    assert guest.is_persistent()
    verbs = [
        (guest.start, PowerState.RUNNING),
        (guest.pause, PowerState.PAUSED),
        (guest.start, PowerState.PAUSED),  # active already: starting is not resuming
        (guest.resume, PowerState.RUNNING),
        (guest.reset, PowerState.RUNNING),
        (guest.destroy, PowerState.OFF),
        (guest.shutdown, PowerState.OFF),
        (guest.undefine, PowerState.MISSING),
        (guest.destroy, PowerState.MISSING),
    ]
    for verb, goal in verbs:
        verb()
        verb()
        assert guest.power() is goal


def test_a_guest_started_paused_has_not_run(define: Define) -> None:
    guest = define()
    guest.start(paused=True)
    assert guest.power() is PowerState.PAUSED
    guest.resume()
    assert guest.power() is PowerState.RUNNING


def test_what_needs_a_running_guest_says_that_it_is_off(define: Define) -> None:
    guest = define()
    for verb in (guest.pause, guest.resume, guest.reboot, guest.reset):
        with pytest.raises(errors.InvalidState, match=f"{guest.name} on host virta"):
            verb()
    assert not guest.agent_answers(1)


def test_a_running_guest_is_not_undefined_and_stays_persistent(define: Define) -> None:
    guest = define()
    guest.start()
    with pytest.raises(errors.InvalidState, match="running"):
        guest.undefine()
    assert guest.is_persistent()
    assert guest.power() is PowerState.RUNNING


def test_a_guest_whose_qemu_was_killed_is_off_and_starts_again(lab: LabHost, define: Define) -> None:
    guest = define()
    guest.start()
    lab.kill_guest(guest.name)
    wait_until(lambda: guest.power() is PowerState.OFF, 10, "the guest is seen to be off")
    guest.start()
    assert guest.power() is PowerState.RUNNING


def test_a_qemu_that_does_not_react_loses_its_power_all_the_same(lab: LabHost, define: Define) -> None:
    guest = define()
    guest.start()
    os.kill(lab.qemu_pid(guest.name), signal.SIGSTOP)
    began = time.monotonic()
    guest.destroy()
    assert time.monotonic() - began < 30
    assert guest.power() is PowerState.OFF


def test_a_guest_can_be_powered_off_gracefully(define: Define) -> None:
    guest = define()
    guest.start()
    guest.destroy(graceful=True)
    assert guest.power() is PowerState.OFF


def test_a_saved_guest_is_not_taken_for_one_that_is_off(define: Define, lab: LabHost) -> None:
    guest = define()
    guest.start()
    subprocess.run(["virsh", "-q", "-c", lab.uri, "managedsave", guest.name], check=True, capture_output=True)
    assert guest.power() is PowerState.SAVED
    assert guest.has_managed_save()
    guest.start()
    assert guest.power() is PowerState.RUNNING
    assert not guest.has_managed_save()


def test_undefine_forgets_the_saved_memory_too(define: Define, host: Host, lab: LabHost) -> None:
    guest = define()
    guest.start()
    subprocess.run(["virsh", "-q", "-c", lab.uri, "managedsave", guest.name], check=True, capture_output=True)
    guest.undefine()
    assert host.find(guest.name) is None
    assert not list((lab.folder / "lib" / "qemu" / "save").glob("*"))


def test_a_claim_outlives_libvirtd_and_the_guests_power_off(lab: LabHost, define: Define) -> None:
    guest = define()
    guest.start()
    guest.claim(owner_of(guest, 5))
    lab.libvirtd_kill9()
    lab.libvirtd_start()
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        again = host.guest(guest.uuid)
        assert again.power() is PowerState.RUNNING
        assert again.owner() == owner_of(guest, 5)
        again.destroy()
        assert again.owner() == owner_of(guest, 5)


def test_a_stale_owner_neither_claims_nor_redefines(lab: LabHost, host: Host, define: Define) -> None:
    wanted = config(lab)
    guest = define(**dict(wanted))
    guest.claim(owner_of(guest, 5))
    with pytest.raises(errors.FenceTooLow) as caught:
        guest.claim(owner_of(guest, 4))
    assert caught.value.details["current_operation"] == "op-5"
    with pytest.raises(errors.FenceTooLow):
        host.define(wanted)
    assert guest.owner() == owner_of(guest, 5)


def test_defining_again_changes_the_guest_and_keeps_its_identity(lab: LabHost, host: Host, define: Define) -> None:
    wanted = config(lab).model_copy(update={"networks": ("bridge:br-none",)})
    guest = define(**dict(wanted))
    before = guest.xml(inactive=True)
    host.define(wanted.model_copy(update={"vcpus": 2, "memory_mib": 128}))
    after = guest.xml(inactive=True)
    assert "<vcpu placement='static'>2</vcpu>" in after
    assert address_line(after) == address_line(before)
    host.define_xml(before)
    # libvirt reorders the controllers
    assert sorted(guest.xml(inactive=True).splitlines()) == sorted(before.splitlines())


def address_line(xml: str) -> str:
    return next(line for line in xml.splitlines() if "<mac address" in line)


def test_a_name_that_another_guest_has_is_refused(lab: LabHost, host: Host, define: Define) -> None:
    guest = define()
    with pytest.raises(errors.InstanceExists, match=guest.name):
        host.define(config(lab).model_copy(update={"name": guest.name}))


def test_a_guest_that_cannot_start_says_why_and_stays_off(define: Define) -> None:
    guest = define()
    guest.disk_paths()["vda"].unlink()
    with pytest.raises(errors.DomainRejected, match=r"No such file or directory"):
        guest.start()
    assert guest.power() is PowerState.OFF


def test_a_shared_base_image_is_used_but_never_given_to_qemus_user(lab: LabHost, define: Define) -> None:
    base = lab.images / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "64M"], check=True)
    base.chmod(0o444)
    before = base.stat()
    guest = define(backing=base)
    guest.start()
    after = base.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert guest.disk_paths()["vda"].stat().st_size > 0


def test_a_guest_without_an_agent_is_found_out_within_the_bound(define: Define) -> None:
    guest = define()
    guest.start()
    began = time.monotonic()
    assert not guest.agent_answers(2)
    assert time.monotonic() - began < 3


def test_a_real_guest_answers_by_agent_and_powers_off_when_asked(lab: LabHost, define: Define) -> None:
    image = lab.images / "guest.qcow2"
    image.write_bytes(guest_image().read_bytes())
    guest = define(backing=image)
    guest.start()
    wait_until(lambda: guest.agent_answers(2), 120, "the guest's agent answers", lab.data / f"{guest.name}.log")

    guest.reboot(agent=True)
    wait_until(lambda: not guest.agent_answers(2), 60, "the guest goes down to boot again")
    wait_until(lambda: guest.agent_answers(2), 120, "the guest is up again", lab.data / f"{guest.name}.log")

    os.kill(lab.qemu_pid(guest.name), signal.SIGSTOP)
    began = time.monotonic()
    assert not guest.agent_answers(2)
    assert time.monotonic() - began < 6
    os.kill(lab.qemu_pid(guest.name), signal.SIGCONT)

    wait_until(lambda: guest.agent_answers(2), 60, "the guest's agent answers after the pause")
    guest.shutdown()
    wait_until(lambda: guest.power() is PowerState.OFF, 60, "the guest powers off by ACPI")


def test_the_cpu_of_a_guest_that_is_off_is_what_this_host_would_give_it(host: Host, define: Define) -> None:
    guest = define()
    modelled = guest.xml(inactive=True).replace("mode='maximum'", "mode='host-model'")
    assert modelled != guest.xml(inactive=True)
    host.define_xml(modelled, name=guest.name)
    pinned = cpu_of(host.pinned_xml(guest))
    guest.start()
    given = cpu_of(guest.xml())
    assert pinned.findtext("model") == given.findtext("model")
    assert (pinned.get("mode"), len(pinned.findall("topology"))) == ("custom", 1)
    assert features(pinned) <= features(given)
    guest.destroy()
    host.define_xml(host.pinned_xml(guest), name=guest.name)
    guest.start()
    assert cpu_of(guest.xml()).findtext("model") == given.findtext("model")


def cpu_of(xml: str) -> Any:
    return parse(xml).find("cpu")


def features(cpu: Any) -> set[tuple[str, str]]:
    return {(feature.get("policy"), feature.get("name")) for feature in cpu.iterfind("feature")}
