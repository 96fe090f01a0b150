"""Decide whether a file is a disk image the fleet can trust, before anything of QEMU opens it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from worker.context import Watcher
from worker.errors import CommandFailed, ImageRejected
from worker.images import qemu_img
from worker.images.files import human_size
from worker.models import DiskFormat

ALLOWED = "a standalone qcow2 image, or a raw disk with a partition table (MBR or GPT)"
_SECTOR = 512
_MBR_SIGNATURE = b"\x55\xaa"
_GPT_SIGNATURE = b"EFI PART"
_ISO_SIGNATURE_AT = 0x8001
_ISO_SIGNATURES = (b"CD001", b"NSR02", b"NSR03")
_WRAPPED = {
    b"\x1f\x8b": "a gzip-compressed file",
    b"\xfd7zXZ\x00": "an xz-compressed file",
    b"BZh": "a bzip2-compressed file",
    b"\x28\xb5\x2f\xfd": "a zstd-compressed file",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
}


@dataclass(frozen=True)
class ImageFacts:
    """What an accepted image is. Size in bytes."""

    format: DiskFormat
    virtual_size: int


def inspect(
    path: Path, *, max_virtual_bytes: int, source: str | None = None, watch: Watcher | None = None
) -> ImageFacts:
    """Accept the file as an image or raise ImageRejected, which names `source`, what was found and what is allowed.

    qemu-img follows what an image's header says: backing and data files and VMDK extents have leaked host files
    (CVE-2022-47951, CVE-2024-32498). So OpenStack's inspector reads the header first.
    """
    return _Inspection(path, source or str(path), max_virtual_bytes, watch).verdict()


class _Inspection:
    def __init__(self, path: Path, source: str, max_virtual_bytes: int, watch: Watcher | None) -> None:
        self.path, self.source, self.max_virtual_bytes, self.watch = path, source, max_virtual_bytes, watch

    def verdict(self) -> ImageFacts:
        fmt = self._format()
        size = self._qcow2_size() if fmt == "qcow2" else self._raw_size()
        if size > self.max_virtual_bytes:
            self._reject(
                f"a virtual size of {human_size(size)}",
                allowed=f"at most {human_size(self.max_virtual_bytes)}",
                hint="The limit is the setting VIRTFLEET_IMAGE_MAX_VIRTUAL_BYTES.",
            )
        with self._qemu_can_read_it():
            seen = qemu_img.probe(self.path)
        if seen != fmt:
            self._reject(f"what the inspector takes for {fmt} and QEMU for {seen}")
        if fmt == "qcow2":
            self._refuse_damage()
        return ImageFacts(fmt, size)

    def _format(self) -> DiskFormat:
        self._refuse_obvious()
        name = self._detected()
        # The inspector calls an MBR "gpt" too, and a FAT boot sector, which has the same signature, "raw".
        if name not in ("qcow2", "raw", "gpt"):
            hint = "Convert it: qemu-img convert -O qcow2 IMAGE IMAGE.qcow2"
            self._reject(f"an image of format {name}", hint=hint)
        return "qcow2" if name == "qcow2" else "raw"

    def _detected(self) -> str:
        # It takes 0.2 s to import: for those who inspect an image, not for every command.
        from oslo_utils.imageutils import format_inspector  # noqa: PLC0415

        try:
            found = format_inspector.detect_file_format(str(self.path))
            if found is None:
                self._reject("no disk image")
            if found.NAME == "qcow2":
                found.safety_check()
            return str(found.NAME)
        except format_inspector.SafetyCheckFailed as error:
            self._reject("; ".join(str(failure) for failure in error.failures.values()))
        except format_inspector.ImageFormatError as error:
            self._reject(str(error))

    def _refuse_obvious(self) -> None:
        with self.path.open("rb") as file:
            start = file.read(512)
            file.seek(_ISO_SIGNATURE_AT)
            iso_signature = file.read(5)
        if not start:
            self._reject("an empty file")
        # Before the inspector, which calls an install CD with a boot sector only "multiple formats".
        if iso_signature in _ISO_SIGNATURES:
            self._reject("a CD image", hint="Install from it once, and give the fleet the installed disk.")
        if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
            self._reject("a web page", hint="Check the address: it leads to a page rather than to the image itself.")
        for magic, what in _WRAPPED.items():
            if start.startswith(magic):
                self._reject(what, hint="Unpack it first, and give the fleet the image that was in it.")

    def _raw_size(self) -> int:
        """The size of a raw disk: anything at all is "raw" to QEMU, so it has to show that it is a disk."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(8192)
        # The GPT header lies in the second sector, of 512 or of 4096 bytes (UEFI 2.10, 5.3).
        has_table = start[510:512] == _MBR_SIGNATURE or _GPT_SIGNATURE in (start[512:520], start[4096:4104])
        if not has_table:
            self._reject("no disk image: neither a known format nor a partition table")
        if size % _SECTOR:
            self._reject(f"a raw disk of {size} bytes, which is not a whole number of {_SECTOR}-byte sectors")
        return size

    def _qcow2_size(self) -> int:
        with self._qemu_can_read_it():
            found = qemu_img.info(self.path, "qcow2")
        for what, present in (
            (f"a backing file ({found.backing_file})", found.backing_file),
            (f"an external data file ({found.data_file})", found.data_file),
            (f"internal snapshots ({found.snapshots})", found.snapshots),
            ("encryption", found.encrypted),
            ("the mark of a corrupt image", found.corrupt),
        ):
            if present:
                self._reject(f"a qcow2 image with {what}", hint="Flatten it: qemu-img convert -O qcow2 IMAGE NEW.qcow2")
        return found.virtual_size

    def _refuse_damage(self) -> None:
        # Reads the metadata only: milliseconds, and once per image instead of a puzzle in each guest.
        with self._qemu_can_read_it():
            damage = qemu_img.check(self.path, "qcow2", watch=self.watch).corruptions
        if damage:
            self._reject(f"a damaged qcow2 image: {damage} errors", hint="Fetch or make it again.")

    @contextlib.contextmanager
    def _qemu_can_read_it(self) -> Iterator[None]:
        try:
            yield
        except CommandFailed as error:
            self._reject(f"an image QEMU cannot read ({error.message})")

    def _reject(self, found: str, *, allowed: str = ALLOWED, hint: str = "") -> NoReturn:
        raise ImageRejected(
            f"image: {self.source} is refused: found {found}; allowed: {allowed}.",
            hint=hint,
            source=self.source,
            field="image",
            given=self.source,
            found=found,
            allowed=allowed,
        )
