"""Who may ask, whom we ask, and whose certificates we trust."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flask import Flask
from werkzeug.serving import make_server

from functions.serving.api_keys import ApiKeys, write_api_key
from functions.serving.secrets import SecretError, read_secret
from functions.serving.settings import ConfigError, Environment
from functions.serving.web import OPEN_PATHS
from tests.fakes import FakeTier, _Quiet, card, dispatcher_app, federated, free_port, served, tier_app

OLD, NEW, STRANGE = "the-old-key-of-the-bundle", "the-new-key-of-the-bundle", "a-key-of-somebody-else"
KEYS = ApiKeys((NEW, OLD))
ASKED = {"text": "hello there", "skill": "assistant"}


@contextmanager
def app_of(name: str, keys: ApiKeys) -> Iterator[Flask]:
    nobody = f"http://127.0.0.1:{free_port()}"
    if name == "federation":
        with federated({"a": nobody}, common={"api_keys": keys}) as app:
            yield app
    elif name == "dispatcher":
        yield dispatcher_app(nobody, nobody, common={"api_keys": keys})
    else:
        yield tier_app(FakeTier(card(name)), api_keys=keys)


def routes(app: Flask) -> Iterator[tuple[str, str]]:
    """Every method of every route; what stands for a name in a path is 'x'."""
    for rule in app.url_map.iter_rules():
        path = "".join(text if not is_name else "x" for is_name, text in rule._trace).partition("|")[2]
        yield from ((method, path) for method in (rule.methods or set()) - {"OPTIONS", "HEAD"})
    yield from (
        ("GET", "/nowhere"),
        ("DELETE", "/v1/models"),
        ("POST", "/metrics/x"),
        ("GET", "//metrics/../v1/models"),
    )


@pytest.mark.parametrize("name", ["device", "edge", "dispatcher", "federation"])
def test_no_route_answers_without_a_key(name: str) -> None:
    with app_of(name, KEYS) as app:
        client, asked = app.test_client(), set(routes(app))
        assert len(asked) > 9
        for method, path in sorted(asked):
            for headers in ({}, {"X-API-Key": STRANGE}, {"Authorization": f"Basic {NEW}"}, {"X-API-Key": NEW[:-1]}):
                answer = client.open(path, method=method, json=ASKED, headers=headers)
                if path in OPEN_PATHS:
                    assert answer.status_code == 200
                else:
                    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, path)
                    assert answer.json["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {NEW}"},
        {"Authorization": f"bearer  {OLD}"},
        {"X-API-Key": OLD},
        {"Authorization": "Bearer unused", "X-API-Key": NEW},
    ],
)
def test_each_key_lets_in_by_either_header(headers: dict[str, str]) -> None:
    with app_of("device", KEYS) as app:
        assert app.test_client().post("/", json=ASKED, headers=headers).status_code == 200


def test_without_keys_everybody_is_let_in() -> None:
    with app_of("device", ApiKeys()) as app:
        assert app.test_client().post("/", json=ASKED).status_code == 200


def test_functions_show_each_other_their_first_key() -> None:
    with served(tier_app(FakeTier(card("device")), api_keys=KEYS)) as device:
        common = {"api_keys": ApiKeys((OLD,))}
        asked = {"json": ASKED, "headers": {"X-API-Key": OLD}}
        said = dispatcher_app(device, device, common=common).test_client().post("/", **asked).json["edgecascade"]
        assert (said["source"], said["degraded"]) == ("device", False)
        with federated({"a": device}, common=common) as app:
            assert app.test_client().post("/", **asked).json["edgecascade"]["degraded"] is False


def test_a_key_that_a_tier_does_not_know_is_our_fault_and_not_the_callers() -> None:
    """Once admitted a request is answered: by what is left, flagged."""
    with served(tier_app(FakeTier(card("device")), api_keys=KEYS)) as device:
        common = {"api_keys": ApiKeys((STRANGE,))}
        asked = {"json": ASKED, "headers": {"X-API-Key": STRANGE}}
        said = dispatcher_app(device, device, common=common).test_client().post("/", **asked)
        assert (said.status_code, said.json["edgecascade"]["degraded"]) == (200, True)
        with federated({"a": device}, common=common) as app:
            assert app.test_client().post("/", **asked).status_code != 401


@pytest.mark.parametrize(
    ("text", "says"),
    [("short\n", "each line must be a key"), (f"{NEW} schlüssel-der-gruppe\n", "each line"), ("x" * 300, "each line")],
)
def test_a_key_that_is_none_stops_the_start(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "api-key").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        Environment({"API_KEY_FILE": str(tmp_path / "api-key")}).api_keys()
    assert not any(word in str(caught.value) for word in text.split())


def test_a_key_can_be_made_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "api-key"
    write_api_key(path)
    keys = ApiKeys.read(str(path))
    assert len(keys.keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.keys[0] not in repr(keys)
    with pytest.raises(SecretError, match="cannot be written"):
        write_api_key(path)


def test_a_secret_may_be_a_folder_of_its_own_as_knative_mounts_it(tmp_path: Path) -> None:
    (tmp_path / "api-key").mkdir()
    (tmp_path / "api-key" / "api-key").write_text(NEW)
    assert read_secret("API_KEY_FILE", str(tmp_path / "api-key")) == NEW
    (tmp_path / "api-key" / "api-key").unlink()
    with pytest.raises(SecretError, match="the secret 'api-key', which cannot be read"):
        read_secret("API_KEY_FILE", str(tmp_path / "api-key"))


@pytest.mark.parametrize("path", [NEW, f"/{NEW}", "no\0path", f"nowhere/{NEW}", f"/nowhere/{NEW}"])
def test_a_key_in_the_wrong_setting_is_not_repeated(path: str) -> None:
    with pytest.raises(SecretError, match="API_KEY_FILE names a file that cannot be read") as caught:
        read_secret("API_KEY_FILE", path)
    assert NEW not in str(caught.value)


# ---- TLS ----


class Authority:
    """A certificate authority, and one certificate for 127.0.0.1 by it."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        folder.mkdir()
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._certificate(self._name, self._key, None).public_bytes(_PEM))
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")])
        plain = (_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "edge.pem").write_bytes(self._certificate(name, key, "127.0.0.1").public_bytes(_PEM))
        (folder / "edge.key").write_bytes(key.private_bytes(*plain))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "edge.pem", folder / "edge.key")

    def _certificate(self, name: x509.Name, key: Any, address: str | None) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=address is None, path_length=None), critical=True)
        )
        if address:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            built = built.add_extension(names, critical=False)
        return built.sign(self._key, hashes.SHA256())


