"""Keys come from a file, the environment or KMS; a wrong one stops the start, and none is ever repeated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from functions.serving import keys as serving_keys
from functions.serving.keys import KmsKey, open_keys, read_signing_key
from functions.serving.settings import ConfigError, KeySettings, TierConfig
from functions.serving.tier_app import create_tier_app
from models.artifact.keys import PUBLIC, SEALING, SIGNING, LocalKey, key_text, public_key_of
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.seal import seal_artifact
from models.errors import KeyUnavailableError, SealError
from tests.fakes import wait_until
from tests.tiny_models import quiet, write_adapter, write_gguf

SECRET, SIGNING_KEY = b"hunter2-" * 4, bytes(range(32))
SECRET_TEXT = key_text(SEALING, SECRET)
PUBLIC_TEXT = key_text(PUBLIC, public_key_of(SIGNING_KEY))
CONTEXT = {"model_id": "tiny", "model_version": "1"}
DATA_KEY = bytes(range(64, 96))


# ---- settings ----


def config(**environment: str) -> TierConfig:
    return TierConfig.from_environment({"MODEL_PATH": "somewhere", **environment}, "edge")


def test_there_is_no_key_unless_one_is_named() -> None:
    assert config().keys == config(MODEL_KEY="", MODEL_KEY_FILE=" ").keys == KeySettings()
    assert open_keys(KeySettings()) == serving_keys.Keys(None, None)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "model-key").write_text(SECRET_TEXT + "\n")
    from_file = open_keys(config(MODEL_KEY_FILE=str(tmp_path / "model-key")).keys)
    assert from_file.wrapper == open_keys(config(MODEL_KEY=SECRET_TEXT).keys).wrapper == LocalKey(SECRET)


def test_a_public_key_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "sign.pub").write_text(PUBLIC_TEXT + "\n")
    for value in (PUBLIC_TEXT, str(tmp_path / "sign.pub")):
        assert open_keys(config(MODEL_PUBLIC_KEY=value).keys).signer == public_key_of(SIGNING_KEY)


def test_a_signing_key_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "sign.key").write_text(key_text(SIGNING, SIGNING_KEY))
    assert read_signing_key(str(tmp_path / "sign.key")) == SIGNING_KEY
    (tmp_path / "sign.key").write_text(SECRET_TEXT)
    with pytest.raises(ConfigError, match=SIGNING):
        read_signing_key(str(tmp_path / "sign.key"))


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"MODEL_KEY": SECRET_TEXT, "MODEL_KEY_FILE": "x"}, "MODEL_KEY_FILE and MODEL_KEY"),
        ({"MODEL_KEY": SECRET_TEXT, "MODEL_KMS_KEY_ID": "x"}, "MODEL_KEY and MODEL_KMS_KEY_ID"),
        ({"MODEL_KEYS": "x"}, "MODEL_KEYS is not a setting"),
        ({"MODEL_KMS_KEY": "x"}, "MODEL_KMS_KEY is not a setting"),
        ({"MODEL_KEY_FILE": "/nowhere/model-key"}, "MODEL_KEY_FILE names a file that cannot be read"),
        ({"MODEL_KEY_FILE": SECRET_TEXT}, "MODEL_KEY_FILE names a file that cannot be read"),
        ({"MODEL_PUBLIC_KEY": SECRET_TEXT}, "MODEL_PUBLIC_KEY names a file that cannot be read"),
        ({"MODEL_KEY": "hunter2-" * 6}, "MODEL_KEY is not such a key"),
        ({"MODEL_KEY": PUBLIC_TEXT}, SEALING),
        ({"MODEL_PUBLIC_KEY": PUBLIC_TEXT[:-4]}, "MODEL_PUBLIC_KEY"),
        ({"MODEL_PUBLIC_KEY": "/nowhere/sign.pub"}, "MODEL_PUBLIC_KEY"),
    ],
)
def test_a_mistake_stops_the_start_by_its_name(environment: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        create_tier_app(config(**environment))
    assert "hunter2" not in str(caught.value)
    assert SECRET_TEXT.partition(":")[2] not in str(caught.value)


def test_a_file_that_is_no_text_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "model-key").write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match="not text"):
        open_keys(KeySettings(key_file=str(tmp_path / "model-key")))


def test_settings_do_not_show_the_key() -> None:
    assert SECRET_TEXT not in repr(config(MODEL_KEY=SECRET_TEXT))


# ---- KMS ----


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A region with KMS in this process; gives a client."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with mock_aws():
        yield boto3.client("kms")


def new_key(client: Any) -> KmsKey:
    return KmsKey(client.create_key()["KeyMetadata"]["KeyId"], client)


def test_kms_wraps_in_a_context(aws: Any) -> None:
    key = new_key(aws)
    wrapped = key.wrap(DATA_KEY, CONTEXT)
    assert DATA_KEY not in wrapped
    assert key.unwrap(wrapped, CONTEXT) == KmsKey(key.key_id).unwrap(wrapped, CONTEXT) == DATA_KEY
    with pytest.raises(SealError, match="InvalidCiphertext"):
        key.unwrap(wrapped, {**CONTEXT, "model_version": "2"})
    with pytest.raises((SealError, KeyUnavailableError)):
        new_key(aws).unwrap(wrapped, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="NotFound"):
        KmsKey("nobody").unwrap(wrapped, CONTEXT)


def test_what_kms_refuses_is_told_without_its_words(aws: Any) -> None:
    with Stubber(aws) as stub:
        stub.add_client_error("decrypt", "AccessDeniedException", "arn:aws:iam::123:user/someone may not")
        with pytest.raises(KeyUnavailableError, match="AccessDenied") as caught:
            KmsKey("alias/models", aws).unwrap(b"wrapped", CONTEXT)
    assert "someone" not in str(caught.value)


def test_kms_without_credentials_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with pytest.raises(KeyUnavailableError, match="KMS cannot be asked for the key alias/models"):
        KmsKey("alias/models").unwrap(b"wrapped", CONTEXT)


def test_kms_without_boto3_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(KeyUnavailableError, match=r"edgecascade\[aws\]"):
        KmsKey("alias/models").wrap(DATA_KEY, CONTEXT)


# ---- a tier function over a sealed artifact ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    build(source, folder / "tier", "int8", write_adapter(folder / "adapter", source), quiet)
    return folder / "tier"


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Counts the calls that would forbid this process to dump core."""
    calls: list[bool] = []
    monkeypatch.setattr(serving_keys, "forbid_core_dumps", lambda: calls.append(True))
    return calls


