"""`edgecascade kubernetes render`: an overlay's manifests, and the files of the tree that follow from stack.yml."""

from __future__ import annotations

import json
import re
from pathlib import Path

from deploy.errors import ManifestError
from deploy.kubernetes.dashboard import dashboard
from deploy.kubernetes.rules import groups
from deploy.kubernetes.scaling import SCALER, Place, by_prometheus, by_scaler, tiers
from deploy.kubernetes.shards import head_patch, others
from deploy.kubernetes.tree import Manifest, build, dump, dump_one, folder
from deploy.kubernetes.workloads import PART_OF, at_the_edge, plain, site_of
from deploy.stack import Stack

TREE = Path(__file__).parent
OVERLAYS = "overlays"
CUTS = ("0-14", "15-29")
"""The shipped edge tier's 30 layers, in two."""
REBALANCE = f"{OVERLAYS}/rebalance/rebalance.yaml"
_HEAD = "# Follows from stack.yml: `edgecascade kubernetes render --kustomize` writes it.\n"
_OPENFAAS = Place("openfaas-fn", "http://prometheus.openfaas.svc:9090")
_PLAIN = Place(PART_OF, "http://prometheus-operated.monitoring.svc:9090")


def overlays() -> list[str]:
    """The names that `render` takes."""
    return sorted(path.name for path in (TREE / OVERLAYS).iterdir() if path.is_dir())


def of_site(stack: Stack, site: str) -> Stack:
    """Keep the functions of one site, all of them for an empty one; raises `ManifestError` where it has none."""
    names = tuple(function.name for function in stack.functions.values() if not site or site_of(function) == site)
    if not names:
        raise ManifestError(f"no function of stack.yml is of the site '{site}'; sites are device and edge")
    return stack.only(names)


def render(stack: Stack, overlay: str) -> list[Manifest]:
    """The manifests of an overlay, of this very stack; raises `ManifestError`."""
    if overlay not in overlays():
        raise ManifestError(f"there is no overlay '{overlay}'; there are {', '.join(overlays())}")
    made = build(folder(TREE, derived(stack)), f"{OVERLAYS}/{overlay}")
    return sorted(made, key=lambda manifest: manifest["kind"] != "Namespace")


def derived(stack: Stack) -> dict[str, str]:
    """Every file of the tree that follows from the stack: path below deploy/kubernetes → text."""
    scaled = tiers(stack)
    # A DaemonSet's pods are counted by its nodes: of the tiers at the edge only Deployments are scaled.
    at_edge = [tier for tier in scaled if site_of(tier) == "edge"]
    rules = groups(scaled)
    return {
        "base/scaler.yaml": _with_image(stack, (TREE / "base/scaler.yaml").read_text("utf-8")),
        "openfaas/scaling.yaml": _file(by_scaler(scaled, _OPENFAAS)),
        "overlays/plain/functions.yaml": _file(plain(stack)),
        "overlays/plain/scaling.yaml": _file(by_scaler(scaled, _PLAIN)),
        "overlays/kubeedge/functions.yaml": _file(at_the_edge(stack)),
        "overlays/kubeedge/scaling.yaml": _file(by_scaler(at_edge, _PLAIN)),
        **_sharded(stack),
        REBALANCE: _with_image(stack, (TREE / REBALANCE).read_text("utf-8")),
        "overlays/prometheus-trigger-only/scaling.yaml": _file(by_prometheus(scaled, _OPENFAAS)),
        "monitoring/edgecascade.rules.yml": _HEAD + dump_one(rules),
        "monitoring/rule.yaml": _file([_prometheus_rule(rules)]),
        "monitoring/dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
    }


def write(texts: dict[str, str], tree: Path) -> list[Path]:
    """Write files of the tree; returns those that changed."""
    changed = []
    for name, text in texts.items():
        path = tree / name
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            changed.append(path)
    return changed


def whole(stack: Stack) -> dict[str, str]:
    """The tree as it is to be applied: what is written by hand, and what follows from this stack."""
    by_hand = {
        str(path.relative_to(TREE)): path.read_text("utf-8")
        for path in sorted(TREE.rglob("*"))
        if path.suffix in {".yaml", ".yml", ".json"}
    }
    return {**by_hand, **derived(stack)}


def _sharded(stack: Stack) -> dict[str, str]:
    """The overlay that cuts the edge tier, if the stack has one."""
    tier = stack.functions.get("edge")
    if tier is None:
        return {}
    return {
        "overlays/shards/head.yaml": _file([head_patch(tier, CUTS)]),
        "overlays/shards/shards.yaml": _file(others(tier, CUTS)),
    }


def _with_image(stack: Stack, text: str) -> str:
    """A manifest written by hand, with the scaler's image beside those of the functions: registry and tag alike."""
    image = next(iter(stack.functions.values())).image
    registry, _, rest = image.rpartition("/")
    _, _, tag = rest.partition(":")
    name = f"{registry}/{SCALER}" if registry else SCALER
    return re.sub(rf"image: \S*{SCALER}\S*", f"image: {name}:{tag or 'latest'}", text)


def _file(manifests: list[Manifest]) -> str:
    return _HEAD + dump(manifests)


def _prometheus_rule(rules: dict[str, object]) -> Manifest:
    """For the Prometheus operator: the rule file as its `spec`."""
    labels = {"app.kubernetes.io/part-of": PART_OF}
    metadata = {"name": "edgecascade", "labels": labels}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": rules}
