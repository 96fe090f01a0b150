"""A domain's XML: what libvirt's own schema allows, and always the same for the same instance."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from worker.errors import InvalidSpec, NotOurs
from worker.models import Disk, DomainConfig, Owner
from worker.virt.domain_xml import domain_xml, mac_address, parse, parse_owner

DATA = Path(__file__).parent / "data"
INSTANCES = Path("/var/lib/virtfleet/instances/0b7c7d3e-5a0e-4f5a-9c57-3f7bb3c4c5d6")
UUID_ = UUID(INSTANCES.name)
OWNER = Owner(name="web1", uuid=UUID_, operation="op-1", fence=7)
ROOT = Disk(role="root", target="vda", path=INSTANCES / "root.qcow2", format="qcow2", virtual_size=2**31)
MINIMAL = DomainConfig(
    name="web1",
    uuid=UUID_,
    owner=OWNER,
    vcpus=1,
    memory_mib=512,
    disks=(ROOT,),
    accel="qemu",
    emulator=Path("/usr/bin/qemu-system-x86_64"),
    console_log=INSTANCES / "console.log",
)
OVERLAY = ROOT.model_copy(update={"backing": Path("/var/lib/virtfleet/images/4b1d.raw")})
EPHEMERAL = Disk(role="ephemeral", target="vdb", path=INSTANCES / "disk-1.raw", format="raw", virtual_size=2**30)
SWAP = Disk(role="swap", target="vdc", path=INSTANCES / "swap.raw", format="raw", virtual_size=2**28)
SEED = Disk(role="seed", target="vdd", path=INSTANCES / "seed.iso", format="raw", virtual_size=366592)
FULL = MINIMAL.model_copy(
    update={
        "vcpus": 4,
        "memory_mib": 4096,
        "disks": (OVERLAY, EPHEMERAL, SWAP, SEED),
        "networks": ("bridge:br0", "none", "network:default"),
        "mac_addresses": ("52:54:00:00:00:01",),
        "firmware": "efi",
        "accel": "kvm",
        "machine": "pc-q35-7.2",
        "disk_cache": "writeback",
    }
)
GOLDEN = {"minimal": MINIMAL, "full": FULL}


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    """libvirt's own schema, by which libvirtd validates what it is given."""
    return etree.RelaxNG(etree.parse("/usr/share/libvirt/schemas/domain.rng"))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_xml_is_the_one_that_was_reviewed(name: str) -> None:
    assert domain_xml(GOLDEN[name]) == (DATA / f"domain_{name}.xml").read_text()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_reviewed_xml_fits_libvirts_schema(name: str, schema: etree.RelaxNG) -> None:
    schema.assertValid(etree.parse(DATA / f"domain_{name}.xml"))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
text = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=40)
paths = text.filter(lambda part: part.strip("./")).map(lambda part: Path("/srv") / part.replace("/", "_"))
owners = st.builds(Owner, name=names, uuid=st.uuids(), operation=text, fence=st.integers(0, 2**53))
disks = st.builds(
    Disk,
    role=st.sampled_from(["root", "ephemeral", "swap", "seed"]),
    target=st.from_regex(r"vd[a-z]{1,2}", fullmatch=True),
    path=paths,
    format=st.sampled_from(["qcow2", "raw"]),
    virtual_size=st.integers(1, 2**46),
    backing=st.none() | paths.map(lambda path: path.with_name(f"{path.name}.qcow2")),
)
networks = st.just("none") | names.map("network:{}".format) | st.just("bridge:br0")
configs = st.builds(
    DomainConfig,
    name=names,
    uuid=st.uuids(),
    owner=owners,
    vcpus=st.integers(1, 1024),
    memory_mib=st.integers(16, 2**26),
    disks=st.lists(disks, max_size=8).map(tuple),
    networks=st.lists(networks, max_size=8).map(tuple),
    firmware=st.sampled_from(["bios", "efi"]),
    accel=st.sampled_from(["kvm", "qemu"]),
    emulator=paths,
    console_log=paths,
    disk_cache=st.sampled_from(["none", "writeback"]),
)


@given(configs)
def test_every_config_gives_xml_that_fits_libvirts_schema(schema: etree.RelaxNG, config: DomainConfig) -> None:
    schema.assertValid(etree.fromstring(domain_xml(config).encode()))


@given(configs)
def test_the_owner_is_read_back_as_it_was_written(config: DomainConfig) -> None:
    assert parse_owner(domain_xml(config)) == config.owner


def test_a_redefined_guest_keeps_its_addresses_and_no_two_share_one() -> None:
    addresses = [mac_address(UUID(int=number), index) for number in range(200) for index in range(4)]
    assert len(set(addresses)) == len(addresses)
    assert addresses[0] == mac_address(UUID(int=0), 0)


def test_a_control_character_is_the_users_mistake() -> None:
    with pytest.raises(InvalidSpec, match="web1"):
        domain_xml(MINIMAL.model_copy(update={"console_log": Path("/srv/\x01")}))


def test_a_backing_file_of_unknown_format_is_refused_rather_than_probed() -> None:
    disk = ROOT.model_copy(update={"backing": Path("/srv/base.img")})
    with pytest.raises(InvalidSpec, match=r"/srv/base\.img"):
        domain_xml(MINIMAL.model_copy(update={"disks": (disk,)}))


def test_a_domain_without_our_mark_has_no_owner() -> None:
    assert parse_owner("<domain><metadata><app xmlns='urn:other'/></metadata></domain>") is None
    assert parse_owner("<domain/>") is None


def test_a_damaged_mark_is_not_taken_for_a_missing_one() -> None:
    with pytest.raises(NotOurs, match="fence"):
        parse_owner(domain_xml(MINIMAL).replace('fence="7"', 'fence="new"'))


def test_xml_cannot_make_the_parser_read_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    tree = parse(f'<!DOCTYPE d [<!ENTITY x SYSTEM "file://{secret}">]><d>&x;</d>')
    assert "s3cret" not in etree.tostring(tree, encoding="unicode")