def test_a_function_serves_a_sealed_tier(plain: Path, tmp_path: Path, forbidden: list[bool]) -> None:
    seal_artifact(Artifact.open(plain), tmp_path / "sealed", LocalKey(SECRET), SIGNING_KEY, quiet)
    settings = KeySettings(key=SECRET_TEXT, public_key=PUBLIC_TEXT)
    app = create_tier_app(TierConfig("edge", str(tmp_path / "sealed"), threads=1, keys=settings)).test_client()
    wait_until(lambda: app.get("/_/ready").status_code == 200)
    assert app.post("/", json={"text": "on", "skill": "lamp"}).status_code == 200
    assert forbidden == [True]


def test_a_function_serves_a_tier_whose_key_is_in_kms(plain: Path, tmp_path: Path, aws: Any, forbidden: Any) -> None:
    key = new_key(aws)
    seal_artifact(Artifact.open(plain), tmp_path / "sealed", key, None, quiet)
    settings = KeySettings(kms_key_id=key.key_id)
    app = create_tier_app(TierConfig("edge", str(tmp_path / "sealed"), threads=1, keys=settings)).test_client()
    wait_until(lambda: app.get("/_/ready").status_code == 200)
    assert forbidden == [True]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (KeySettings(key=key_text(SEALING, bytes(32))), "cannot be unwrapped"),
        (KeySettings(key=SECRET_TEXT, public_key=key_text(PUBLIC, public_key_of(bytes(32)))), "signature"),
        (KeySettings(), "no key was handed in"),
    ],
)
def test_a_tier_that_cannot_be_opened_is_never_ready(
    plain: Path, tmp_path: Path, forbidden: list[bool], settings: KeySettings, word: str
) -> None:
    seal_artifact(Artifact.open(plain), tmp_path / "sealed", LocalKey(SECRET), SIGNING_KEY, quiet)
    app = create_tier_app(TierConfig("edge", str(tmp_path / "sealed"), threads=1, keys=settings)).test_client()
    wait_until(lambda: "failed" in app.get("/_/ready").text)
    assert word in app.get("/_/ready").text
    assert app.post("/", json={"text": "on"}).status_code == 503


def test_a_process_with_keys_dumps_no_core() -> None:
    """Asked of the kernel, in a process of its own."""
    script = (
        "import ctypes, resource; from functions.serving.keys import forbid_core_dumps; forbid_core_dumps();"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ("(0, 0) 0" if sys.platform == "linux" else said.stdout.strip())
