"""Mutual TLS between shards: certificates from files that may change at any time, the other end known by SPIFFE id.

A server checks its caller's id on each session. A caller cannot look at the server's certificate through gRPC, so it
shakes hands by itself first, when a channel is made, and looks then; the channel insists on the DNS name that it saw
beside the id. A shard's certificate therefore carries both: the id as URI, and a DNS name.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from functions.edge.config import TlsSettings
from models.errors import LinkLostError

Stamp = tuple[int, ...]
_LOOKS, _LOOK_AGAIN_S = 10, 0.02


@dataclass(frozen=True)
class Material:
    """What the files hold, in PEM."""

    certificate: bytes
    key: bytes
    authority: bytes


class Identity:
    """This shard's certificate, as it stands in its files, and whom it trusts."""

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._stamp, self._material = self._look(), self._read()

    def current(self) -> tuple[Stamp, Material]:
        """The newest certificate that could be read whole, and a mark that changes with it."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                material = self._read()
                if _fits(material):
                    self._stamp, self._material = stamp, material
        except (OSError, ValueError):  # they are being replaced: the next look finds the new ones
            pass
        return self._stamp, self._material

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server, which take a new certificate without a restart; callers must have one too."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            _, m = self.current()
            return grpc.ssl_server_certificate_configuration([(m.key, m.certificate)], m.authority)

        return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client_authentication=True)

    def trusts(self, names: Iterable[str]) -> bool:
        """Whether one of a certificate's alternative names is a peer's SPIFFE id."""
        return not self._settings.peers.isdisjoint(names)

    def server_name(self, host: str, port: int, timeout_s: float) -> str:
        """Shake hands with a server and return its DNS name; raises `LinkLostError` if it is nobody we trust."""
        s = self._settings
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(s.authority))
        context.check_hostname = False  # its SPIFFE id is checked instead
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            self._present(context)
            with (
                socket.create_connection((host, port), timeout_s) as raw,
                context.wrap_socket(raw, server_hostname=host) as secured,
            ):
                names = (secured.getpeercert() or {}).get("subjectAltName", ())
        except OSError as error:  # ssl.SSLError is one
            raise LinkLostError(f"{host}:{port} cannot be trusted or reached: {error}") from error
        found = [str(value) for kind, value in names if kind == "URI"]  # type: ignore[str-unpack]
        dns = [str(value) for kind, value in names if kind == "DNS"]  # type: ignore[str-unpack]
        if not self.trusts(found):
            raise LinkLostError(f"{host}:{port} is {', '.join(found) or 'nobody'}, which SHARD_PEERS does not name")
        if not dns:
            raise LinkLostError(f"the certificate of {host}:{port} has no DNS name beside its SPIFFE id")
        return dns[0]

    def _present(self, context: ssl.SSLContext) -> None:
        """Load the certificate from its files, which may be just being replaced, one after the other."""
        for attempt in range(_LOOKS):
            try:
                context.load_cert_chain(self._settings.certificate, self._settings.key)
            except OSError:
                if attempt + 1 == _LOOKS:
                    raise
                time.sleep(_LOOK_AGAIN_S)
            else:
                return

    def _look(self) -> Stamp:
        s = self._settings
        return tuple(n for f in (s.certificate, s.key, s.authority) for n in (f.stat().st_mtime_ns, f.stat().st_ino))

    def _read(self) -> Material:
        s = self._settings
        return Material(s.certificate.read_bytes(), s.key.read_bytes(), s.authority.read_bytes())


def _fits(material: Material) -> bool:
    """Whether key and certificate belong together; raises `ValueError` if they cannot be read."""
    key = load_pem_private_key(material.key, None)
    return load_pem_x509_certificate(material.certificate).public_key() == key.public_key()
