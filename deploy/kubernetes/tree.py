"""Reads a folder of kustomizations, as far as ours go: so that rendering needs neither kubectl nor kustomize.

Understood are `resources`, `components`, `namespace`, `patches` (a list is a JSON patch, RFC 6902, with add, replace,
remove and test; a mapping is merged, lists by their items' names, or with `$patch: delete` takes its target away) and
`configMapGenerator` with files. Anything else is refused by name rather than passed over. A test holds the outcome
against `kubectl kustomize` where that is at hand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from deploy.errors import ManifestError

Manifest = dict[str, Any]
Read = Callable[[PurePosixPath], str]

KUSTOMIZATION = "kustomization.yaml"
CLUSTER_WIDE = frozenset({"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"})
_KEYS = frozenset(
    {"apiVersion", "kind", "namespace", "resources", "components", "patches", "configMapGenerator", "generatorOptions"}
)


def folder(root: Path, instead: Mapping[str, str]) -> Read:
    """Reads files under `root`; those named in `instead` (relative to it) have that text."""

    def read(path: PurePosixPath) -> str:
        if str(path) in instead:
            return instead[str(path)]
        try:
            return (root / path).read_text("utf-8")
        except OSError as error:
            raise ManifestError(f"{root / path} cannot be read ({error.strerror})") from error

    return read


def build(read: Read, at: str) -> list[Manifest]:
    """The manifests of the kustomization in the folder `at`; raises `ManifestError` naming the file."""
    return _Kustomization.read(read, PurePosixPath(at)).manifests([])


def dump(manifests: list[Manifest]) -> str:
    """As one YAML stream."""
    return "---\n".join(dump_one(manifest) for manifest in manifests)


def dump_one(value: Any) -> str:
    """As YAML, keys in their order, texts of several lines as they are written."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1_000_000, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Indents lists under their key, names no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class _Kustomization:
    folder: PurePosixPath
    values: Mapping[str, Any]
    read_file: Read

    @classmethod
    def read(cls, read: Read, at: PurePosixPath) -> _Kustomization:
        values = _load(read(at / KUSTOMIZATION), at / KUSTOMIZATION)[0]
        unknown = sorted(set(values) - _KEYS)
        if unknown:
            raise ManifestError(f"{at / KUSTOMIZATION} has '{unknown[0]}', which is not understood here; use kubectl")
        return cls(at, values, read)

    def manifests(self, before: list[Manifest]) -> list[Manifest]:
        """What it adds to those `before`, and changes in them: a component sees what it is added to."""
        found = [*before]
        for name in self.values.get("resources", []):
            found += self._resource(name)
        found += [self._config_map(spec) for spec in self.values.get("configMapGenerator", [])]
        for name in self.values.get("components", []):
            found = _Kustomization.read(self.read_file, _join(self.folder, name)).manifests(found)
        for patch in self.values.get("patches", []):
            found = self._patched(found, patch)
        namespace = self.values.get("namespace")
        return [_moved(manifest, namespace) for manifest in found] if namespace else found

    def _resource(self, name: str) -> list[Manifest]:
        path = _join(self.folder, name)
        if path.suffix in {".yaml", ".yml"}:
            return _load(self.read_file(path), path)
        return build(self.read_file, str(path))

    def _config_map(self, spec: Mapping[str, Any]) -> Manifest:
        options = self.values.get("generatorOptions", {})
        if not options.get("disableNameSuffixHash"):
            raise ManifestError(f"{self.folder / KUSTOMIZATION}: names with a hash are not understood here")
        data = {PurePosixPath(name).name: self.read_file(_join(self.folder, name)) for name in spec["files"]}
        labels = {**options.get("labels", {}), **spec.get("options", {}).get("labels", {})}
        metadata = {"name": spec["name"], **({"labels": labels} if labels else {})}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}

    def _patched(self, manifests: list[Manifest], patch: Mapping[str, Any]) -> list[Manifest]:
        where = self.folder / KUSTOMIZATION
        text = patch["patch"] if "patch" in patch else self.read_file(_join(self.folder, patch["path"]))
        change = yaml.safe_load(text)
        if not isinstance(change, list | dict):
            raise ManifestError(f"{where}: a patch must be a list of steps (RFC 6902), or part of a manifest")
        chosen = [_matches(manifest, patch["target"]) for manifest in manifests]
        if not any(chosen):
            raise ManifestError(f"{where}: no manifest is the target {patch['target']}")
        if isinstance(change, dict) and change.get("$patch") == "delete":
            return [manifest for manifest, hit in zip(manifests, chosen, strict=True) if not hit]
        return [
            _changed(manifest, change, str(where)) if hit else manifest
            for manifest, hit in zip(manifests, chosen, strict=True)
        ]


