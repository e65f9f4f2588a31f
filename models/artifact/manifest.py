"""The manifest: what a tier on disk says of itself. Read strictly, so that nothing unknown is passed over."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from models.artifact.names import EXITS
from models.artifact.shape import LlamaShape
from models.errors import ArtifactError, DataError
from models.skills import SkillSet

SCHEMA = 2
FUSED, EXPORTED = "fused", "exported"
"""Our own graph, which extends key-value buffers in place; or somebody else's, which hands grown ones back."""
GRAPHS = (FUSED, EXPORTED)
QUANTISATIONS = ("int4", "int4-folded", "int4-gptq", "int8", "fp32")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,), "float": (float, int), "str": (str,), "bool": (bool,),
    "tuple[int, ...]": (list,), "tuple[float, ...]": (list,),
}  # fmt: skip
"""JSON types of an architecture's fields, by their annotations."""
_PROVIDER = re.compile(r"[a-z][a-z0-9-]{0,31}")
_KEY_ID = re.compile(r"[\x21-\x7e]{1,512}")
_WRAPPED_KEY_BYTES = 8192
_N_FILES = 10_000
_NEVER = 2
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the artifact."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Sealed:
    """Says that all files are sealed, and holds their data key, wrapped by a provider's key."""

    provider: str
    key_id: str
    wrapped_key: bytes

    def as_dict(self) -> dict[str, str]:
        """Return it as it stands in the manifest."""
        return {
            "provider": self.provider,
            "key_id": self.key_id,
            "wrapped_key": base64.b64encode(self.wrapped_key).decode(),
        }


@dataclass(frozen=True)
class Energy:
    """Power while the tier computes, and who says so; None where nobody does."""

    watts: float | None = None
    source: str = ""


