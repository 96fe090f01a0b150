"""The seed of cloud-init's NoCloud data source: a small CD which tells a new guest who it is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pycdlib
import yaml

from worker.images.files import out_of_space_is_an_error, publish, temporary_beside

# The data source looks for exactly this label (cloud-init, DataSourceNoCloud).
LABEL = "cidata"


def build_seed(
    path: Path,
    *,
    instance_id: UUID | str,
    hostname: str,
    ssh_keys: Sequence[str] = (),
    user_data: str = "",
    network_config: str = "",
) -> None:
    """Write the seed CD (ISO 9660 with Joliet and Rock Ridge) to `path`, replacing one that is there.

    `user_data` is passed on as it is; without it the guest gets a minimal cloud-config with the keys. The keys are in
    the meta-data too, where cloud-init finds them whatever the user-data is. Raises NoSpace.
    """
    files = {
        "meta-data": _yaml({"instance-id": str(instance_id), "local-hostname": hostname, "public-keys": [*ssh_keys]}),
        "user-data": user_data or "#cloud-config\n" + _yaml({"ssh_authorized_keys": [*ssh_keys]}),
    }
    if network_config:
        files["network-config"] = network_config
    with out_of_space_is_an_error(path.parent), temporary_beside(path) as temporary:
        # Made with its final mode: user-data may hold secrets. libvirt gives the file to QEMU's user.
        temporary.touch(0o600)
        _write_iso(temporary, files)
        publish(temporary, path)


def _yaml(content: dict[str, object]) -> str:
    return yaml.safe_dump(content, default_flow_style=False, sort_keys=False, width=10_000)


def _write_iso(path: Path, files: dict[str, str]) -> None:
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    for name, text in files.items():
        content = text.encode()
        # ISO 9660 proper knows no hyphen and no small letters.
        iso_path = f"/{name.replace('-', '_').upper()}.;1"
        iso.add_fp(io.BytesIO(content), len(content), iso_path, rr_name=name, joliet_path=f"/{name}")
    iso.write(str(path))
    iso.close()
