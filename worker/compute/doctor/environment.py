"""What a host must be like for guests to start, and to start soon."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from worker.compute import accel
from worker.compute.local import LocalHost
from worker.findings import Severity, Suspect, suspect
from worker.images.command import Command, run
from worker.images.files import available_space, human_size
from worker.images.layout import DataDir
from worker.virt.host import Host

SLOW_NAME = 3.0
"""Seconds: a name is resolved in milliseconds, and given up after 10 by default (resolv.conf: timeout, attempts)."""

SLOW_LOOKUP = 0.2
"""Seconds: libvirt says what QEMU can do in 1 ms if it remembers, and in 1.8 s if it has to probe QEMU again. To define
a guest it looks that up several times: 12 s instead of 12 ms (measured on libvirt 9.0)."""

FEW_INODES = 1000

KVM = Path("/dev/kvm")


def files(local: LocalHost) -> Iterator[Suspect]:
    """The data directory: there, writable, with room in it."""
    root = local.data.root
    if not root.is_dir():
        yield suspect(
            Severity.INFO, "data_dir", "there is no data directory yet: the first worker makes it", where=root
        )
        return
    if not os.access(root, os.W_OK | os.X_OK):
        yield suspect(
            Severity.ERROR,
            "data_dir",
            f"the data directory cannot be written by this process (uid {os.geteuid()})",
            where=root,
            remedy=f"Give it to the user the workers run as: chown {os.geteuid()} {root}",
        )
        return
    yield suspect(Severity.OK, "data_dir", "the data directory is there and can be written", where=root)
    yield _space(root, local.settings.reserve_bytes)


def _space(root: Path, reserve: int) -> Suspect:
    available, inodes = available_space(root), os.statvfs(root)
    room = f"{human_size(available)} are available"
    remedy = "Free space: destroy instances that nobody needs, or enlarge the filesystem."
    if available < reserve:
        what = f"{room}, less than the reserve of {human_size(reserve)}: nothing can be spawned"
        return suspect(Severity.ERROR, "space", what, where=root, remedy=remedy)
    if available < 4 * reserve:
        what = f"{room}, not far from the reserve of {human_size(reserve)}"
        return suspect(Severity.WARNING, "space", what, where=root, remedy=remedy)
    if inodes.f_files and inodes.f_favail < FEW_INODES:
        what = f"{room}, but the filesystem can hold only {inodes.f_favail} more files"
        return suspect(Severity.WARNING, "space", what, where=root, remedy="Remove files that nobody needs.")
    return suspect(Severity.OK, "space", room, where=root)


def hypervisor(local: LocalHost, host: Host, *, has_files: bool) -> Iterator[Suspect]:
    """libvirt and QEMU: quick, able to reach the disks, and with KVM."""
    yield _own_name(host)
    yield _lookup(host)
    if has_files:
        yield from _reach(local.data, host)
        yield from _acceleration(local, host)


def _own_name(host: Host) -> Suspect:
    """virGetHostname, which also every start of a guest calls, waits for DNS where the name cannot be resolved."""
    began = time.monotonic()
    name = host.hostname
    took = time.monotonic() - began
    if took < SLOW_NAME:
        return suspect(Severity.OK, "hostname", f"the host's name {name!r} is known to it", where=name)
    return suspect(
        Severity.ERROR,
        "hostname",
        f"the host cannot resolve its own name {name!r}: every start of a guest waits {took:.0f} s for it",
        where="/etc/hosts",
        remedy=f"echo '127.0.1.1 {name}' >> /etc/hosts",
    )


def _lookup(host: Host) -> Suspect:
    """Where root can open /dev/kvm and QEMU's user cannot, libvirt discards all it knows of QEMU at each look."""
    _seconds_of_lookup(host)  # the first one after libvirtd's start may well have to probe QEMU
    seconds = min(_seconds_of_lookup(host), _seconds_of_lookup(host))
    if seconds < SLOW_LOOKUP:
        return suspect(Severity.OK, "kvm_device", f"libvirt knows QEMU ({1000 * seconds:.0f} ms to ask)", where=KVM)
    return suspect(
        Severity.ERROR,
        "kvm_device",
        f"libvirt probes QEMU anew whenever it looks at it ({seconds:.1f} s, several times to define one guest): QEMU's"
        f" user cannot open {KVM}, while root can",
        where=KVM,
        remedy=f"chgrp kvm {KVM} && chmod 0660 {KVM}, with QEMU's user in the group kvm; by a udev rule for good",
    )


def _seconds_of_lookup(host: Host) -> float:
    began = time.monotonic()
    host.domain_capabilities("qemu")
    return time.monotonic() - began


def _reach(data: DataDir, host: Host) -> Iterator[Suspect]:
    """QEMU opens disks by their paths: its user needs to pass through every folder on the way."""
    user = host.qemu_user()
    if user is None or user[0] == os.geteuid() or not data.root.is_dir():
        return
    if os.geteuid() != 0:
        what = f"whether QEMU (uid {user[0]}) can reach the disks was not tried: only root can try"
        yield suspect(Severity.INFO, "reach", what, where=data.root, remedy="Run the doctor as root.")
        return
    root = data.root.resolve()
    way = [*reversed(root.parents), root]
    inside = [folder for folder in (data.images, data.instances, data.tmp) if folder.is_dir()]
    shut = _impassable([*way, *inside, *_folders(data.instances)], *user)
    if not shut:
        what = f"QEMU (uid {user[0]}) can reach the data directory and all in it"
        yield suspect(Severity.OK, "reach", what, where=root)
    for folder in shut if shut and shut[0] not in way else shut[:1]:  # behind a shut one, all are out of reach
        yield suspect(
            Severity.ERROR,
            "reach",
            f"QEMU (uid {user[0]}) cannot pass through {folder}: guests whose disks are below it do not start",
            where=folder,
            remedy=f"setfacl -m u:{user[0]}:x {folder}   (or, for all users: chmod o+x {folder})",
        )


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _impassable(folders: Sequence[Path], uid: int, gid: int) -> list[Path]:
    """Those through which a user cannot pass, as the kernel decides it: by modes, groups and ACLs."""
    script = r"""for folder; do test -x "$folder" || printf '%s\0' "$folder"; done"""
    groups = ",".join(map(str, _groups(uid, gid)))
    become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", f"--groups={groups}", "--"]
    told = run(Command([*become, "sh", "-c", script, "sh", *map(str, folders)], "util-linux"), stall=30.0)
    return [Path(folder) for folder in told.split("\0") if folder]


def _groups(uid: int, gid: int) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:  # a container need not know the host's users
        return [gid]


def _acceleration(local: LocalHost, host: Host) -> Iterator[Suspect]:
    if local.settings.accel == "qemu":
        yield suspect(Severity.OK, "kvm", "guests run without KVM, by setting", where="VIRTFLEET_ACCEL")
        return
    verdict = accel.probe(local, host)
    if verdict.works:
        yield suspect(Severity.OK, "kvm", verdict.reason, where=KVM)
        return
    must = local.settings.accel == "kvm"
    effect = "no guest will start, since the setting demands it" if must else "guests run many times slower"
    yield suspect(
        Severity.ERROR if must else Severity.WARNING,
        "kvm",
        f"KVM does not work, so {effect}: {verdict.reason}",
        where=KVM,
        remedy="Enable virtualisation in the firmware (in a virtual machine: nesting on its host), load kvm_intel or"
        f" kvm_amd, then remove {local.data.root / 'kvm-probe.json'}; or set VIRTFLEET_ACCEL=qemu.",
    )
