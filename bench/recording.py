"""What the local autoscaler recorded, JSON lines: replicas wanted and ready, requests in flight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Look:
    """One line of the recording, its time since the first."""

    at_s: float
    wanted: int
    ready: int
    in_flight: float


def read_record(path: Path) -> list[Look]:
    """The autoscaler's recording."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Look(line["time_s"] - lines[0]["time_s"], line["wanted"], line["ready"], line["in_flight"] or 0.0)
        for line in lines
    ]
