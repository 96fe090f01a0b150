"""The x509 certificates of a lab: one authority, and for each host what QEMU and libvirt look for in a folder."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.lab.network import run

_EXTENSIONS = """subjectAltName=IP:{address},DNS:{name}
keyUsage=critical,digitalSignature,keyEncipherment
extendedKeyUsage=serverAuth,clientAuth
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_one_at_a_time = threading.Lock()


class Authority:
    """Signs the certificates of a lab, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key, self.certificate = folder / "key.pem", folder / "ca-cert.pem"

    def issue(self, name: str, address: str, folder: Path) -> None:
        """Make the certificates of a host as server and as client, as qemu(1), TLS, names them."""
        with _one_at_a_time:
            self._create()
            folder.mkdir(exist_ok=True)
            key, request, certificate = (folder / f"server-{what}.pem" for what in ("key", "request", "cert"))
            run("openssl", "req", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request))
            extensions = folder / "extensions"
            extensions.write_text(_EXTENSIONS.format(address=address, name=name))
            signer = ("-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial", "-days", "2")
            files = ("-in", str(request), "-out", str(certificate), "-extfile", str(extensions))
            run("openssl", "x509", "-req", *signer, *files)
        for made in (key, certificate):
            made.chmod(0o644)  # QEMU runs as another user
            (folder / made.name.replace("server", "client")).write_bytes(made.read_bytes())
        (folder / "ca-cert.pem").write_bytes(self.certificate.read_bytes())

    def _create(self) -> None:
        if self.certificate.exists():
            return
        self.folder.mkdir(exist_ok=True)
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-days", "2", "-subj", "/CN=lab")
        run("openssl", "req", "-x509", *_NEW_KEY, *usage, "-keyout", str(self._key), "-out", str(self.certificate))
