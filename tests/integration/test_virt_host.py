"""Hosts through a real libvirtd: opening and calls end in time, and what is missing is refused beforehand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.host import LabHost
from tests.lab.process import lab_folder, wait_until
from worker import errors
from worker.models import PowerState
from worker.virt import kvm_probe
from worker.virt.connection import KEEPALIVE_COUNT, KEEPALIVE_SECONDS
from worker.virt.host import Host
from worker.virt.kvm_probe import kvm_works


@pytest.fixture(scope="module")
def lab() -> Iterator[LabHost]:
    with lab_folder() as folder, LabHost("virtb", folder) as lab:
        yield lab


@pytest.fixture
def host(lab: LabHost) -> Iterator[Host]:
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        yield host


def sockets() -> int:
    """How many sockets this process has open."""
    return sum(is_socket(fd) for fd in Path("/proc/self/fd").iterdir())


def settled_sockets() -> int:
    """How many it keeps open: libvirt closes those of a closed connection a moment later."""
    counts = [sockets()]
    while counts[-10:] != [counts[-1]] * 10:
        time.sleep(0.05)
        counts.append(sockets())
    return counts[-1]


def is_socket(fd: Path) -> bool:
    try:
        return fd.is_socket()
    except OSError:  # closed in the meantime
        return False


def test_a_frozen_libvirtd_is_given_up_in_time_and_its_late_connection_closed(lab: LabHost) -> None:
    before = settled_sockets()
    with lab.libvirtd_frozen():
        began = time.monotonic()
        with pytest.raises(errors.HostUnreachable, match="no answer within"):
            Host.open(lab.uri, name=lab.name, timeout=1.5).__enter__()
        assert 1.4 < time.monotonic() - began < 2.5
    wait_until(lambda: not opening_threads(), 20, "the late attempt to open ends")
    assert settled_sockets() <= before
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        assert host.libvirt_version


def opening_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("open ")]


def test_a_call_into_a_frozen_libvirtd_ends(lab: LabHost) -> None:
    with Host.open(lab.uri, name=lab.name, timeout=10) as host, lab.libvirtd_frozen():
        began = time.monotonic()
        with pytest.raises(errors.HostUnreachable):
            host.guests()
        assert time.monotonic() - began < KEEPALIVE_SECONDS * (KEEPALIVE_COUNT + 1) + 3


def test_a_libvirtd_that_starts_late_is_waited_for(lab: LabHost) -> None:
    lab.libvirtd_stop()
    with pytest.raises(errors.HostUnreachable), Host.open(lab.uri, name=lab.name, timeout=0.5):
        pass
    starting = threading.Timer(0.2, lab.libvirtd_start)
    starting.start()
    try:
        wait_until(lambda: opens(lab), 30, "the host is reached once its libvirtd runs")
    finally:
        starting.join()


def opens(lab: LabHost) -> bool:
    try:
        with Host.open(lab.uri, name=lab.name, timeout=5) as host:
            assert host.libvirt_version
    except errors.HostUnreachable:
        return False
    return True


def test_a_restarted_libvirtd_breaks_the_connection_retryably_and_a_new_one_serves(lab: LabHost) -> None:
    with Host.open(lab.uri, name=lab.name, timeout=10) as host:
        lab.libvirtd_restart()
        for _ in range(2):
            with pytest.raises(errors.HostUnreachable):
                assert host.libvirt_version
    assert opens(lab)


def test_a_missing_network_or_bridge_is_refused_naming_what_there_is(host: Host) -> None:
    host.check_network("none")
    with pytest.raises(errors.NetworkNotFound, match="no network 'nosuch'"):
        host.check_network("network:nosuch")
    with pytest.raises(errors.NetworkNotFound, match="no bridge 'nosuch'") as caught:
        host.check_network("bridge:nosuch")
    there_are = {one.name: (one / "bridge").is_dir() for one in Path("/sys/class/net").iterdir()}
    assert caught.value.details["allowed"] == sorted(name for name, is_bridge in there_are.items() if is_bridge)
    no_bridge = next(name for name, is_bridge in there_are.items() if not is_bridge)
    with pytest.raises(errors.NetworkNotFound, match="no bridge"):
        host.check_network(f"bridge:{no_bridge}")


def test_an_inactive_network_is_refused_until_it_is_started(host: Host) -> None:
    network = host.connection.networkDefineXML("<network><name>idle</name></network>")
    try:
        with pytest.raises(errors.NetworkNotFound, match="no active network") as caught:
            host.check_network("network:idle")
        assert "net-start idle" in caught.value.hint
    finally:
        network.undefine()


def test_what_the_host_can_do_is_told(host: Host) -> None:
    capabilities = host.domain_capabilities("qemu")
    assert capabilities.emulator.exists()
    assert capabilities.machine.startswith("pc-q35-")
    assert capabilities.max_vcpus > 1
    assert host.libvirt_version >= (7, 2, 0)
    assert host.hostname


def test_kvm_is_refused_on_a_host_without_it(host: Host, lab: LabHost) -> None:
    with pytest.raises(errors.UnsupportedByHost, match="kvm"):
        host.domain_capabilities("kvm")
    probe = kvm_works(host, lab.data)
    assert not probe.works
    assert probe.reason
    assert_nothing_is_left(host, lab)


def test_the_probe_is_convinced_by_a_guest_that_boots(host: Host, lab: LabHost) -> None:
    probe = kvm_works(host, lab.data, timeout=30, accel="qemu")
    assert probe.works, probe.reason
    assert_nothing_is_left(host, lab)


def test_the_probe_gives_up_on_a_guest_that_hangs(host: Host, lab: LabHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_probe, "BOOT_SECTOR", bytes.fromhex("ebfe").ljust(510, b"\0") + b"\x55\xaa")
    probe = kvm_works(host, lab.data, timeout=1, accel="qemu")
    assert not probe.works
    assert "within 1 s" in probe.reason
    assert probe.seconds < 10
    assert_nothing_is_left(host, lab)


def test_the_probe_is_not_convinced_by_a_qemu_that_dies(host: Host, lab: LabHost) -> None:
    """A hypervisor that crashes is gone as well as one whose guest powered off."""
    killer = threading.Thread(target=kill_the_probe, args=(host, lab))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvm_probe, "BOOT_SECTOR", bytes.fromhex("ebfe").ljust(510, b"\0") + b"\x55\xaa")
        killer.start()
        probe = kvm_works(host, lab.data, timeout=20, accel="qemu")
    killer.join()
    assert not probe.works
    assert "ended" in probe.reason
    assert_nothing_is_left(host, lab)


def kill_the_probe(host: Host, lab: LabHost) -> None:
    wait_until(lambda: running(host), 20, "the probe's guest runs")
    [guest] = host.guests()
    lab.kill_guest(guest.name)


def running(host: Host) -> bool:
    return any(guest.power() is PowerState.RUNNING for guest in host.guests())


def assert_nothing_is_left(host: Host, lab: LabHost) -> None:
    assert host.guests() == []
    assert list(lab.data.iterdir()) == []
