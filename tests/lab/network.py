"""The network of a lab host: a cable from this machine to it that can be cut, and an sshd at its other end."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

# For tests of networks (RFC 2544): nobody's addresses.
NETWORK = IPv4Network("198.18.0.0/15")
_keys = threading.Lock()


class Cable:
    """A veth pair from this network namespace to that of a process; it goes with the other namespace."""

    def __init__(self) -> None:
        self.name = f"vf{random.randrange(16**8):08x}"
        first = int(NETWORK.network_address) + 4 * random.randrange(NETWORK.num_addresses // 4)
        self.near, self.address = str(IPv4Address(first + 1)), str(IPv4Address(first + 2))

    def connect(self, pid: int) -> None:
        """Lay the cable to the namespace of process `pid`."""
        inside = ["nsenter", "-t", str(pid), "-n"]
        run("ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        run("ip", "addr", "add", f"{self.near}/30", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        run(*inside, "ip", "addr", "add", f"{self.address}/30", "dev", "eth0")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "link", "set", "eth0", "up")

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        run("ip", "link", "set", self.name, "down")

    def plug(self) -> None:
        """Connections that waited go on."""
        run("ip", "link", "set", self.name, "up")

    def received(self) -> int:
        """Bytes that have come from the host."""
        answer = json.loads(run("ip", "-json", "-stats", "link", "show", self.name))
        return int(answer[0]["stats64"]["rx"]["bytes"])


class Keys:
    """The ssh keys of a lab: one that all its workers have, and of each host the one it is known by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "id"
        self.known_hosts = folder / "known_hosts"

    def host_key(self, name: str, address: str) -> Path:
        """The key of a host, known to all from now on."""
        with _keys:
            self.folder.mkdir(exist_ok=True)
            for key in (self.key, mine := self.folder / name):
                if not key.exists():
                    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
            public = mine.with_suffix(".pub").read_text().split()
            with self.known_hosts.open("a") as file:
                file.write(f"{address} {public[0]} {public[1]}\n")
        return mine

    def write_sshd_config(self, path: Path, name: str, address: str) -> None:
        """Configure an sshd that lets in who has the lab's key."""
        host_key = self.host_key(name, address)
        settings = {
            "ListenAddress": address,
            "HostKey": str(host_key),
            "AuthorizedKeysFile": str(self.key.with_suffix(".pub")),
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "StrictModes": "no",  # the lab's folder is below /tmp
            "UsePAM": "no",
            "PidFile": "none",
        }
        path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout
