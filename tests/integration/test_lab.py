"""The lab keeps its promises: hosts are real, apart from each other and the machine, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import libvirt
import pytest
from redis import TimeoutError as RedisTimeout

from tests.lab import LabError, LabHost, Redis, lab_folder, wait_until
from tests.lab.process import REPOSITORY, running

MACHINE_FOLDERS = [Path("/run/libvirt"), Path("/etc/libvirt"), Path("/var/lib/libvirt")]

# Root tries what an ordinary user gets, too. Of root's rights only reading is left to it, as the checkout and
# the Python that runs the tests may well be below /root.
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]
USERS = [pytest.param([], id="this-user")]
USERS += [pytest.param(AS_NOBODY, id="ordinary-user")] if os.geteuid() == 0 else []


@pytest.fixture
def folder() -> Iterator[Path]:
    with lab_folder() as path:
        yield path


@contextmanager
def connected(host: LabHost) -> Iterator[libvirt.virConnect]:
    with closing(libvirt.open(host.uri)) as connection:
        yield connection


def start_guest(host: LabHost, name: str) -> int:
    """Define and start, paused, a guest with a blank disk; returns the pid of its QEMU."""
    disk = host.data / f"{name}.raw"
    disk.touch()
    os.truncate(disk, 1024**2)
    with connected(host) as connection:
        domain = connection.defineXML(
            f"""
            <domain type='qemu'>
              <name>{name}</name>
              <uuid>{uuid.uuid4()}</uuid>
              <memory unit='MiB'>32</memory>
              <os><type arch='x86_64' machine='q35'>hvm</type></os>
              <devices>
                <disk type='file' device='disk'>
                  <driver name='qemu' type='raw'/>
                  <source file='{disk}'/>
                  <target dev='vda' bus='virtio'/>
                </disk>
                <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
                <serial type='pty'><log file='{host.data}/{name}.log' append='on'/></serial>
              </devices>
            </domain>
            """
        )
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    return host.qemu_pid(name)


def running_guests(host: LabHost) -> list[str]:
    with connected(host) as connection:
        active = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return sorted(domain.name() for domain in active)


def machine_state() -> set[Path]:
    """The files of the machine's own libvirt, and the lab mounts that other processes can see."""
    mounts = {Path(line) for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/vf-" in line}
    return mounts.union(*(set(folder.rglob("*")) for folder in MACHINE_FOLDERS))


def python_as(user: list[str], function: Callable[[Path], None], folder: Path) -> list[str]:
    """The command by which a user calls a function of this module with a folder."""
    folder.chmod(0o777)
    script = f"from pathlib import Path; import {__name__} as t; t.{function.__name__}(Path({str(folder)!r}))"
    return [*user, sys.executable, "-B", "-c", script]


def survive_libvirtd(folder: Path) -> None:
    with LabHost("hosta", folder) as host:
        qemu = start_guest(host, "guest")
        host.libvirtd_kill9()
        with pytest.raises(libvirt.libvirtError), connected(host):
            pass
        host.libvirtd_start()
        assert running_guests(host) == ["guest"]
        host.libvirtd_restart()
        assert running_guests(host) == ["guest"]
        assert host.qemu_pid("guest") == qemu


@pytest.mark.parametrize("user", USERS)
def test_a_guest_survives_kill_9_and_restart_of_libvirtd(user: list[str], folder: Path) -> None:
    command = python_as(user, survive_libvirtd, folder)
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_hosts_see_their_own_guests_only_and_leave_the_machine_alone(folder: Path) -> None:
    before = machine_state()
    with LabHost("hosta", folder) as a, LabHost("hostb", folder) as b:
        start_guest(a, "same-name")
        start_guest(b, "same-name")
        start_guest(b, "another")
        assert running_guests(a) == ["same-name"]
        assert running_guests(b) == ["another", "same-name"]
        assert a.qemu_pid("same-name") != b.qemu_pid("same-name")
        assert machine_state() == before
        processes = a.processes() + b.processes()
        assert len(processes) >= 7  # two of each libvirtd and virtlogd, three of QEMU
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists()] == []
    assert list(folder.iterdir()) == []
    assert machine_state() == before