@dataclass(frozen=True)
class ExitHeads:
    """Exits with heads of their own, in a graph that is whole: `passed` are the numbers of layers before each.

    `calibration` by layers passed and skill, as in `Manifest.calibration`; `thresholds` by skill: the confidence from
    which an exit may answer, as validation data chose it; `made` tells how they came about.
    """

    passed: tuple[int, ...]
    calibration: Mapping[int, Mapping[str, Any]]
    thresholds: Mapping[str, float]
    made: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return them as they stand in the manifest."""
        return {
            "passed": list(self.passed),
            "calibration": {str(passed): dict(entries) for passed, entries in self.calibration.items()},
            "thresholds": dict(self.thresholds),
            "made": dict(self.made),
        }

    @classmethod
    def from_dict(cls, values: Any) -> ExitHeads:
        """Read what `as_dict` wrote; raises `ArtifactError`."""
        keys = _Keys("exit_heads.", values)
        passed = tuple(_whole("exit_heads.passed", keys.take("passed", list)))
        entries, thresholds = keys.take("calibration", dict), keys.take("thresholds", dict)
        made = keys.take("made", dict)
        keys.finish()
        if list(entries) != [str(n) for n in passed] or any(not isinstance(v, dict) for v in entries.values()):
            raise ArtifactError("the manifest's 'exit_heads.calibration' must have one entry for each of 'passed'")
        if any(not isinstance(v, int | float) or not 0 <= v <= _NEVER for v in thresholds.values()):
            raise ArtifactError(f"the manifest's 'exit_heads.thresholds' must lie between 0 and {_NEVER}")
        return cls(passed, {n: entries[str(n)] for n in passed}, thresholds, made)


@dataclass(frozen=True)
class Manifest:
    """All that is known of a tier without opening its weights.

    `exits` are the numbers of layers passed at each early exit that the graph itself has, `exit_heads` those that it
    is cut for when it is opened; `calibration` is read by `models.runtime.confidence`; `losses` tell what quantisation
    cost, `made` from what and how the artifact was built.
    """

    model_id: str
    model_version: str
    architecture: LlamaShape
    quantisation: str
    eos_ids: tuple[int, ...]
    chat_template: str
    lm_head: bool
    skills: SkillSet | None = None
    exits: tuple[int, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    energy: Energy = Energy()
    losses: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    sealed: Sealed | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    graph: str = FUSED
    exit_heads: ExitHeads | None = None

    @property
    def key_context(self) -> dict[str, str]:
        """What the data key is for, to whoever wraps it."""
        return {"model_id": self.model_id, "model_version": self.model_version}

    @property
    def chats(self) -> bool:
        """Whether the tier takes part in conversations."""
        return self.lm_head and bool(self.chat_template)

    def with_files(self, files: Mapping[str, FileEntry]) -> Manifest:
        """Return the manifest with another list of files."""
        return replace(self, files=dict(sorted(files.items())))

    def as_json(self) -> str:
        """Return the text of `manifest.json`."""
        values = {
            "schema": SCHEMA,
            "model": {"id": self.model_id, "version": self.model_version},
            "architecture": self.architecture.as_dict(),
            "quantisation": self.quantisation,
            **({} if self.graph == FUSED else {"graph": self.graph}),
            "eos_ids": list(self.eos_ids),
            "chat_template": self.chat_template,
            "lm_head": self.lm_head,
            "skills": self.skills.as_dict() if self.skills else None,
            "exits": list(self.exits),
            **({"exit_heads": self.exit_heads.as_dict()} if self.exit_heads else {}),
            "calibration": dict(self.calibration),
            "energy": vars(self.energy),
            "losses": dict(self.losses),
            "made": dict(self.made),
            "sealed": self.sealed.as_dict() if self.sealed else None,
            "files": {name: vars(entry) for name, entry in self.files.items()},
        }
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Read `manifest.json`; raises `ArtifactError` naming the key that is missing, unknown or wrong."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"the manifest is not JSON: {error}") from error
    top = _Keys("", values)
    schema = top.take("schema", int)
    if schema != SCHEMA:
        raise ArtifactError(
            f"the manifest has schema {schema}; this version reads schema {SCHEMA}: build the artifact again"
        )
    model, energy = _Keys("model.", top.take("model", dict)), _Keys("energy.", top.take("energy", dict))
    manifest = Manifest(
        model_id=model.take("id", str),
        model_version=model.take("version", str),
        architecture=_shape(_Keys("architecture.", top.take("architecture", dict))),
        quantisation=top.take("quantisation", str),
        eos_ids=tuple(_whole("eos_ids", top.take("eos_ids", list))),
        chat_template=top.take("chat_template", str),
        lm_head=top.take("lm_head", bool),
        skills=_skills(top.take("skills", dict, type(None))),
        exits=tuple(_whole("exits", top.take("exits", list))),
        calibration=top.take("calibration", dict),
        energy=Energy(energy.take("watts", float, int, type(None)), energy.take("source", str)),
        losses=top.take("losses", dict),
        made=top.take("made", dict),
        sealed=_sealed(top.take("sealed", dict, type(None))),
        files=_files(top.take("files", dict)),
        graph=top.take("graph", str) if top.holds("graph") else FUSED,
        exit_heads=ExitHeads.from_dict(top.take("exit_heads", dict)) if top.holds("exit_heads") else None,
    )
    for keys in (top, model, energy):
        keys.finish()
    _check_values(manifest)
    return manifest


class _Keys:
    """A JSON object whose keys are taken one by one; `finish` refuses what is left."""

    def __init__(self, prefix: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ArtifactError("the manifest is not a JSON object")
        self._prefix, self._values = prefix, dict(values)

    def take(self, key: str, *kinds: type) -> Any:
        if key not in self._values:
            raise ArtifactError(f"the manifest lacks the key '{self._prefix}{key}'")
        value = self._values.pop(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ArtifactError(f"the manifest's '{self._prefix}{key}' has the wrong type ({type(value).__name__})")
        return value

    def holds(self, key: str) -> bool:
        return key in self._values

    def finish(self) -> None:
        if self._values:
            raise ArtifactError(f"the manifest has the unknown key '{self._prefix}{min(self._values)}'")


def _shape(keys: _Keys) -> LlamaShape:
    given = {
        f.name: keys.take(f.name, *_KINDS[str(f.type)])
        for f in fields(LlamaShape)
        if f.default is MISSING or keys.holds(f.name)
    }
    keys.finish()
    for name in ("local_layers", "rope_divisors"):
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in given.get(name, ())):
            raise ArtifactError(f"the manifest's 'architecture.{name}' may hold numbers only")
    shape = LlamaShape.from_dict(given)
    if fault := shape.fault():
        raise ArtifactError(f"the manifest's 'architecture.{fault}' is not positive, or does not fit the other numbers")
    return shape


def _whole(key: str, values: list[Any]) -> list[int]:
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in values):
        raise ArtifactError(f"the manifest's '{key}' may hold whole numbers from 0 on only")
    return values


def _skills(values: dict[str, Any] | None) -> SkillSet | None:
    try:
        return SkillSet.from_dict(values) if values else None
    except DataError as error:
        raise ArtifactError(f"the manifest's 'skills' cannot be read: {error}") from error


def _sealed(values: dict[str, Any] | None) -> Sealed | None:
    if values is None:
        return None
    keys = _Keys("sealed.", values)
    provider, key_id, encoded = (keys.take(key, str) for key in ("provider", "key_id", "wrapped_key"))
    keys.finish()
    try:
        wrapped = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        wrapped = b""
    if not _PROVIDER.fullmatch(provider) or not _KEY_ID.fullmatch(key_id):
        raise ArtifactError("the manifest's 'sealed' names no key provider and key id")
    if not 0 < len(wrapped) <= _WRAPPED_KEY_BYTES:
        raise ArtifactError(f"the manifest's 'sealed.wrapped_key' is not base64 of 1 to {_WRAPPED_KEY_BYTES} bytes")
    return Sealed(provider, key_id, wrapped)


def _files(values: dict[str, Any]) -> dict[str, FileEntry]:
    if len(values) > _N_FILES:
        raise ArtifactError(f"the manifest's 'files' lists more than {_N_FILES}")
    files = {}
    for name, entry in values.items():
        keys = _Keys(f"files.{name}.", entry)
        digest, size = keys.take("sha256", str), keys.take("size_bytes", int)
        keys.finish()
        if not _FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(digest) or size < 0:
            raise ArtifactError(f"the manifest's 'files.{name}' is not a plain name with a digest and a size")
        files[name] = FileEntry(digest, size)
    return files


def _check_values(manifest: Manifest) -> None:
    if manifest.quantisation not in QUANTISATIONS:
        raise ArtifactError(
            f"the manifest's 'quantisation' is '{manifest.quantisation}'; use one of {', '.join(QUANTISATIONS)}"
        )
    if manifest.graph not in GRAPHS:
        raise ArtifactError(f"the manifest's 'graph' is '{manifest.graph}'; use one of {', '.join(GRAPHS)}")
    if manifest.graph == EXPORTED and (manifest.skills or manifest.exits or not manifest.lm_head):
        raise ArtifactError("the manifest's 'graph' is 'exported'; such a graph has neither skills nor exits")
    edges = [0, *manifest.exits, manifest.architecture.n_layers]
    if any(a >= b for a, b in pairwise(edges)):
        raise ArtifactError("the manifest's 'exits' must rise and lie inside the model")
    if manifest.exit_heads:
        _check_exit_heads(manifest, manifest.exit_heads)


def _check_exit_heads(manifest: Manifest, heads: ExitHeads) -> None:
    edges = [0, *heads.passed, manifest.architecture.n_layers]
    if not heads.passed or any(a >= b for a, b in pairwise(edges)):
        raise ArtifactError("the manifest's 'exit_heads.passed' must rise and lie inside the model")
    known = set(manifest.skills.names) if manifest.skills else set()
    named = {*heads.thresholds, *(skill for entries in heads.calibration.values() for skill in entries)}
    if named - known:
        raise ArtifactError(f"the manifest's 'exit_heads' name the skill '{min(named - known)}', which the tier lacks")
    if manifest.exits or EXITS not in manifest.files:
        raise ArtifactError(f"the manifest's 'exit_heads' need the file {EXITS} and a graph without exits of its own")
