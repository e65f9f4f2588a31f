"""Where the keys of sealed artifacts come from: a file, the environment, or AWS KMS. And what keeps them in memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from functions.serving.secrets import SecretError, read_secret
from functions.serving.settings import ConfigError, KeySettings
from models.artifact.keys import PUBLIC, SEALING, SIGNING, KeyWrapper, LocalKey, parse_key
from models.errors import KeyUnavailableError, SealError

_PR_SET_DUMPABLE = 4
_NOT_OURS = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})


@dataclass(frozen=True)
class Keys:
    """What opens a sealed artifact, and the public key of who must have signed it."""

    wrapper: KeyWrapper | None = None
    signer: bytes | None = None


def open_keys(settings: KeySettings) -> Keys:
    """Read the keys; raises `ConfigError` naming the setting, and never the key. KMS is not asked yet."""
    wrapper: KeyWrapper | None = None
    if settings.key_file:
        wrapper = LocalKey(_parsed("MODEL_KEY_FILE", SEALING, _text("MODEL_KEY_FILE", settings.key_file)))
    elif settings.key:
        wrapper = LocalKey(_parsed("MODEL_KEY", SEALING, settings.key))
    elif settings.kms_key_id:
        wrapper = KmsKey(settings.kms_key_id)
    public = settings.public_key
    if public and not public.startswith(PUBLIC):
        public = _text("MODEL_PUBLIC_KEY", public)
    return Keys(wrapper, _parsed("MODEL_PUBLIC_KEY", PUBLIC, public) if public else None)


def read_signing_key(path: str) -> bytes:
    """Read the key that signs manifests; raises `ConfigError`."""
    return _parsed("the signing key", SIGNING, _text("the signing key", path))


def _text(setting: str, path: str) -> str:
    try:
        return read_secret(setting, path)
    except SecretError as error:
        raise ConfigError(str(error)) from None


def _parsed(setting: str, purpose: str, text: str) -> bytes:
    try:
        return parse_key(purpose, text)
    except KeyUnavailableError as error:
        raise ConfigError(f"{setting} is not such a key: {error}") from None


@dataclass(frozen=True)
class KmsKey:
    """Wraps data keys with a symmetric key of AWS KMS, by id, ARN or alias; needs the extra `aws`.

    The context is the EncryptionContext: KMS authenticates it and writes it, in the clear, into its audit log.
    `client` is made from the environment (AWS_REGION and credentials) when it is first needed, unless handed in.
    """

    key_id: str
    client: Any = None
    provider: str = "aws-kms"

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes:
        """Return KMS's ciphertext of the data key; raises `KeyUnavailableError`."""
        return self._ask("encrypt", "CiphertextBlob", Plaintext=data_key, EncryptionContext=dict(context))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the data key; raises `SealError` if KMS says it is not of this key and context."""
        return self._ask("decrypt", "Plaintext", CiphertextBlob=wrapped, EncryptionContext=dict(context))

    def _ask(self, operation: str, field: str, **arguments: Any) -> bytes:
        boto3, config, errors = _botocore()
        try:
            client = self.client or boto3.client("kms", config=config)
            answer: bytes = getattr(client, operation)(KeyId=self.key_id, **arguments)[field]
        except errors.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            if code in _NOT_OURS:
                raise SealError(f"KMS does not open it with the key {self.key_id} ({code})") from error
            raise KeyUnavailableError(f"KMS refuses to {operation} with the key {self.key_id} ({code})") from error
        except errors.BotoCoreError as error:
            raise KeyUnavailableError(f"KMS cannot be asked for the key {self.key_id}: {error}") from error
        return answer


def _botocore() -> tuple[Any, Any, Any]:
    """boto3, the settings of its clients, and its errors."""
    try:
        import boto3
        from botocore import exceptions
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise KeyUnavailableError("AWS KMS needs boto3: pip install 'edgecascade[aws]'") from error
    return boto3, Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 3}), exceptions


def forbid_core_dumps() -> None:
    """Keep this process's memory, keys and weights, out of core dumps and from debuggers of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