def _join(at: PurePosixPath, name: str) -> PurePosixPath:
    parts = list(at.parts)
    for part in PurePosixPath(name).parts:
        if part == "..":
            if not parts:
                raise ManifestError(f"{at / KUSTOMIZATION}: '{name}' leads out of deploy/kubernetes")
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def _load(text: str, path: PurePosixPath) -> list[Manifest]:
    try:
        found = [value for value in yaml.safe_load_all(text) if value is not None]
    except yaml.YAMLError as error:
        raise ManifestError(f"{path} is not YAML: {error}") from error
    if not found or not all(isinstance(value, dict) and "kind" in value for value in found):
        raise ManifestError(f"{path} must hold mappings with a 'kind'")
    return found


def _matches(manifest: Manifest, target: Mapping[str, str]) -> bool:
    """Kind by name, name by a regular expression for all of it, labels by `key=value,key=value`."""
    metadata = manifest["metadata"]
    labels = metadata.get("labels", {})
    wanted = dict(pair.split("=") for pair in target.get("labelSelector", "").split(",") if pair)
    return (
        target.get("kind", manifest["kind"]) == manifest["kind"]
        and re.fullmatch(target.get("name", ".*"), metadata["name"]) is not None
        and all(labels.get(key) == value for key, value in wanted.items())
    )


def _moved(manifest: Manifest, namespace: str) -> Manifest:
    """Into a namespace, along with the service accounts that a binding of ours names."""
    if manifest["kind"] in CLUSTER_WIDE:
        return manifest
    moved = {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}
    if manifest["kind"] == "RoleBinding":
        moved["subjects"] = [{**subject, "namespace": namespace} for subject in manifest["subjects"]]
    return moved


def _changed(manifest: Manifest, change: Any, where: str) -> Manifest:
    if isinstance(change, list):
        return _apply(manifest, change, where)
    merged: Manifest = _merged(manifest, {key: value for key, value in change.items() if key != "metadata"})
    return merged


def _merged(old: Any, new: Any) -> Any:
    """Mappings by key, lists by their items' names if those have any, what is new first; all else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    if not (isinstance(old, list) and isinstance(new, list) and all("name" in item for item in [*old, *new])):
        return new
    by_name = {item["name"]: item for item in old}
    changed = {item["name"]: _merged(by_name.pop(item["name"], None), item) for item in new}
    return [*changed.values(), *by_name.values()]


def _apply(manifest: Manifest, steps: list[dict[str, Any]], where: str) -> Manifest:
    patched = copy.deepcopy(manifest)
    for step in steps:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        try:
            at: Any = patched
            for part in parents:
                at = at[int(part)] if isinstance(at, list) else at[part]
            _step(at, last, step)
        except (KeyError, IndexError, ValueError, TypeError):
            name = f"{manifest['kind']} {manifest['metadata']['name']}"
            raise ManifestError(f"{where}: {step['op']} {step['path']} does not fit {name}") from None
    return patched


def _step(at: Any, last: str, step: Mapping[str, Any]) -> None:
    """One step on the mapping or list that holds its target."""
    key: Any = last if isinstance(at, dict) else len(at) if last == "-" else int(last)
    if step["op"] == "add":
        at.insert(key, step["value"]) if isinstance(at, list) else at.update({key: step["value"]})
        return
    there = at[key]
    if step["op"] == "replace":
        at[key] = step["value"]
    elif step["op"] == "remove":
        del at[key]
    elif step["op"] != "test" or there != step["value"]:
        raise ValueError(step["op"])