def test_a_killed_guest_is_shut_off_and_a_missing_one_is_an_error(folder: Path) -> None:
    with LabHost("hosta", folder) as host:
        start_guest(host, "guest")
        host.kill_guest("guest")
        wait_until(lambda: not running_guests(host), 10, "libvirt notices that the guest has crashed")
        with pytest.raises(LabError, match="no QEMU of a guest guest runs on hosta"):
            host.qemu_pid("guest")


def test_a_frozen_libvirtd_accepts_connections_and_answers_nothing(folder: Path) -> None:
    with LabHost("hosta", folder) as host:
        command = ["virsh", "--connect", host.uri, "list"]
        with host.libvirtd_frozen(), pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, check=False, capture_output=True, timeout=1)
        assert subprocess.run(command, check=True, capture_output=True, timeout=30).returncode == 0


def test_a_crashed_host_boots_with_its_guests_defined_and_shut_off(folder: Path) -> None:
    with LabHost("hosta", folder) as host:
        qemu = start_guest(host, "guest")
        with connected(host) as connection:
            identity = connection.getCapabilities().partition("<uuid>")[2].partition("</uuid>")[0]
        host.crash()
        assert not running(qemu)
        host.up()
        assert running_guests(host) == []
        with connected(host) as connection:
            assert connection.lookupByName("guest").state()[0] == libvirt.VIR_DOMAIN_SHUTOFF
            assert identity in connection.getCapabilities()


def test_workers_find_folders_that_qemu_can_reach(folder: Path) -> None:
    with LabHost("hosta", folder) as host:
        assert host.env["VIRTFLEET_LIBVIRT_URI"] == host.uri
        data = Path(host.env["VIRTFLEET_DATA_DIR"])
        assert all(path.stat().st_mode & 0o001 for path in (data, *data.parents))


def make_a_lab_and_wait(folder: Path) -> None:
    redis = Redis(folder / "redis")
    redis.start()
    host = LabHost("hosta", folder)
    host.up()
    start_guest(host, "guest")
    sys.stdout.write(" ".join(map(str, redis.processes() + host.processes())) + "\n")
    sys.stdout.flush()
    signal.pause()


@pytest.mark.parametrize("user", USERS)
def test_nothing_outlives_kill_9_of_the_process_that_made_the_lab(user: list[str], folder: Path) -> None:
    command = python_as(user, make_a_lab_and_wait, folder)
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout
            processes = [int(pid) for pid in owner.stdout.readline().split()]
        finally:
            owner.kill()
    assert len(processes) >= 4  # redis-server, virtlogd, libvirtd, QEMU
    wait_until(lambda: not any(map(running, processes)), 20, f"all of {processes} end")


def test_redis_keeps_its_data_and_port_over_restart_and_kill_9(folder: Path) -> None:
    with Redis(folder) as redis:
        url = redis.url
        with redis.client() as client:
            client.set("operation", "running")
        redis.restart()
        with redis.client() as client:
            assert client.get("operation") == "running"
            client.set("operation", "succeeded")
        redis.kill9()
        redis.start()
        with redis.client() as client:
            assert client.get("operation") == "succeeded"
            redis.flushall()
            assert client.get("operation") is None
        assert redis.url == url


def test_redis_refuses_rather_than_forgets(folder: Path) -> None:
    with Redis(folder) as redis, redis.client() as client:
        assert client.config_get("appendfsync", "maxmemory-policy") == {
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
        }


def test_a_paused_redis_answers_nothing_and_then_goes_on(folder: Path) -> None:
    with Redis(folder) as redis:
        with redis.paused(), redis.client(timeout=0.5) as client, pytest.raises(RedisTimeout):
            client.ping()
        with redis.client() as client:
            assert client.ping()