_PEM = serialization.Encoding.PEM


@contextmanager
def served_by_tls(app: Flask, context: ssl.SSLContext) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet, ssl_context=context)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("trusts", ["its authority", "another", "the system's"])
def test_an_edge_is_asked_only_if_its_authority_is_trusted(tmp_path: Path, trusts: str) -> None:
    authority, other = Authority(tmp_path / "one"), Authority(tmp_path / "two")
    path = {"its authority": str(authority.ca_file), "another": str(other.ca_file), "the system's": ""}[trusts]
    trusted = Environment({"CA_FILE": path}).trusted()
    edge = tier_app(FakeTier(card("edge")))
    nobody = f"http://127.0.0.1:{free_port()}"
    with served_by_tls(edge, authority.context) as url, served(tier_app(FakeTier(card("device")))) as device:
        for device_url, model in ((nobody, "auto"), (device, "edge")):
            app = dispatcher_app(device_url, url, trusted=trusted)
            said = app.test_client().post("/", json={**ASKED, "model": model}).json["edgecascade"]
            assert (said["source"] == "edge") == (trusts == "its authority"), said
        with federated({"a": url}, trusted=trusted) as app:
            answer = app.test_client().post("/", json=ASKED)
            assert (answer.status_code == 200) == (trusts == "its authority")


@pytest.mark.parametrize("text", ["no certificate", ""])
def test_an_authority_that_is_none_stops_the_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ca.pem"
    if text:
        path.write_text(text)
    with pytest.raises(ConfigError, match="CA_FILE"):
        Environment({"CA_FILE": str(path)}).trusted()
