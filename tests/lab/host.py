"""A KVM host of the lab: a libvirtd of its own with its guests, apart from the machine's and each other's.

As root, a host is a set of namespaces with private /run, /etc/libvirt and /var/lib/libvirt: qemu:///system.
As an ordinary user, it is a session daemon with private XDG folders: qemu:///session.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.lab.network import Cable, Keys
from tests.lab.pki import Authority
from tests.lab.process import Keeper, LabError, Process, kill9, tail, wait_until

MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of its own is made there
"""Where /run of a host lies: on a tmpfs, as on every real one. libvirt syncs each change of a guest's state there."""

SOCKET_PATH_BYTES = 107  # sun_path holds 108, one of them NUL: unix(7)
# Under XDG_CONFIG_HOME, the longest path that a session libvirtd listens on.
LONGEST_SOCKET = f"libvirt/qemu/channel/target/domain-99-{'x' * 20}/org.qemu.guest_agent.0"

NAMESPACES = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
KVM = "/dev/kvm"
NBD_SERVER = "qemu-storage-daemon"
PRIVATE_FOLDERS = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}


class LabHost:
    """A host with its files in `folder`/`name`; a context manager that brings it up and down.

    `uri` is its libvirt from this process; `env` is what a fleet worker needs to serve it. With `networked` (root
    only) it is at the end of a `cable` of its own, where its sshd lets in the workers of the other hosts.
    """

    def __init__(self, name: str, folder: Path, *, networked: bool = False) -> None:
        self.name = name
        self.folder = folder / name
        self.data = self.folder / "data"
        self.images = self.folder / "images"
        self._as_root = os.geteuid() == 0
        self._socket = self.folder / "run" / "libvirt" / "libvirt-sock"
        self._uuid = uuid.uuid4()
        self.cable = Cable() if networked else None
        self._keys = Keys(folder / "ssh")
        self._authority = Authority(folder / "authority")
        self.pki = self.folder / "pki"
        self._keeper: Keeper | None = None
        self._libvirtd: Process | None = None
        excess = len(str(self.folder / LONGEST_SOCKET)) - SOCKET_PATH_BYTES
        if excess > 0 and not self._as_root:
            raise LabError(f"the path {self.folder} is {excess} bytes too long for libvirt's sockets")

    @property
    def uri(self) -> str:
        return f"qemu+unix:///{'system' if self._as_root else 'session'}?socket={self._socket}"

    @property
    def env(self) -> dict[str, str]:
        """Environment of a worker next to this host."""
        return {
            "VIRTFLEET_LIBVIRT_URI": self.uri,
            "VIRTFLEET_DATA_DIR": str(self.data),
            "VIRTFLEET_IMAGE_ROOTS": json.dumps([str(self.images)]),
            # A nested KVM can be opened and still hang guests; TCG runs the same on every machine.
            "VIRTFLEET_ACCEL": "qemu",
            **self._network_env(),
        }

    def _network_env(self) -> dict[str, str]:
        if not self.cable:
            return {}
        return {
            "VIRTFLEET_ADDRESS": self.cable.address,
            "VIRTFLEET_SSH_KEY": str(self._keys.key),
            "VIRTFLEET_SSH_KNOWN_HOSTS": str(self._keys.known_hosts),
            "VIRTFLEET_NBD_TLS_DIR": str(self.pki),
            "PATH": f"{self._programs}:{os.environ['PATH']}",
        }

    @property
    def _programs(self) -> Path:
        """Programs that its worker, which is on this machine's network, must start on the host's."""
        return self.folder / "bin"

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Start it, also after `crash()`, and wait until libvirtd answers. If that fails, nothing runs."""
        if self._keeper:
            raise LabError(f"host {self.name} is up already")
        try:
            self._boot()
        except BaseException:
            self.crash()
            raise

    def crash(self) -> None:
        """Power loss: libvirtd, guests and all else on the host end at once; its files stay."""
        if self._keeper:
            self._keeper.end()
        self._keeper = self._libvirtd = None

    def down(self) -> None:
        """End the host and remove its files."""
        self.crash()
        self._forget_run()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def libvirtd_kill9(self) -> None:
        """SIGKILL libvirtd; the guests run on."""
        self._daemon.kill9()

    def libvirtd_stop(self) -> None:
        """SIGTERM libvirtd; the guests run on."""
        self._daemon.stop(timeout=30)

    def libvirtd_start(self) -> None:
        """Start libvirtd and wait until it answers."""
        self._daemon.start()
        wait_until(self._answers_or_ended, 60, f"libvirtd of {self.name} answers", self._daemon.log)
        self._daemon.require_alive()

    def libvirtd_restart(self) -> None:
        self.libvirtd_stop()
        self.libvirtd_start()

    @contextmanager
    def libvirtd_frozen(self) -> Iterator[None]:
        """libvirtd accepts connections in the `with` block, but answers nothing; the guests run on."""
        with self._daemon.frozen():
            yield

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """Guests with 4 GiB of memory or more cannot be started in the `with` block: QEMU ends as it asks for it."""
        pid = self._daemon.pid
        _, hard = before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (4 << 30, hard))  # QEMU inherits it
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_AS, before)

    def lose_sight_of_backup(self, domain: str) -> None:
        """Bring libvirtd to where 9.0 is after it was killed within some 50 ms of being asked for a guest's backup: it
        holds the guest in that job, and knows nothing of the backup. Only as root."""
        self.libvirtd_stop()
        status = self.folder / "run" / "libvirt" / "qemu" / f"{domain}.xml"
        job = f"  <job type='none' async='backup' flags='0x0' asyncStarted='{time.time_ns() // 10**6}'/>"
        status.write_text(re.sub("(<domstatus .*\n)", rf"\1{job}\n", status.read_text()))
        self.libvirtd_start()

    def follow(self, remedy: str) -> None:
        """Do what a remedy says: run its command here, which ends with a new start of libvirtd. Only as root."""
        command, restarts, _ = remedy.partition(": ")[2].partition(" && systemctl restart libvirtd")
        if not restarts:
            raise LabError(f"not a remedy that the lab can follow: {remedy}")
        command = command.replace(" /run/libvirt/", f" {self.folder / 'run' / 'libvirt'}/")
        subprocess.run(["sh", "-euc", command], check=True)
        self.libvirtd_restart()

    def processes(self) -> list[int]:
        """Pids of all that runs on the host, as seen by this process."""
        return self._keeper.processes() if self._keeper else []

    def qemu_pid(self, domain: str) -> int:
        """Pid of a running guest's QEMU, as seen by this process; raises LabError if it does not run."""
        pid = self.find_qemu(domain)
        if pid is None:
            raise LabError(f"no QEMU of a guest {domain} runs on {self.name}\n{self.log_tail()}")
        return pid

    def find_qemu(self, domain: str) -> int | None:
        """Pid of a guest's QEMU, as seen by this process, if it runs."""
        option = f"guest={domain.replace(',', ',,')},"
        for pid in self.processes():
            if any(word.startswith(option) for word in _command_line(pid)):
                return pid
        return None

    def kill_guest(self, domain: str) -> None:
        """SIGKILL a guest's QEMU: the guest crashes."""
        kill9(self.qemu_pid(domain))

    def log_tail(self, lines: int = 20) -> str:
        """The end of libvirtd's log, for error messages."""
        return tail(self.folder / "libvirtd.log", lines)

    @property
    def _daemon(self) -> Process:
        if not self._libvirtd:
            raise LabError(f"host {self.name} is not up")
        return self._libvirtd

    def _boot(self) -> None:
        self._make_folders()
        self._write_libvirtd_settings()
        env: dict[str, str] = {}
        prefix: list[str] = []
        if self._as_root:
            self._write_system_files()
            network = ["--net"] if self.cable else []
            prefix = [NAMESPACES[0], *network, *NAMESPACES[1:], "sh", "-euc", self._boot_script(), "sh"]
        else:
            env = self._session_environment()
        self._keeper = Keeper(self.folder / "keeper.log", prefix)
        logd = Process(self._keeper, ["virtlogd"], self.folder / "virtlogd.log", env)
        try:
            logd.start()
        except LabError as error:
            hint = "It needs libvirt's daemons and, as root, CAP_SYS_ADMIN (docker run --privileged)."
            raise LabError(f"host {self.name} does not boot: {error}\n{hint}") from None
        logd_socket = self._socket.with_name("virtlogd-sock")
        wait_until(logd_socket.exists, 30, f"virtlogd of {self.name} listens", logd.log)
        if self.cable:
            self._connect(self.cable, self._keeper, logd.pid)
        self._libvirtd = Process(self._keeper, ["libvirtd"], self.folder / "libvirtd.log", env)
        self.libvirtd_start()

    def _connect(self, cable: Cable, keeper: Keeper, pid: int) -> None:
        cable.connect(pid)
        self._authority.issue(self.name, cable.address, self.pki)
        self._programs.mkdir(exist_ok=True)
        server = self._programs / NBD_SERVER
        server.write_text(f'#!/bin/sh\nexec nsenter -t {pid} -n -- {shutil.which(NBD_SERVER)} "$@"\n')
        server.chmod(0o755)
        config = self.folder / "sshd_config"
        self._keys.write_sshd_config(config, self.name, cable.address)
        (self.folder / "run" / "sshd").mkdir()
        sshd = Process(keeper, ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], self.folder / "sshd.log", {})
        sshd.start()
        probe = (cable.address, 22)
        wait_until(lambda: _listens(*probe) or not sshd.alive, 15, f"sshd of {self.name} listens", sshd.log)
        sshd.require_alive()

    def _make_folders(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_run()  # as at any boot
        (self.folder / "run").symlink_to(tempfile.mkdtemp(prefix="vf-", dir=MEMORY))
        for folder in (self.folder, self.data, self.images, *(self.folder / name for name in PRIVATE_FOLDERS)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)  # whatever the umask: QEMU runs as another user
        (self.folder / "run" / "lock").mkdir()  # /var/lock leads there, and virsh console needs it
        if not self._as_root:
            (self.folder / "run").chmod(0o700)  # XDG Base Directory Specification

    def _forget_run(self) -> None:
        run = self.folder / "run"
        if run.is_symlink():
            shutil.rmtree(run.readlink(), ignore_errors=True)
            run.unlink()

    def _session_environment(self) -> dict[str, str]:
        """Puts libvirt's folders below the host's; XDG_CONFIG_HOME holds sockets, hence its short path."""
        return {
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_CONFIG_HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_DATA_HOME": str(self.folder / "lib"),
        }

    def _write_libvirtd_settings(self) -> None:
        _write_settings(
            self.folder / ("etc" if self._as_root else "libvirt") / "libvirtd.conf",
            # Two hosts with one uuid refuse migration: "to the same host".
            host_uuid=str(self._uuid),
            # No polkit here; the socket is its owner's alone, since whoever can use it is its owner.
            auth_unix_rw="none",
            unix_sock_rw_perms="0700",
        )

    def _write_system_files(self) -> None:
        user = _qemu_user()
        _write_settings(
            self.folder / "etc" / "qemu.conf",
            user=user.pw_name,
            group=str(user.pw_gid),
            security_driver="none",
            cgroup_controllers=[],  # they are the machine's
            remember_owner=0,
            **({"default_tls_x509_cert_dir": str(self.pki)} if self.cable else {}),
            namespaces=[],  # they cannot carry the file mounted over /dev/kvm
        )
        # libvirtd resolves its own name whenever it starts a guest: 10 s where DNS is missing.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {self.name}\n::1 localhost\n")
        (self.folder / "no-kvm").touch()

    def _boot_script(self) -> str:
        """Runs first in the namespaces, where mounts are private; it becomes what its arguments name."""
        script = [f"hostname {shlex.quote(self.name)}", self._bind("hosts", "/etc/hosts")]
        # Where root can open /dev/kvm and the QEMU user cannot, libvirt probes QEMU at every lookup: 12 s for
        # a define. A read-only file is closed to both: the host has no KVM at all.
        script += [f"if [ -e {KVM} ]; then {self._bind('no-kvm', KVM)}; mount -o remount,bind,ro {KVM}; fi"]
        for source, target in PRIVATE_FOLDERS.items():
            script += [f"mkdir -p {target}", self._bind(source, target)]
        return "\n".join([*script, 'exec "$@"'])

    def _bind(self, source: str, target: str) -> str:
        return f"mount --bind {shlex.quote(str(self.folder / source))} {target}"

    def _answers_or_ended(self) -> bool:
        return not self._daemon.alive or (self._socket.exists() and self._answers())

    def _answers(self) -> bool:
        # Another process, because virConnectOpen has no timeout.
        asking = ["virsh", "--quiet", "--connect", self.uri, "list"]
        try:
            return subprocess.run(asking, check=False, capture_output=True, timeout=10).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _qemu_user() -> pwd.struct_passwd:
    """The user that the distribution's packages made for QEMU."""
    for name in ("libvirt-qemu", "qemu"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LabError("there is no user libvirt-qemu or qemu: install the distribution's libvirt daemon")


def _write_settings(path: Path, **settings: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
