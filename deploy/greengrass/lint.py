"""What one of the nuclei, or the cloud, would reject in a recipe: found before anything is sent.

Rules are from the component recipe reference, and from what aws-greengrass-lite does with a recipe (its
`recipe-runner`, `recipe2unit` and `ggl-config-interpolation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from deploy.greengrass.recipe import FORMAT_VERSION

RECIPE_BYTES = 16_000
SCRIPT_BYTES = 10_000
LONGEST_VARIABLE = 255
LONGEST_TIMEOUT_S = 900
DEFAULT_TIMEOUT_S = 120
_NAME = re.compile(r"^[a-zA-Z0-9-_.]{1,128}$")
_VERSION = re.compile(r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$")
_URI = re.compile(r"^s3://[a-zA-Z0-9._-]{3,63}/\S+$")
_SETENV_KEY = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_POINTER = re.compile(r"^configuration:(?P<path>/.+)$")
_ARCHIVE = re.compile(r"\{artifacts:decompressedPath\}/(?P<folder>[^/\"'\s]+)")
_ESCAPE = re.compile(r"\$\{(.?)(\}?)")
_VARIABLES = frozenset(
    {"artifacts:path", "artifacts:decompressedPath", "work:path", "kernel:rootPath", "iot:thingName"}
)
_LONGEST_VERSION = 64
_TOP = ("RecipeFormatVersion", "ComponentName", "ComponentVersion", "ComponentDescription", "Manifests")
_TOP_OPTIONAL = ("ComponentPublisher", "ComponentType", "ComponentConfiguration", "ComponentDependencies")
_PHASES = ("install", "startup", "run")
_PHASE_KEYS = ("Script", "Timeout", "Setenv", "RequiresPrivilege")
_PERMISSIONS = ("NONE", "OWNER", "ALL")
_NOT_ON_LITE = ("shutdown", "recover", "bootstrap", "Skipif")

Problems = Iterator[str]


def lint(text: str) -> list[str]:
    """Every problem of a recipe's text as one sentence each, naming its place; none if both nuclei take it."""
    size = len(text.encode("utf-8"))
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        return [f"it is no YAML{f' at line {place.line + 1}' if place else ''}"]
    if not isinstance(recipe, dict):
        return ["it holds no keys and values"]
    too_large = [f"it has {size} bytes; at most {RECIPE_BYTES} are taken"] if size > RECIPE_BYTES else []
    return [*too_large, *_recipe(recipe)]


def _recipe(recipe: Mapping[str, Any]) -> Problems:
    yield from _keys(recipe, "the recipe", _TOP, _TOP_OPTIONAL)
    yield from _identity(recipe)
    configuration = _mapping(_mapping(recipe.get("ComponentConfiguration")).get("DefaultConfiguration"))
    yield from _keys(
        recipe.get("ComponentConfiguration") or {}, "ComponentConfiguration", (), ("DefaultConfiguration",)
    )
    yield from _configuration(configuration, "")
    yield from _dependencies(recipe.get("ComponentDependencies") or {})
    manifests = recipe.get("Manifests")
    if not isinstance(manifests, list) or not manifests:
        yield "Manifests must be a list of at least one"
        return
    for number, manifest in enumerate(manifests):
        where = f"Manifests[{number}]"
        if not isinstance(manifest, dict):
            yield f"{where} holds no keys and values"
            continue
        yield from _manifest(manifest, where, configuration)


def _identity(recipe: Mapping[str, Any]) -> Problems:
    if "RecipeFormatVersion" in recipe and recipe["RecipeFormatVersion"] != FORMAT_VERSION:
        yield f"RecipeFormatVersion must be the text '{FORMAT_VERSION}'"
    name, version = recipe.get("ComponentName"), recipe.get("ComponentVersion")
    if "ComponentName" in recipe and not (isinstance(name, str) and _NAME.match(name)):
        yield "ComponentName must be 1 to 128 letters, digits, - _ ."
    if "ComponentVersion" in recipe and not (
        isinstance(version, str) and _VERSION.match(version) and len(version) <= _LONGEST_VERSION
    ):
        yield f"ComponentVersion must be a semantic version such as '1.0.0' of at most {_LONGEST_VERSION} characters"
    description = recipe.get("ComponentDescription", "x")
    if not isinstance(description, str) or not description.strip() or re.search(r"[\n\r\\]", description):
        yield "ComponentDescription must be one line without a backslash; the lite nucleus cuts it there"
    if recipe.get("ComponentType", "aws.greengrass.generic") != "aws.greengrass.generic":
        yield "ComponentType must be aws.greengrass.generic; the lite nucleus runs no other"


