"""Mutual TLS between shards: certificates from files that may change at any time, the other end known by SPIFFE id.

A server checks its caller's id on each session. A caller cannot look at the server's certificate through gRPC, so it
shakes hands by itself first, when a channel is made, and looks then; the channel insists on the DNS name that it saw
beside the id. A shard's certificate therefore carries both: the id as URI, and a DNS name.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Sequence
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
        try:
            with (
                socket.create_connection((host, port), timeout_s) as raw,
                self._context(ssl.Purpose.SERVER_AUTH, ["h2"]).wrap_socket(raw, server_hostname=host) as secured,
            ):
                found, dns = _names(secured, "URI"), _names(secured, "DNS")
        except OSError as error:  # ssl.SSLError is one
            raise LinkLostError(f"{host}:{port} cannot be trusted or reached: {error}") from error
        if not self.trusts(found):
            raise LinkLostError(f"{host}:{port} is {', '.join(found) or 'nobody'}, which SHARD_PEERS does not name")
        if not dns:
            raise LinkLostError(f"the certificate of {host}:{port} has no DNS name beside its SPIFFE id")
        return dns[0]

    def secured(self, raw: socket.socket, host: str | None = None) -> ssl.SSLSocket:
        """Shake hands over a socket, as the one who listens or, where a `host` was called, as the caller.

        Raises `OSError`, also for those we do not trust.
        """
        purpose = ssl.Purpose.SERVER_AUTH if host else ssl.Purpose.CLIENT_AUTH
        made = self._context(purpose).wrap_socket(raw, server_side=host is None, server_hostname=host)
        found = _names(made, "URI")
        if not self.trusts(found):
            made.close()
            raise ConnectionRefusedError(f"{', '.join(found) or 'nobody'} is not among SHARD_PEERS")
        return made

    def _context(self, purpose: ssl.Purpose, protocols: Sequence[str] = ()) -> ssl.SSLContext:
        """For one handshake: both ends show a certificate. Raises `OSError`."""
        context = ssl.create_default_context(purpose, cafile=str(self._settings.authority))
        context.check_hostname = False  # its SPIFFE id is checked instead
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if protocols:
            context.set_alpn_protocols(protocols)
        self._present(context)
        return context

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


def _names(secured: ssl.SSLSocket, kind: str) -> list[str]:
    """The alternative names of one kind in the other end's certificate."""
    names = (secured.getpeercert() or {}).get("subjectAltName", ())
    return [str(value) for found, value in names if found == kind]  # type: ignore[str-unpack]


def _fits(material: Material) -> bool:
    """Whether key and certificate belong together; raises `ValueError` if they cannot be read."""
    key = load_pem_private_key(material.key, None)
    return load_pem_x509_certificate(material.certificate).public_key() == key.public_key()
