"""A seed is a CD that cloud-init finds by its label and reads."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pycdlib
import pytest
import yaml

from worker.images.seed import build_seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnotakeynotakeynotakeynotakeynotakeynotake me@example"


def read(path: Path, name: str, view: str = "rr_path") -> str:
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    content = io.BytesIO()
    try:
        iso.get_file_from_iso_fp(content, **{view: f"/{name}"})
    finally:
        iso.close()
    return content.getvalue().decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seed.iso"


def test_label_is_the_one_cloud_init_looks_for(path: Path) -> None:
    build_seed(path, instance_id="i-1", hostname="web")
    found = subprocess.run(["/usr/sbin/blkid", "-o", "export", path], check=True, capture_output=True, text=True)
    assert "LABEL=cidata" in found.stdout.splitlines()
    assert "TYPE=iso9660" in found.stdout.splitlines()


@pytest.mark.parametrize("view", ["rr_path", "joliet_path"])
def test_guest_learns_its_name_and_keys(path: Path, view: str) -> None:
    build_seed(path, instance_id="i-1", hostname="web", ssh_keys=[KEY])
    meta = yaml.safe_load(read(path, "meta-data", view))
    assert meta == {"instance-id": "i-1", "local-hostname": "web", "public-keys": [KEY]}
    user_data = read(path, "user-data", view)
    assert user_data.startswith("#cloud-config\n")
    assert yaml.safe_load(user_data) == {"ssh_authorized_keys": [KEY]}


def test_user_data_and_network_config_are_passed_on_as_they_are(path: Path) -> None:
    script, network = "#!/bin/sh\necho 'é' > /ü\n", "version: 2\nethernets: {}\n"
    build_seed(path, instance_id="i-1", hostname="web", ssh_keys=[KEY], user_data=script, network_config=network)
    assert read(path, "user-data") == script
    assert read(path, "network-config") == network
    assert yaml.safe_load(read(path, "meta-data"))["public-keys"] == [KEY]


def test_without_network_config_cloud_init_is_left_to_its_default(path: Path) -> None:
    build_seed(path, instance_id="i-1", hostname="web")
    with pytest.raises(pycdlib.pycdlibexception.PyCdlibInvalidInput):
        read(path, "network-config")


def test_hostname_cannot_smuggle_in_other_meta_data(path: Path) -> None:
    build_seed(path, instance_id="i-1", hostname="web\npublic-keys: [evil]")
    assert yaml.safe_load(read(path, "meta-data"))["public-keys"] == []


def test_seed_is_replaced_as_a_whole_and_not_readable_by_others(path: Path) -> None:
    for hostname in ("one", "two"):
        build_seed(path, instance_id="i-1", hostname=hostname, user_data="#cloud-config\npassword: secret\n")
    assert yaml.safe_load(read(path, "meta-data"))["local-hostname"] == "two"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o077 == 0
