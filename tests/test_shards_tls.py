"""Mutual TLS between shards: who is let in, who is not, and certificates that change while sessions come and go."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from functions.edge.config import ShardConfig, TlsSettings
from functions.edge.lines import LineError, Lines, call
from functions.edge.tls import Identity
from functions.serving.settings import ConfigError
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.errors import ShardsLostError
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.stage import Stage
from models.runtime.tier import Completion, Limits
from tests.shard_rigs import OPTIONS, Served, directory, serve
from tests.tiny_models import SHAPE, quiet, write_gguf

HEAD, TAIL = "spiffe://site.example/edge/head", "spiffe://site.example/edge/tail"
NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
ASKED, LIMITS = Completion("the"), Limits(max_tokens=4)


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site.example")])
        made = _certificate(key, name, name, key, NOW + DAY, x509.BasicConstraints(ca=True, path_length=None))
        return cls(key, made)

    def issue(self, folder: Path, uri: str, ends: dt.datetime = NOW + DAY, dns: str = "edge-shard") -> None:
        """Write a certificate, its key, and this authority, each replaced in one step."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)] if uri else []
        names += [x509.DNSName(dns)] if dns else []
        made = _certificate(
            key, x509.Name([]), self.certificate.subject, self.key, ends, x509.SubjectAlternativeName(names)
        )
        folder.mkdir(exist_ok=True)
        texts = {
            "key.pem": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "cert.pem": made.public_bytes(Encoding.PEM),
            "ca.pem": self.certificate.public_bytes(Encoding.PEM),
        }
        for name, text in texts.items():
            part = folder / f"{name}.part"
            part.write_bytes(text)
            part.replace(folder / name)


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    ends: dt.datetime,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(NOW - 2 * DAY).not_valid_after(ends)
    return made.add_extension(extension, critical=True).sign(signer, hashes.SHA256())


