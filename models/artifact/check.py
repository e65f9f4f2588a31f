"""Check an artifact file by file, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.artifact.names import MANIFEST, SIGNATURE
from models.artifact.store import Artifact


@dataclass(frozen=True)
class Check:
    """What is wrong with each listed file, or None; and files that lie there unlisted, which nobody reads."""

    faults: Mapping[str, str | None]
    unlisted: tuple[str, ...]

    @property
    def faulty(self) -> Mapping[str, str]:
        """The files that are not as they should be."""
        return {name: fault for name, fault in self.faults.items() if fault}


def check(artifact: Artifact) -> Check:
    """Read every file of an open artifact: sizes and digests, and seals if it was opened with their key."""
    faults = {name: artifact.fault(name) for name in artifact.files}
    known = {MANIFEST, SIGNATURE, *artifact.manifest.files}
    return Check(faults, tuple(sorted(path.name for path in artifact.path.iterdir() if path.name not in known)))
