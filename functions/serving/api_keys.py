"""Who may ask: a key that each request bears, where the function is given any. Deny by default."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from functions.serving.secrets import SecretError, read_secret

SETTING = "API_KEY_FILE"
_LEAST, _MOST = 16, 256
_BYTES = 32


@dataclass(frozen=True)
class ApiKeys:
    """The keys that let a caller in; none: everybody. The first is what we show to other functions of the bundle.

    Two at once let a bundle change its key: the new one is added everywhere, then the old one is taken away.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: str) -> Self:
        """Read one key a line; an empty path: no key is asked for. Raises `SecretError`."""
        if not path:
            return cls()
        keys = tuple(read_secret(SETTING, path).split())
        if not all(_LEAST <= len(key) <= _MOST and key.isascii() and key.isprintable() for key in keys):
            raise SecretError(f"{SETTING}: each line must be a key of {_LEAST} to {_MOST} letters, digits and signs")
        return cls(keys)

    @property
    def headers(self) -> dict[str, str]:
        """What goes with a request to another function."""
        return {"Authorization": f"Bearer {self.keys[0]}"} if self.keys else {}

    def __bool__(self) -> bool:
        return bool(self.keys)

    def admit(self, shown: Iterable[str]) -> bool:
        """Whether one of the shown keys is ours; all are compared, each in a time that tells nothing of it."""
        found = [hmac.compare_digest(ours.encode(), theirs.encode()) for theirs in shown for ours in self.keys]
        return not self.keys or any(found)


def write_api_key(path: Path) -> None:
    """Make a key, for the owner's eyes only; raises `SecretError` rather than replace one."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(_BYTES) + "\n")
    except OSError as error:
        raise SecretError(f"{path} cannot be written ({error.strerror})") from error
