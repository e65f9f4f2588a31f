"""Merges our components with what a target already runs: pure.

CreateDeployment replaces the whole list: a component that is left out is uninstalled. So the revision that the target
has is the ground, and only our own components are changed on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from deploy.errors import RecipeError
from deploy.greengrass.recipe import is_secret

ON_FAILURE = ("ROLLBACK", "DO_NOTHING")
_POLICIES: dict[str, Any] = {"componentUpdatePolicy": {"timeoutInSeconds": 60, "action": "NOTIFY_COMPONENTS"}}
_CARRIED = ("deploymentName", "iotJobConfiguration", "tags")


@dataclass(frozen=True)
class Change:
    """What is to change in one component's configuration: keys set, and keys put back to the recipe's default."""

    merge: Mapping[str, Any] = field(default_factory=dict)
    reset: tuple[str, ...] = ()


def changes(sets: Iterable[str], resets: Iterable[str], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Change]:
    """Read `COMPONENT.KEY=VALUE` and `COMPONENT.KEY`; `defaults` are the components' configurations.

    A component is named in full or by its last part, in any case: `dispatcher`. Raises `RecipeError`.
    """
    merges: dict[str, dict[str, str]] = {}
    cleared: dict[str, list[str]] = {}
    for word in sets:
        place, equals, value = word.partition("=")
        name, key = _place(place, defaults)
        if not equals:
            raise RecipeError(f"--set {word} must look like COMPONENT.KEY=VALUE")
        if is_secret(key):
            raise RecipeError(f"{key} would be readable in the cloud; set {key}_FILE, a file on the device")
        if "{" in value:
            raise RecipeError(f"--set {place}: the lite nucleus expands no '{{' in a configuration")
        merges.setdefault(name, {})[key] = value
    for word in resets:
        name, key = _place(word, defaults)
        cleared.setdefault(name, []).append(key)
    return {name: Change(merges.get(name, {}), tuple(cleared.get(name, ()))) for name in {**merges, **cleared}}


def request(
    target: str, current: Mapping[str, Any] | None, components: Mapping[str, Mapping[str, Any] | None], on_failure: str
) -> dict[str, Any] | None:
    """The arguments of CreateDeployment, or None if the target has all of that already.

    `current` is the target's latest revision as GetDeployment tells it; `components` are ours, None: to be removed.
    """
    had = current or {}
    merged = {name: deepcopy(dict(spec)) for name, spec in had.get("components", {}).items()}
    for name, spec in components.items():
        merged.pop(name, None)
        if spec is not None:
            merged[name] = dict(spec)
    policies = {**_POLICIES, **had.get("deploymentPolicies", {}), "failureHandlingPolicy": on_failure}
    failed = had.get("deploymentStatus") in {"CANCELED", "FAILED", "INACTIVE"}
    if had and not failed and merged == had.get("components") and policies == had.get("deploymentPolicies"):
        return None
    made = {
        "targetArn": target,
        "deploymentName": f"edgecascade {target.rpartition('/')[2]}"[:256],
        **{key: had[key] for key in _CARRIED if had.get(key)},
        "components": merged,
        "deploymentPolicies": policies,
    }
    return {**made, "clientToken": _token(made, had.get("deploymentId", ""))}


def spec(version: str, had: Mapping[str, Any] | None, change: Change) -> dict[str, Any]:
    """One component's entry: the new version, and the configuration that it has with the change on top."""
    before = deepcopy(dict(had or {}))
    update = before.pop("configurationUpdate", {})
    merge = json.loads(update.get("merge") or "{}")
    reset = [pointer for pointer in update.get("reset", []) if pointer.strip("/") not in change.merge]
    for key in change.reset:
        merge.pop(key, None)
        reset += [f"/{key}"] if f"/{key}" not in reset else []
    merge.update(change.merge)
    made: dict[str, Any] = {**before, "componentVersion": version}
    wanted = {**({"merge": _json(merge)} if merge else {}), **({"reset": reset} if reset else {})}
    if update and json.loads(update.get("merge") or "{}") == merge and update.get("reset", []) == reset:
        wanted = update  # as it was written, to the letter
    return {**made, **({"configurationUpdate": wanted} if wanted else {})}


def differences(had: Mapping[str, Any] | None, made: Mapping[str, Any]) -> list[str]:
    """What a request changes, a line each."""
    before, after = (had or {}).get("components", {}), made["components"]
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            lines.append(f"keep {name} {old['componentVersion']}")
        elif new is None:
            lines.append(f"remove {name} {old['componentVersion']}")
        else:
            was = f"{old['componentVersion']} → " if old else ""
            lines.append(f"{'change' if old else 'add'} {name} {was}{new['componentVersion']}{_configured(old, new)}")
    policy = made["deploymentPolicies"]["failureHandlingPolicy"]
    return [*lines, f"on failure: {policy}"]


def _configured(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    update = new.get("configurationUpdate")
    if not update or update == (old or {}).get("configurationUpdate"):
        return ""
    reset = f", reset {', '.join(update['reset'])}" if update.get("reset") else ""
    return f", configuration {update.get('merge', '{}')}{reset}"


def _place(place: str, defaults: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    component, _, key = place.rpartition(".")
    found = [name for name in defaults if component in {name, name.rpartition(".")[2].lower()}]
    if not found:
        known = ", ".join(name.rpartition(".")[2].lower() for name in defaults)
        raise RecipeError(f"'{place}' names no component that was rendered; there are {known} (dispatcher.EDGE_URL=…)")
    if key not in defaults[found[0]]:
        known = ", ".join(sorted(set(defaults[found[0]]) - {"accessControl"}))
        raise RecipeError(f"{found[0]} has no setting '{key}'; it has {known}")
    return found[0], key


def _token(made: Mapping[str, Any], ground: str) -> str:
    """The same change of the same revision is the same request, however often it is sent."""
    return hashlib.sha256(f"{ground}\n{_json(made)}".encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
