"""Fetch a model from the Hugging Face hub, when asked for by `hub:owner/name`: whole, or nothing of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from models.build.progress import Report
from models.errors import SourceError

PREFIX = "hub:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.json", "*.jinja", "*.safetensors")
"""What is fetched: no pickles, no code."""

Download = Callable[[str, Path], None]
"""`download(model id, folder)` puts the model's files into the folder; raises `OSError` or `SourceError`."""


def fetch_model(name: str, cache: Path, report: Report, download: Download | None = None) -> Path:
    """Return the folder in `cache` with the model `hub:owner/name`, downloading it if it is not there.

    Raises `SourceError` with one sentence; an interrupted download leaves nothing.
    """
    model_id = name.removeprefix(PREFIX)
    if not _ID.fullmatch(model_id):
        raise SourceError(f"'{name}' is no model of the hub; write hub:owner/name")
    target = cache / "hub" / model_id
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as folder:
        report(0, 1, f"downloading {model_id}")
        part = Path(folder) / "model"
        try:
            (download or _snapshot)(model_id, part)
        except OSError as error:
            raise SourceError(
                f"the hub cannot be reached for {model_id}; go online, or name a folder instead"
            ) from error
        if not (part / "config.json").is_file():
            raise SourceError(f"the hub's {model_id} has no config.json; name another model")
        part.rename(target)
    report(1, 1, f"{model_id} is there")
    return target


def _snapshot(model_id: str, folder: Path) -> None:
    """Download by the hub's own client; raises `SourceError` where the hub answers, `OSError` where it does not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        snapshot_download(model_id, local_dir=folder, allow_patterns=list(FILES))
    except GatedRepoError as error:
        raise SourceError(f"the hub gives {model_id} only to those who agreed to its licence; log in to it") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"the hub has no model {model_id}, or keeps it private") from error
    except Exception as error:  # its transport's errors share no base, and change with its version
        raise OSError(str(error)) from error