def _configuration(node: Any, path: str) -> Problems:
    """Values are text: the lite nucleus puts numbers elsewhere than the classic one, and expands no variables here."""
    for key, value in _mapping(node).items():
        here = f"{path}/{key}"
        if here == "/accessControl":
            yield from _access(value)
        elif isinstance(value, dict):
            yield from _configuration(value, here)
        elif not isinstance(value, str):
            yield f"configuration {here} must be text; put its value in quotes"
        elif "{" in value:
            yield f"configuration {here} holds a '{{'; the lite nucleus expands no variable there"


def _access(services: Any) -> Problems:
    for service, policies in _mapping(services).items():
        for policy, rule in _mapping(policies).items():
            where = f"accessControl {service} {policy}"
            rule = _mapping(rule)  # noqa: PLW2901
            for key in ("operations", "resources"):
                if not isinstance(rule.get(key), list) or not rule[key]:
                    yield f"{where} needs a list of {key}"
            for resource in _list(rule.get("resources")):
                bare = _ESCAPE.sub("", resource) if isinstance(resource, str) else "?"
                if "?" in bare or any(m[1] not in "*?$" or not m[2] for m in _ESCAPE.finditer(str(resource))):
                    yield f"{where}: the lite nucleus refuses the resource '{resource}' ('?' is written ${{?}})"


def _dependencies(dependencies: Any) -> Problems:
    if not isinstance(dependencies, dict):
        yield "ComponentDependencies must map names to requirements"
        return
    for name, wanted in dependencies.items():
        where = f"ComponentDependencies {name}"
        yield from _keys(_mapping(wanted), where, ("VersionRequirement", "DependencyType"), ())
        kind = _mapping(wanted).get("DependencyType", "SOFT")
        if kind not in ("SOFT", "HARD"):
            yield f"{where}: DependencyType is SOFT or HARD"
        elif kind == "HARD" and not str(name).startswith("aws.greengrass."):
            yield f"{where} is HARD; the component would be stopped with it: make it SOFT"


def _manifest(manifest: Mapping[str, Any], where: str, configuration: Mapping[str, Any]) -> Problems:
    yield from _keys(manifest, where, ("Platform", "Lifecycle"), ("Name", "Artifacts", "Selections"))
    yield from _platform(_mapping(manifest.get("Platform")), f"{where}.Platform")
    archives: set[str] = set()
    yield from _artifacts(manifest.get("Artifacts", []), f"{where}.Artifacts", archives)
    lifecycle = _mapping(manifest.get("Lifecycle"))
    where = f"{where}.Lifecycle"
    yield from _keys(lifecycle, where, (), (*_PHASES, "Setenv"))
    if not any(phase in lifecycle for phase in _PHASES):
        yield f"{where} has no phase; the lite nucleus takes none without"
    if "startup" in lifecycle and "run" in lifecycle:
        yield f"{where} has startup and run; there can be only one"
    scripts = list(_scripts(lifecycle, where))
    for place, value in scripts:
        yield from _variables(value, place, configuration)
        for found in _ARCHIVE.finditer(value):
            if found["folder"] not in archives:
                yield f"{place} reads the unpacked '{found['folder']}', but no artifact {found['folder']}.zip is there"
    yield from _setenv(lifecycle.get("Setenv", {}), f"{where}.Setenv")
    for phase in _PHASES:
        if phase in lifecycle:
            yield from _phase(phase, lifecycle[phase], f"{where}.{phase}")


def _platform(platform: Mapping[str, Any], where: str) -> Problems:
    yield from _keys(platform, where, ("os", "architecture", "runtime"), ("architecture.detail",))
    if platform.get("os", "linux") != "linux":
        yield f"{where}.os must be linux; the lite nucleus has no other"
    for key, value in platform.items():
        if not isinstance(value, str) or not re.match(r"^(\*|\w+)$", value):
            yield f"{where}.{key} must be one word or '*'; the lite nucleus knows no patterns"
    if platform.get("runtime", "*") not in ("*", "aws_nucleus_lite"):
        yield f"{where}.runtime must be '*'; else one of the nuclei passes this manifest over"


def _artifacts(artifacts: Any, where: str, archives: set[str]) -> Problems:
    """Notes in `archives` the folders that zips unpack to."""
    names: set[str] = set()
    if not isinstance(artifacts, list):
        yield f"{where} must be a list"
    for number, artifact in enumerate(_list(artifacts)):
        here = f"{where}[{number}]"
        artifact = _mapping(artifact)  # noqa: PLW2901
        yield from _keys(artifact, here, ("Uri",), ("Unarchive", "Permission", "Digest", "Algorithm"))
        uri = str(artifact.get("Uri", ""))
        if "Uri" in artifact and not _URI.match(uri):
            yield f"{here}.Uri must look like s3://bucket/key"
        name = uri.rpartition("/")[2]
        if name in names:
            yield f"{here} is a second file named '{name}'; all artifacts lie in one folder"
        names.add(name)
        if artifact.get("Unarchive", "NONE") not in ("NONE", "ZIP"):
            yield f"{here}.Unarchive is NONE or ZIP"
        elif artifact.get("Unarchive") == "ZIP":
            archives.add(name.removesuffix(".zip"))
        permission = _mapping(artifact.get("Permission"))
        yield from _keys(permission, f"{here}.Permission", (), ("Read", "Execute"))
        if any(value not in _PERMISSIONS for value in permission.values()):
            yield f"{here}.Permission takes {', '.join(_PERMISSIONS)}"


