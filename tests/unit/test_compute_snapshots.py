"""Which way a snapshot is taken, on a hypervisor inside this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from worker.compute.local import LocalHost, LocalInstance
from worker.compute.snapshots import extract, live
from worker.compute.snapshots.clean import abandon
from worker.compute.snapshots.taking import Taking, now
from worker.context import Alone
from worker.errors import SnapshotDamaged, UnsupportedByHost
from worker.images.layout import SnapshotDir
from worker.models import SnapshotSpec
from worker.settings import Settings
from worker.virt import checkpoints
from worker.virt.domain_xml import parse_other_disks
from worker.virt.guest import Guest
from worker.virt.host import Host
from worker.virt.jobs import BackupJob, MirrorJob


@pytest.fixture
def host() -> Iterator[Host]:
    with Host.open("test:///default", name="kvm1", timeout=5) as host:
        yield host


def taking(host: Host, folder: Path, **wanted: object) -> Taking:
    """A snapshot of the domain that libvirt's test driver brings along."""
    guest = host.guests()[0]
    instance = LocalInstance(LocalHost("kvm1", Settings(data_dir=folder)), guest.name, str(guest.uuid))
    spec = SnapshotSpec.model_validate(wanted)
    return Taking(instance, spec, Alone(), host, guest, SnapshotDir(folder), [])


def test_a_libvirt_too_old_for_backups_mirrors_and_says_so_when_asked_for_one(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "NEEDS_BACKUP", (99, 2, 0))  # an old libvirt cannot be installed beside a new one
    assert live.method(taking(host, tmp_path, method="mirror")) == "mirror"
    assert live.method(taking(host, tmp_path)) == "mirror"
    with pytest.raises(UnsupportedByHost, match=r"backups need 99\.2\.0") as refused:
        live.method(taking(host, tmp_path, method="backup"))
    assert "--method mirror" in refused.value.hint


def test_a_libvirt_that_knows_neither_backups_nor_checkpoints_is_not_asked_for_them(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = taking(host, tmp_path)  # what it asks for the test driver does not know either
    with pytest.raises(UnsupportedByHost):
        BackupJob(this.guest).targets()
    monkeypatch.setattr(Guest, "libvirt_version", (5, 0, 0))
    assert BackupJob(this.guest).targets() == {}
    assert checkpoints.names(this.guest) == []
    (tmp_path / "left").touch()
    abandon(this.guest, this.folder, Alone())
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(Guest, "libvirt_version", (3, 4, 0))
    with pytest.raises(UnsupportedByHost, match=r"mirrors need 3\.5\.0"):
        MirrorJob(this.guest, "vda").begin(tmp_path / "copy")


def test_disks_that_are_no_files_are_named_where_all_were_asked_for(host: Host, tmp_path: Path) -> None:
    kinds = {
        "sda": "<source dev='/dev/vg0/data'/>",
        "sdb": "<source protocol='rbd' name='pool/image'/>",
        "sdc": "<source file='/a/file'/>",
        "sdd": "<source dev='/dev/vg0/base'/><readonly/>",
    }
    disks = "".join(f"<disk device='disk'>{source}<target dev='{disk}'/></disk>" for disk, source in kinds.items())
    drives = "<disk device='cdrom'><source dev='/dev/sr0'/><target dev='sde'/></disk><disk><target dev='sdf'/></disk>"
    left_out = parse_other_disks(f"<domain><devices>{disks}{drives}</devices></domain>")
    assert left_out == ["sda", "sdb"]
    this = replace(taking(host, tmp_path), left_out=left_out)
    moment = {"method": "cold", "taken_at": now(), "power": "off", "consistency": "crash", "disks": ()}
    taken = this.caught(**moment, notes=("not frozen",))
    assert taken.notes == ("not frozen", "left out: sda, which is no file", "left out: sdb, which is no file")
    assert this.caught(**taken.model_dump(exclude={"boot"})) == taken


def test_what_was_caught_before_the_host_went_down_is_neither_continued_nor_published(
    host: Host, tmp_path: Path
) -> None:
    """Its files look whole, and what was written to them may never have reached the disk."""
    this = taking(host, tmp_path)
    taken = this.caught(method="backup", taken_at=now(), power="running", consistency="crash", disks=())
    assert this.recall() == taken
    earlier = taken.model_copy(update={"boot": "earlier"})
    this.folder.instant.write_text(earlier.model_dump_json())
    assert this.recall() is None
    with pytest.raises(SnapshotDamaged, match="started anew"):
        extract.publish(this.instance, earlier, Alone())
