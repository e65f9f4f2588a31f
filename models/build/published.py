"""Fetch the skill sets from where they are published, into the layout that `datasets` reads."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from models.build.progress import Report
from models.errors import DataError

Get = Callable[[str], bytes]

RAW = "https://raw.githubusercontent.com"
CLINC = f"{RAW}/clinc/oos-eval/master/data/data_full.json"
BANKING = f"{RAW}/PolyAI-LDN/task-specific-datasets/master/banking_data"
SNIPS = f"{RAW}/MiuLab/SlotGated-SLU/master/data/snips"
"""SNIPS in the 13,084 / 700 / 700 split of the slot-filling literature, as parallel files."""
SIZE_LIMIT_BYTES = 32_000_000
TIMEOUT_S = 60.0


def fetch(folder: Path, report: Report, get: Get | None = None) -> None:
    """Download all three sets into `folder`; sets that are there already stay.

    Raises `DataError` with the address that cannot be had. A set is moved into place when it is whole.
    """
    load = get or download
    makers: Mapping[str, Callable[[Get], dict[str, bytes]]] = {
        "clinc150": _clinc,
        "snips": _snips,
        "banking77": _banking,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for done, (name, make) in enumerate(makers.items(), 1):
        if not (folder / name).exists():
            _place(folder / name, make(load))
        report(done, len(makers), name)


def download(address: str) -> bytes:
    """Get one file, within bounds of time and size."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:  # noqa: S310 - our own https addresses
            data: bytes = answer.read(SIZE_LIMIT_BYTES + 1)
    except (urllib.error.URLError, TimeoutError) as error:
        raise DataError(f"{address} cannot be reached; go online, or put the set there by hand") from error
    if len(data) > SIZE_LIMIT_BYTES:
        raise DataError(f"{address} is larger than the set should be")
    return data


def _clinc(get: Get) -> dict[str, bytes]:
    return {"data.json": get(CLINC)}


def _banking(get: Get) -> dict[str, bytes]:
    return {f"{split}.csv": get(f"{BANKING}/{split}.csv") for split in ("train", "test")}


def _snips(get: Get) -> dict[str, bytes]:
    return {f"{split}.jsonl": _joined(get, split) for split in ("train", "valid", "test")}


def _joined(get: Get, split: str) -> bytes:
    """One JSON line a sentence out of the three parallel files."""
    words, tags, intents = (
        get(f"{SNIPS}/{split}/{part}").decode("utf-8").splitlines() for part in ("seq.in", "seq.out", "label")
    )
    if not len(words) == len(tags) == len(intents):
        raise DataError(f"the files of SNIPS {split} differ in length: {len(words)}, {len(tags)}, {len(intents)}")
    rows = (
        {"tokens": w.split(), "tags": t.split(), "intent": i.strip()}
        for w, t, i in zip(words, tags, intents, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _place(folder: Path, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        whole = Path(part) / folder.name
        whole.mkdir()
        for name, data in files.items():
            (whole / name).write_bytes(data)
        whole.rename(folder)