def _phase(phase: str, step: Any, where: str) -> Problems:
    if isinstance(step, str):
        step = {"Script": step}
    if not isinstance(step, dict):
        yield f"{where} must be a script, or keys and values; the lite nucleus takes no list"
        return
    yield from _keys(step, where, ("Script",), _PHASE_KEYS)
    script = step.get("Script", "")
    if not isinstance(script, str) or len(script.encode("utf-8")) > SCRIPT_BYTES:
        yield f"{where}.Script must be text of at most {SCRIPT_BYTES} bytes"
    elif phase == "run" and not re.match(r"^exec\s", script.strip().rpartition("\n")[2]):
        yield f"{where}.Script must end with 'exec …'; else the shell gets SIGTERM and the program does not"
    yield from _timeout(phase, step, where)
    yield from _setenv(step.get("Setenv", {}), f"{where}.Setenv")
    if step.get("RequiresPrivilege", False) not in (True, False, "true", "false"):
        yield f"{where}.RequiresPrivilege is true or false"


def _timeout(phase: str, step: Mapping[str, Any], where: str) -> Problems:
    if phase == "run":
        if "Timeout" in step:
            yield f"{where}.Timeout would end the function after so many seconds: leave it out"
        return
    text = str(step.get("Timeout", ""))
    if not text:
        yield f"{where}.Timeout is missing; by default the step is ended after {DEFAULT_TIMEOUT_S} s"
    elif not text.isdecimal() or not 0 < int(text) <= LONGEST_TIMEOUT_S:
        yield f"{where}.Timeout must be whole seconds up to {LONGEST_TIMEOUT_S}"


def _setenv(values: Any, where: str) -> Problems:
    if not isinstance(values, dict):
        yield f"{where} must map names to values"
        return
    for key, value in values.items():
        if not _SETENV_KEY.match(str(key)):
            yield f"{where}: '{key}' is no name of a variable"
        if not isinstance(value, str):
            yield f"{where}: '{key}' must be text; put its value in quotes"


def _scripts(lifecycle: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """All text in which variables are expanded, with its place."""
    steps = {"": lifecycle, **{f".{phase}": lifecycle.get(phase) for phase in _PHASES}}
    for name, step in steps.items():
        if isinstance(step, str):
            yield f"{where}{name}", step
        elif isinstance(step, dict):
            if isinstance(step.get("Script"), str):
                yield f"{where}{name}.Script", step["Script"]
            for key, value in _mapping(step.get("Setenv")).items():
                if isinstance(value, str):
                    yield f"{where}{name}.Setenv {key}", value


def _variables(value: str, where: str, configuration: Mapping[str, Any]) -> Problems:
    """The lite nucleus takes every `{` for the beginning of a variable and ends with an unknown one."""
    start = value.find("{")
    while start >= 0:
        end = value.find("}", start)
        inside = value[start + 1 : end] if end >= 0 else value[start + 1 :]
        pointer = _POINTER.match(inside)
        if end < 0 or len(inside) > LONGEST_VARIABLE or not (pointer or inside in _VARIABLES):
            shown = " ".join(f"{{{inside}".split())[:40]
            yield f"{where}: '{shown}' is no variable; the lite nucleus takes every '{{' for one ($HOME, not ${{HOME}})"
        elif pointer and not _holds(configuration, pointer["path"]):
            yield f"{where}: {{{inside}}} has no default; the classic nucleus would leave it as it stands"
        start = value.find("{", start + 1 if end < 0 else end)


def _holds(configuration: Any, pointer: str) -> bool:
    for part in pointer.strip("/").split("/"):
        if not isinstance(configuration, dict) or part not in configuration:
            return False
        configuration = configuration[part]
    return True


def _keys(found: Any, where: str, needed: Sequence[str], optional: Sequence[str]) -> Problems:
    """Missing keys, unknown ones, and known ones in the wrong case."""
    known = {key.lower(): key for key in (*needed, *optional)}
    for key in _mapping(found):
        right = known.get(str(key).lower())
        if right is not None and right != key:
            yield f"{where}: '{key}' is written '{right}'; the lite nucleus minds the case"
        elif str(key).lower() in {name.lower() for name in _NOT_ON_LITE} and right is None:
            yield f"{where}: the lite nucleus has no '{key}'"
        elif right is None:
            yield f"{where}: '{key}' is not known; known are {', '.join((*needed, *optional))}"
    for key in needed:
        if key.lower() not in {str(name).lower() for name in _mapping(found)}:
            yield f"{where} needs '{key}'"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
