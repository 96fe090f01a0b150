"""The fleet's settings, typed, read from `VIRTFLEET_*` environment variables."""

from __future__ import annotations

import functools
import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1024**3
Accel = Literal["auto", "kvm", "qemu"]
Transport = Literal["ssh", "nbd"]
RootDisk = Literal["overlay", "copy", "raw"]
Seconds = Annotated[float, Field(gt=0)]


def _checked_redis_url(value: str) -> str:
    """One that both redis-py and Celery understand; either would fail with a traceback, each at its own moment."""
    allowed = "allowed: redis://[:PASSWORD@]HOST[:PORT][/NUMBER], or rediss:// for TLS"
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError as error:
        raise ValueError(allowed) from error
    if url.scheme not in {"redis", "rediss"} or not url.hostname or port == 0 or not re.fullmatch(r"/?\d*", url.path):
        raise ValueError(allowed)
    return value


def _checked_ports(value: str) -> str:
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
    if not found or not 0 < int(found[1]) <= int(found[2]) < 65536:
        raise ValueError("allowed: FIRST-LAST, of TCP ports from 1 to 65535")
    return value


class Settings(BaseSettings):
    """All settings with their defaults; each field `x` is read from the variable `VIRTFLEET_X`."""

    model_config = SettingsConfigDict(env_prefix="VIRTFLEET_", frozen=True, extra="ignore")

    redis_url: Annotated[str, AfterValidator(_checked_redis_url)] = Field(
        "redis://127.0.0.1:6379/0", description="Redis: broker, journal and progress."
    )
    host: str = Field(
        default_factory=lambda: socket.gethostname().split(".")[0],
        description="This host's name in the fleet.",
    )
    libvirt_uri: str = Field("qemu:///system", description="libvirt on this host.")
    libvirt_uris: dict[str, str] = Field(
        default_factory=dict,
        description="JSON: URI per host, for a control worker that serves several hosts.",
    )
    data_dir: Path = Field(Path("/var/lib/virtfleet"), description="Images, instances and snapshots.")
    image_roots: tuple[Path, ...] = Field(
        (Path("/var/lib/virtfleet/import"),),
        description="JSON list: folders an image may be taken from by path.",
    )
    image_max_bytes: int = Field(100 * GIB, gt=0, description="Largest image accepted, in bytes.")
    image_max_virtual_bytes: int = Field(
        2048 * GIB, gt=0, description="Largest virtual size an image may declare, in bytes."
    )
    accel: Accel = Field("auto", description="kvm, qemu, or auto: kvm where a probe shows a guest runs under it.")
    root_disk: RootDisk = Field("overlay", description="How root disks are made from images.")
    reserve_bytes: int = Field(GIB // 4, ge=0, description="Space in the data directory that is never used up.")

    control_slots: int = Field(
        64, ge=1, description="Short calls and waits at a time per host (threads, made as they are needed)."
    )
    disk_slots: int = Field(2, ge=1, description="Copies, converts and snapshots at a time per host (processes).")

    address: str | None = Field(
        None, description="Address at which other hosts reach this one for copies. Default: its name."
    )
    copies_in: int = Field(2, ge=1, description="Copies from other hosts at a time.")
    copies_out: int = Field(2, ge=1, description="Copies to other hosts at a time.")
    copy_bandwidth_mib: int | None = Field(None, ge=1, description="Most that one copy may take, in MiB per second.")
    ssh_user: str = Field("root", description="User for copies from other hosts.")
    ssh_port: int = Field(22, ge=1, le=65535, description="Port of ssh on other hosts.")
    ssh_key: Path | None = Field(None, description="Private key for copies. Default: those of the worker's user.")
    ssh_known_hosts: Path | None = Field(None, description="Keys of the other hosts. Default: ssh's own files.")
    copy_transport: Transport = Field("ssh", description="How disks travel between hosts where a request does not say.")
    nbd_ports: Annotated[str, AfterValidator(_checked_ports)] = Field(
        "10809-10840", description="TCP ports for copies over NBD; the same on all hosts."
    )
    nbd_tls_dir: Path = Field(
        Path("/etc/pki/qemu"), description="Certificates for copies over NBD: those of libvirt's migration over TLS."
    )
    nbd_plain: bool = Field(False, description="Copies over NBD without TLS: anybody on the network can read them.")
    confirm_after: float = Field(
        0.0, ge=0, description="A migration is confirmed by itself after so many seconds; 0: only when asked to."
    )

    metrics_port: int | None = Field(None, ge=1, le=65535, description="Port of a control worker's Prometheus metrics.")
    metrics_address: str = Field("127.0.0.1", description="Address of a control worker's Prometheus metrics.")

    connect_timeout: Seconds = Field(10.0, description="Bound on opening a libvirt connection, in seconds.")
    lease_ttl: Seconds = Field(30.0, description="A step whose worker is silent this long is taken over, in seconds.")
    reaper_interval: Seconds = Field(1.0, description="Pause between two looks of the reaper, in seconds.")
    publish_grace: Seconds = Field(
        10.0, description="A step published this long ago and not begun is published again, in seconds."
    )
    stall_timeout: Seconds = Field(120.0, description="A transfer that moves no bytes this long is ended, in seconds.")
    heartbeat_interval: Seconds = Field(5.0, description="How often a worker says that it is alive, in seconds.")
    survey_interval: Seconds = Field(60.0, description="How often a host's instances are looked through, in seconds.")
    keep_records: Seconds = Field(
        7 * 86400.0, description="How long the record of an ended operation is kept, in seconds."
    )
    hold_for_hosts: Seconds = Field(
        600.0,
        description="How long an operation that Redis has lost, and one host has put back, waits for its other hosts, "
        "which may know more of it, in seconds.",
    )
    stop_grace: Seconds = Field(30.0, description="How long running steps may go on after SIGTERM, in seconds.")

    def nbd_port_range(self) -> range:
        """`nbd_ports` as numbers."""
        first, last = map(int, self.nbd_ports.split("-"))
        return range(first, last + 1)

    def uri_of(self, host: str) -> str:
        """The libvirt URI by which this process reaches `host`."""
        return self.libvirt_uris.get(host, self.libvirt_uri)


@functools.cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
