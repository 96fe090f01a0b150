"""Destroy: the instance goes with all that belongs to it, as often as asked, and nothing that is not the fleet's."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from tests.fleet.conftest import Spawn
from tests.fleet.parts import Commands, Scheduler, domains, files, libvirt_of, remains, virsh
from tests.lab import Fleet, LabHost, wait_until


@pytest.fixture
def foreign(host: LabHost, name: str) -> Iterator[Path]:
    """A domain that somebody else defined, and its disk."""
    disk = host.folder / f"{name}.raw"
    disk.write_bytes(b"data" * 1024)
    xml = f"""
      <domain type='qemu'>
        <name>{name}</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>32</memory>
        <os><type arch='x86_64' machine='q35'>hvm</type></os>
        <devices><disk type='file' device='disk'>
          <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
        </disk></devices>
      </domain>"""
    with libvirt_of(host) as connection:
        connection.defineXML(xml).create()
        yield disk
        for domain in connection.listAllDomains():
            domain.destroy() if domain.isActive() else None
            domain.undefine()
    disk.unlink()


def test_it_goes_with_its_saved_memory_its_nvram_and_its_snapshots(
    fleet: Fleet, host: LabHost, command: Commands, spawn: Spawn
) -> None:
    record = spawn(ephemeral_gib=[1], swap_mib=16)
    name, folder = record["instance"], host.data / "instances" / record["uuid"]
    virsh(host, "checkpoint-create-as", name, "point", "--diskspec", "vda")
    virsh(host, "snapshot-create-as", name, "shot", "--disk-only", "--diskspec", f"vda,file={folder}/shot.qcow2")
    virsh(host, "managedsave", name)
    nvram = folder.parent.parent / "nvram.fd"
    nvram.write_bytes(b"settings of the firmware")
    with libvirt_of(host) as connection:
        domain = connection.lookupByName(name)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        firmware = f"<loader readonly='yes' type='pflash'>/nosuch</loader><nvram>{nvram}</nvram></os>"
        connection.defineXML(xml.replace("</os>", firmware))
        assert domain.hasManagedSaveImage()
    assert any(path.endswith(".save") for path in files(host.folder / "lib"))

    done = command("destroy", name)
    assert done.returncode == 0, done.stderr
    assert remains(fleet) == {}
    assert not nvram.exists()
    left = {path for path in files(host.folder / "lib") if name in path}
    assert left == set()


def test_destroying_twice_succeeds_and_says_so(command: Commands, scheduler: Scheduler, spawn: Spawn) -> None:
    name = spawn()["instance"]
    first, second = (scheduler.call("destroy", instance=name) for _ in range(2))
    assert (first["state"], first["result"]["note"]) == ("succeeded", "destroyed")
    assert (second["state"], second["result"]["note"]) == ("succeeded", "already gone")
    done = command("destroy", name)
    assert done.returncode == 0
    assert "already gone" in done.stdout


def test_a_cancel_does_not_stop_it_half_way(
    fleet: Fleet, command: Commands, scheduler: Scheduler, spawn: Spawn, name: str
) -> None:
    """Its worker stands still once the guest is being destroyed; who cancels it then is told that it is too late."""
    spawn(name=name)
    operation, worker = f"gone-{name}", fleet.worker("hosta", "control")
    redis = fleet.redis.client()
    sent = scheduler.send("destroy", instance=name, operation_id=operation)
    wait_until(lambda: redis.hexists(f"virtfleet:op:{operation}", "irrevocable"), 20, "there is no way back")
    worker.kill(signal.SIGSTOP)
    asked = command("cancel", operation, "--no-wait", "--json")
    told = command("cancel", operation, "--no-wait")
    worker.kill(signal.SIGCONT)
    record = json.loads(asked.stdout)
    assert (record["irrevocable"], record["cancel_requested"]) == (True, False)
    assert "cannot be taken back any more" in told.stderr
    assert sent.get(timeout=60)["state"] == "succeeded"
    assert remains(fleet) == {}


def test_an_unknown_name_is_a_mistake_and_not_a_success(command: Commands, scheduler: Scheduler) -> None:
    record = scheduler.call("destroy", instance="nobody")
    assert (record["state"], record["error"]["code"]) == ("rejected", "instance_not_found")
    done = command("destroy", "nobody")
    assert done.returncode == 2
    assert "no instance 'nobody'" in done.stderr


def test_by_uuid_it_is_found_too(scheduler: Scheduler, host: LabHost, spawn: Spawn) -> None:
    record = spawn()
    gone = scheduler.call("destroy", instance=record["uuid"])
    assert (gone["state"], gone["instance"]) == ("succeeded", record["instance"])
    assert domains(host) == {}


def test_a_name_is_free_again_for_another(scheduler: Scheduler, spawn: Spawn, name: str) -> None:
    first = spawn(name=name)
    taken = spawn(name=name)
    assert (taken["state"], taken["error"]["code"]) == ("rejected", "instance_exists")
    assert first["uuid"] in taken["error"]["message"]
    scheduler.call("destroy", instance=name)
    assert spawn(name=name)["state"] == "succeeded"


def test_a_foreign_domain_is_left_alone(host: LabHost, command: Commands, foreign: Path) -> None:
    refused = command("destroy", foreign.stem, "--host=hosta")
    assert refused.returncode == 2
    assert "[not_ours]" in refused.stderr
    assert "--foreign" in refused.stderr
    assert domains(host) == {foreign.stem: True}
    assert files(host.data / "instances") == set()


def test_the_name_of_a_foreign_domain_is_taken(host: LabHost, spawn: Spawn, foreign: Path) -> None:
    taken = spawn(name=foreign.stem)
    assert (taken["state"], taken["error"]["code"]) == ("rejected", "instance_exists")
    assert domains(host) == {foreign.stem: True}


def test_a_foreign_domain_goes_when_it_is_meant(
    fleet: Fleet, host: LabHost, command: Commands, foreign: Path, name: str
) -> None:
    done = command("destroy", name, "--host=hosta", "--foreign")
    assert done.returncode == 0, done.stderr
    assert remains(fleet) == {}
    assert foreign.exists(), "its disk is not the fleet's to remove"


def test_an_instance_whose_domain_somebody_removed_can_be_destroyed(
    fleet: Fleet, host: LabHost, scheduler: Scheduler, spawn: Spawn
) -> None:
    name = spawn()["instance"]
    virsh(host, "destroy", name)
    virsh(host, "undefine", name)
    lost = scheduler.call("power_on", instance=name)
    assert (lost["state"], lost["error"]["code"]) == ("rejected", "instance_not_found")
    gone = scheduler.call("destroy", instance=name)
    assert gone["result"] == {"domain": False, "files": True, "note": "destroyed"}
    assert remains(fleet) == {}
