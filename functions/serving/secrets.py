"""Secrets lie in files, as OpenFaaS mounts them under `/var/openfaas/secrets`.

One that is missing, empty or open to others' writing stops the start with its name; what is in it is never repeated.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MOST_BYTES = 65_536
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class SecretError(Exception):
    """A secret cannot be used; the message names it."""


def read_secret(setting: str, path: str) -> str:
    """The text of the file that `setting` names; raises `SecretError`.

    Where that is a folder, the file of the same name in it is meant: so Knative mounts what OpenFaaS calls a secret.
    Kubernetes projects secrets as 0644 and OpenFaaS gives no choice, so that others may read them; none may write.
    """
    named = _named(setting, path)
    try:
        place = Path(path)
        with (place / place.name if place.is_dir() else place).open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise SecretError(f"{named} cannot be read ({_why(error)})") from None
    if mode & _OTHERS_WRITE:
        raise SecretError(f"{named} its group or anyone may write (mode {mode:04o}): chmod go-w")
    if not text.strip():
        raise SecretError(f"{named} is empty")
    if len(text) > _MOST_BYTES:
        raise SecretError(f"{named} has more than {_MOST_BYTES} characters: no secret of ours has")
    return text


def _named(setting: str, path: str) -> str:
    """Setting and file. What is no absolute path into a folder may be the secret itself, in the wrong setting."""
    place = Path(path)
    try:
        is_path = place.is_absolute() and len(place.parts) > 2 and place.parent.is_dir()  # noqa: PLR2004
    except (OSError, ValueError):
        is_path = False
    return f"{setting} names a file that" if not is_path else f"{setting} names the secret '{place.name}', which"


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    return error.strerror or "no such file" if isinstance(error, OSError) else "that is no path"
