"""Host and Guest on libvirt's test driver: a hypervisor inside this process, its domains as far as it knows them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from worker import errors
from worker.models import Owner, PowerState
from worker.virt import agent
from worker.virt.guest import Guest
from worker.virt.host import Host

# Each test has a hypervisor of its own, which test:///default would not be.
NODE = """<node>
  <domain type="test">
    <name>test</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
    <memory>8192</memory><vcpu>1</vcpu><os><type>hvm</type></os>
  </domain>
  <network><name>default</name><bridge name="virbr0"/><ip address="192.0.2.1" netmask="255.255.255.0"/></network>
  <interface type="ethernet" name="eth1"><start mode="onboot"/></interface>
</node>"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    node = tmp_path / "node.xml"
    node.write_text(NODE)
    return f"test://{node}"


@pytest.fixture
def host(uri: str) -> Iterator[Host]:
    with Host.open(uri, name="kvm1", timeout=5) as host:
        yield host


@pytest.fixture
def guest(host: Host) -> Guest:
    """The domain that the test driver brings along; it runs."""
    found = host.find("test")
    assert found is not None
    return found


def owner_of(guest: Guest, fence: int) -> Owner:
    return Owner(name=guest.name, uuid=guest.uuid, operation=f"op-{fence}", fence=fence)


def test_a_guest_is_found_by_uuid_and_by_name(host: Host, guest: Guest) -> None:
    assert host.guest(guest.uuid).name == host.guest(str(guest.uuid)).name == "test"
    assert [found.uuid for found in host.guests()] == [guest.uuid]


def test_an_unknown_guest_is_none_to_find_and_an_error_to_get(host: Host) -> None:
    assert host.find("nobody") is None
    assert host.find_uuid(uuid4()) is None
    with pytest.raises(errors.InstanceNotFound, match="on host kvm1"):
        host.guest(uuid4())


def test_power_verbs_reach_their_goal_however_often_they_are_repeated(guest: Guest) -> None:
    verbs = [
        (guest.start, PowerState.RUNNING),
        (guest.pause, PowerState.PAUSED),
        (guest.resume, PowerState.RUNNING),
        (guest.destroy, PowerState.OFF),
        (guest.shutdown, PowerState.OFF),
        (guest.start, PowerState.RUNNING),
    ]
    for verb, goal in verbs:
        verb()
        verb()
        assert guest.power() is goal


def test_a_running_guest_is_not_undefined(guest: Guest) -> None:
    with pytest.raises(errors.InvalidState, match="running"):
        guest.undefine()
    assert guest.is_persistent()


def test_a_guest_that_is_gone_stays_gone(host: Host, guest: Guest) -> None:
    guest.destroy()
    for _ in range(2):
        guest.undefine()
        guest.destroy()
        assert guest.power() is PowerState.MISSING
        assert not guest.is_active()
    assert host.guests() == []


def test_a_claim_is_read_back_and_a_stale_owner_is_fenced_off(guest: Guest) -> None:
    assert guest.owner() is None
    guest.claim(owner_of(guest, 5))
    guest.claim(owner_of(guest, 5))
    with pytest.raises(errors.FenceTooLow) as caught:
        guest.claim(owner_of(guest, 4))
    assert caught.value.details["current_operation"] == "op-5"
    assert guest.owner() == owner_of(guest, 5)
    guest.claim(owner_of(guest, 6))
    guest.destroy()
    assert guest.owner() == owner_of(guest, 6)


def test_autostart_is_kept(guest: Guest) -> None:
    for enabled in (True, False):
        guest.set_autostart(enabled=enabled)
        assert guest.autostart() is enabled


def test_an_old_definition_can_be_put_back(host: Host, guest: Guest) -> None:
    guest.claim(owner_of(guest, 1))
    before = guest.xml(inactive=True)
    guest.destroy()
    guest.undefine()
    restored = host.define_xml(before)
    assert restored.uuid == guest.uuid
    assert restored.owner() == owner_of(guest, 1)


def test_a_network_is_refused_naming_those_that_exist(host: Host) -> None:
    host.check_network("none")
    host.check_network("network:default")
    with pytest.raises(errors.NetworkNotFound, match="default"):
        host.check_network("network:nosuch")
    with pytest.raises(errors.NetworkNotFound, match="eth1"):
        host.check_network("bridge:nosuch")


def test_a_hypervisor_without_a_capability_says_so(host: Host) -> None:
    with pytest.raises(errors.UnsupportedByHost, match="kvm1"):
        host.domain_capabilities("kvm")


def test_the_host_tells_its_name_and_version(host: Host) -> None:
    assert host.libvirt_version
    assert host.hostname
    assert host.libvirt_version > (7, 0, 0)


@pytest.mark.parametrize("wrong", ["nosuch", "qemu+nosuch:///system", "qemu+tls://127.0.0.1/system?pkipath=/nosuch"])
def test_a_wrong_uri_is_refused_at_once_and_nothing_is_printed(wrong: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.ConnectionMisconfigured, match=re.escape(wrong)):
        Host.open(wrong, name="kvm1", timeout=5).__enter__()
    assert capfd.readouterr().err == ""


def test_an_absent_libvirtd_is_retried_within_the_bound(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(errors.HostUnreachable, match="No such file"):
        Host.open(f"qemu+unix:///system?socket={tmp_path}/none", name="kvm1", timeout=2).__enter__()
    assert time.monotonic() - began < 2.5


def test_hosts_open_in_many_threads_at_once(uri: str) -> None:
    names: list[str] = []

    def ask() -> None:
        with Host.open(uri, name="kvm1", timeout=5) as host:
            names.append(host.hostname)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 16


FORK = """
import os, sys, time
from worker.virt.host import Host

def ask():
    with Host.open(sys.argv[1], name="kvm1", timeout=5) as host:
        return bool(host.hostname)

ask()
time.sleep(0.5)  # the event loop rests: what it holds at a fork, it would hold in the child for ever
child = os.fork()
os._exit(0 if (ask() if child == 0 else os.waitpid(child, 0)[1] == 0) else 1)
"""


def test_a_forked_child_opens_its_own(uri: str) -> None:
    """A pool's child inherits neither the parent's event loop nor its connections."""
    # In a process of its own: other tests' threads are at work in this one.
    done = subprocess.run([sys.executable, "-c", FORK, uri], check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "answer", ['{"return": []}', '{"return": {}}', '{"return": "linux"}', "[]", "not JSON", "null"]
)
def test_an_agent_that_answers_oddly_is_there_but_tells_no_system(
    host: Host, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    # No real agent answers so; whatever runs in the guest may.
    monkeypatch.setattr("libvirt_qemu.qemuAgentCommand", lambda *_: answer)
    assert agent.system_of(host.guests()[0], 1) == ""