def identity(folder: Path, *peers: str) -> Identity:
    return Identity(TlsSettings(folder / "cert.pem", folder / "key.pem", folder / "ca.pem", frozenset(peers)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "int4", None, quiet)
    return folder / "tier"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.new()


@contextmanager
def tail(path: Path, folder: Path) -> Iterator[Served]:
    served = serve(Stage.open(path, range(1, SHAPE.n_layers), OPTIONS), identity=identity(folder, HEAD))
    try:
        yield served
    finally:
        served.server.stop(0.0)


@contextmanager
def head(path: Path, folder: Path | None, address: str, *peers: str) -> Iterator[LocalTier]:
    links = directory(path, 1, [address], identity=identity(folder, *peers) if folder else None)
    try:
        yield open_head(path, "edge", 1, Replicas(links.links), OPTIONS)
    finally:
        links.close()


def answer(tier: LocalTier) -> str:
    return "".join(token.text for token in tier.generate(ASKED, LIMITS))


def test_those_that_know_each_other_talk(path: Path, authority: Authority, tmp_path: Path) -> None:
    authority.issue(tmp_path / "tail", TAIL)
    authority.issue(tmp_path / "head", HEAD)
    with tail(path, tmp_path / "tail") as served, head(path, tmp_path / "head", served.address, TAIL) as tier:
        assert answer(tier) == answer(LocalTier.open(path, "edge", threads=1))


STRANGERS = {
    "no certificate": (None, {}, (TAIL,), "unavailable"),
    "expired": (True, {"uri": HEAD, "ends": NOW - DAY}, (TAIL,), "cannot be trusted|unavailable"),
    "another authority": (False, {"uri": HEAD}, (TAIL,), "cannot be trusted|unavailable"),
    "another id": (True, {"uri": "spiffe://site.example/kiosk"}, (TAIL,), "permission_denied"),
    "another site": (True, {"uri": "spiffe://other.example/edge/head"}, (TAIL,), "permission_denied"),
    "no id": (True, {"uri": ""}, (TAIL,), "permission_denied"),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_shard_refuses_strangers(path: Path, authority: Authority, tmp_path: Path, who: str) -> None:
    known, issued, peers, reason = STRANGERS[who]
    authority.issue(tmp_path / "tail", TAIL)
    folder = None if known is None else tmp_path / "head"
    if folder:
        (authority if known else Authority.new()).issue(folder, **issued)
        (folder / "ca.pem").write_bytes((tmp_path / "tail" / "ca.pem").read_bytes())
    with tail(path, tmp_path / "tail") as served, head(path, folder, served.address, *peers) as tier:
        with pytest.raises(ShardsLostError, match=reason):
            answer(tier)
        assert served.service.open_sessions == 0


IMPOSTORS = {
    "expired": ({"uri": TAIL, "ends": NOW - DAY}, True, "expired"),
    "another authority": ({"uri": TAIL}, False, "verify failed"),
    "another id": ({"uri": "spiffe://site.example/kiosk"}, True, "kiosk, which SHARD_PEERS does not name"),
    "no id": ({"uri": ""}, True, "is nobody"),
    "no DNS name": ({"uri": TAIL, "dns": ""}, True, "no DNS name"),
}


@pytest.mark.parametrize("who", IMPOSTORS)
def test_a_head_refuses_impostors(path: Path, authority: Authority, tmp_path: Path, who: str) -> None:
    issued, known, reason = IMPOSTORS[who]
    (authority if known else Authority.new()).issue(tmp_path / "tail", **issued)
    authority.issue(tmp_path / "head", HEAD)
    (tmp_path / "tail" / "ca.pem").write_bytes((tmp_path / "head" / "ca.pem").read_bytes())
    with (
        tail(path, tmp_path / "tail") as served,
        head(path, tmp_path / "head", served.address, TAIL) as tier,
        pytest.raises(ShardsLostError, match=reason),
    ):
        answer(tier)


def test_certificates_change_under_load_without_a_failure(path: Path, authority: Authority, tmp_path: Path) -> None:
    """Both ends' certificates are replaced again and again while answers are given."""
    for name, uri in (("tail", TAIL), ("head", HEAD)):
        authority.issue(tmp_path / name, uri)
    wanted = answer(LocalTier.open(path, "edge", threads=1))
    with (
        tail(path, tmp_path / "tail") as served,
        head(path, tmp_path / "head", served.address, TAIL) as tier,
        ThreadPoolExecutor(3) as pool,
    ):
        for _ in range(5):
            asked = [pool.submit(answer, tier) for _ in range(8)]
            for name, uri in (("tail", TAIL), ("head", HEAD)):
                authority.issue(tmp_path / name, uri)
            assert {future.result() for future in asked} == {wanted}


def test_a_new_authority_takes_over_without_a_restart(path: Path, authority: Authority, tmp_path: Path) -> None:
    for name, uri in (("tail", TAIL), ("head", HEAD)):
        authority.issue(tmp_path / name, uri)
    with tail(path, tmp_path / "tail") as served, head(path, tmp_path / "head", served.address, TAIL) as tier:
        wanted = answer(tier)
        new = Authority.new()
        for name, uri in (("tail", TAIL), ("head", HEAD)):
            new.issue(tmp_path / name, uri)
        assert answer(tier) == wanted


CALLERS = {
    "a peer": (True, {"uri": HEAD}, True),
    "no TLS": (None, {}, False),
    "expired": (True, {"uri": HEAD, "ends": NOW - DAY}, False),
    "another authority": (False, {"uri": HEAD}, False),
    "another id": (True, {"uri": "spiffe://site.example/kiosk"}, False),
}


@pytest.mark.parametrize("who", CALLERS)
def test_a_line_wants_the_same_certificates(authority: Authority, tmp_path: Path, who: str) -> None:
    """Even from whoever has the token."""
    known, issued, welcome = CALLERS[who]
    authority.issue(tmp_path / "tail", TAIL)
    if known is not None:
        (authority if known else Authority.new()).issue(tmp_path / "head", **issued)
        (tmp_path / "head" / "ca.pem").write_bytes((tmp_path / "tail" / "ca.pem").read_bytes())
    caller = None if known is None else identity(tmp_path / "head", TAIL)
    lines = Lines(0, 4096, identity(tmp_path / "tail", HEAD))
    lines.start()
    with lines.promise() as promise:
        heard: list[bytes | None] = []
        with (
            suppress(OSError, LineError),
            closing(call(("127.0.0.1", promise.port), promise.token, 4096, 5, caller)) as line,
        ):
            if welcome:
                promise.line().write(b"hello")
            heard.append(line.read())
        assert heard == [b"hello"] if welcome else not any(heard)
    lines.stop()


def test_a_caller_of_a_line_refuses_impostors(authority: Authority, tmp_path: Path) -> None:
    authority.issue(tmp_path / "tail", "spiffe://site.example/kiosk")
    authority.issue(tmp_path / "head", HEAD)
    lines = Lines(0, 4096, identity(tmp_path / "tail", HEAD))
    lines.start()
    with lines.promise() as promise, pytest.raises(OSError, match="kiosk is not among SHARD_PEERS"):
        call(("127.0.0.1", promise.port), promise.token, 4096, 5, identity(tmp_path / "head", TAIL))
    lines.stop()


# ---- settings ----

TLS = {"SHARD_TLS_CERT": __file__, "SHARD_TLS_KEY": __file__, "SHARD_TLS_CA": __file__, "SHARD_PEERS": TAIL}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SHARD_LAYERS": "7"}, "SHARD_LAYERS is '7'; it must be the first and the last layer"),
        ({"SHARD_LAYERS": "7-3"}, "SHARD_LAYERS is '7-3'"),
        ({"SHARD_NEXT": "edge-1"}, "SHARD_NEXT must list addresses like host:port"),
        ({"SHARD_NEXT": "edge-1:99999"}, "SHARD_NEXT must list addresses like host:port"),
        ({"SHARD_NEXT": "edge-1:5051"}, "plain links stay on loopback; set SHARD_TLS_CERT"),
        ({"SHARD_STATES": "fp8"}, "SHARD_STATES names 'fp8'"),
        ({**TLS, "SHARD_TLS_KEY": ""}, "SHARD_TLS_KEY is not set"),
        ({**TLS, "SHARD_TLS_KEY": "/nowhere"}, "SHARD_TLS_KEY names a file that is not there"),
        ({**TLS, "SHARD_PEERS": "edge"}, "SHARD_PEERS must list the SPIFFE ids"),
        ({**TLS, "SHARD_PEERS": ""}, "SHARD_PEERS must list the SPIFFE ids"),
        ({"SHARD_IDLE_MS": "1"}, "SHARD_IDLE_MS is"),
        ({"SHARD_LINE": "on"}, "SHARD_LINE is"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ShardConfig.from_environment({"SHARD_LAYERS": "0-3", **changes})


def test_good_settings_are_read() -> None:
    assert ShardConfig.from_environment({}) is None
    config = ShardConfig.from_environment({"SHARD_LAYERS": "4-7", "SHARD_NEXT": "edge-1:5051, edge-2:5051", **TLS})
    assert config is not None
    assert (config.layers, config.next, config.is_head) == (range(4, 8), ("edge-1:5051", "edge-2:5051"), False)
    assert config.tls is not None
    assert config.line is None
    named = {"SHARD_LAYERS": "4-7", **TLS, "SHARD_LINE": "5052"}
    for values, line in (
        ({"SHARD_LAYERS": "4-7"}, 0),
        ({"SHARD_LAYERS": "4-7", "SHARD_LINE": "off"}, None),
        (named, 5052),
    ):
        told = ShardConfig.from_environment(values)
        assert told is not None
        assert told.line == line
    assert config.tls.peers == {TAIL}
