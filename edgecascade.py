"""The command line: a door that opens the rooms, and the one place that wires them.

A command lies beside its room, in a module or package named `commands`. What a room must not import is handed in
(`rooms`). Rooms are opened inside the commands, so that `--help` answers at once and no command needs what it does
not use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import bench.commands
import deploy.commands
import deploy.greengrass.commands
import deploy.kubernetes.commands
import deploy.local.commands
import deploy.rooms
import functions.dispatcher.commands
import models.commands
import scaler.commands
from bench.errors import BenchError
from bench.simulate.commands import simulate
from deploy.checkout import Checkout
from deploy.errors import DeployError
from functions.serving.secrets import SecretError
from functions.serving.settings import ConfigError
from models.errors import ModelError
from scaler.errors import ScalerError

if TYPE_CHECKING:
    from bench.bundle import Placed, Placing, Running, Scaling, Variant
    from bench.queries import Query
    from deploy.local.rebalance import Rebalanced
    from deploy.local.rolling import Rolling
    from deploy.stack import Stack
    from functions.serving.keys import Keys
    from scaler.placement.values import Plan, Problem

ROOT = Path(__file__).parent

COMMANDS: dict[str, Callable[..., None]] = {
    "simulate": simulate,
    "up": deploy.local.commands.up,
    "images": deploy.commands.images,
    "compose": deploy.commands.compose,
    "scaler": scaler.commands.scaler,
    "ask": bench.commands.ask,
    "eval": bench.commands.evaluate,
    "build": models.commands.build,
    "keys": models.commands.keys,
    "secrets": models.commands.make_secrets,
    "seal": models.commands.seal,
    "verify": models.commands.verify,
    "plan": scaler.commands.plan,
    "rebalance": scaler.commands.rebalance,
    "profile-node": bench.commands.profile_node,
    "demo": bench.commands.demo,
    "fetch-data": models.commands.fetch_data,
    "adapt": models.commands.adapt,
    "distil": models.commands.distil,
    "calibrate": models.commands.calibrate,
    "exits": models.commands.make_exits,
}
GROUPS = {
    "bench": bench.commands.app,
    "greengrass": deploy.greengrass.commands.app,
    "rules": functions.dispatcher.commands.app,
    "kubernetes": deploy.kubernetes.commands.app,
}

app = typer.Typer(
    help="Answer each request on the smallest model tier that can be trusted with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Run a command; a fault of ours is one sentence on stderr and status 1."""
    try:
        app(obj=rooms())
    except (BenchError, ConfigError, DeployError, ModelError, ScalerError, SecretError) as error:
        print(f"edgecascade: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def rooms() -> dict[type, object]:
    """What the commands of each room are handed of other rooms, by the class that says what they need."""
    data = Path(os.environ.get("EDGECASCADE_DATA") or ROOT.parent / "shared" / "data")
    handed = (
        bench.commands.Rooms(
            smollm2=_smollm2,
            home=_home,
            data=data,
            published=_published,
            service=_service,
            start=_variants,
            autoscaled=_autoscaled,
            site=_bundle,
            whole=_whole,
            placed=_placed,
        ),
        deploy.rooms.Rooms(_checkout(), _ensure_edge, _layers, _problem),
        _models(),
        scaler.commands.Rooms(_problem),
    )
    return {type(one): one for one in handed}


def _models() -> models.commands.Rooms:
    return models.commands.Rooms(_home, _bar, _keys, _signing_key, _write_api_key)


# ---- what each room gives ----


def _keys(key_file: str, kms_key_id: str, public_key: str) -> Keys:
    """The keys that options and environment name; this process dumps no core from here on."""
    from functions.serving.keys import forbid_core_dumps, open_keys
    from functions.serving.settings import Environment, KeySettings

    named = {"MODEL_KEY_FILE": key_file, "MODEL_KMS_KEY_ID": kms_key_id, "MODEL_PUBLIC_KEY": public_key}
    forbid_core_dumps()
    return open_keys(KeySettings.read(Environment({"MODEL_KEY": os.environ.get("MODEL_KEY", ""), **named})))


def _signing_key(path: str) -> bytes:
    from functions.serving.keys import read_signing_key

    return read_signing_key(path)


def _write_api_key(path: Path) -> None:
    from functions.serving.api_keys import write_api_key

    write_api_key(path)


def _bar(what: str) -> AbstractContextManager[Callable[[float, float, str], None]]:
    from bench.progress import bar

    return bar(what)


def _smollm2(report: Any) -> Path:
    from models.build.fetch import fetch_smollm2

    return fetch_smollm2(_home() / "cache", report)


def _published(folder: Path, split: str, *skills: str) -> list[Query]:
    """One split of the published sets."""
    from bench.queries import Query
    from models.build.datasets import load

    found = load(folder, split, skills)
    return [Query(e.skill, e.text, e.intent, dict(e.frame.slots)) for e in found]


def _layers(tier: Path) -> int:
    from models.artifact.store import Artifact

    return Artifact.open(tier).manifest.architecture.n_layers


def _problem(nodes: Sequence[Path], model: Path) -> Problem:
    """Nodes files and a tier, as placement has them."""
    from models.artifact.sizes import sizes
    from models.artifact.store import Artifact
    from scaler.placement import read

    found = Artifact.open(model).manifest
    return read.problem(nodes, sizes(found), f"{found.model_id} {found.quantisation}")


def _checkout() -> Checkout:
    return Checkout(ROOT, os.environ)


def _home() -> Path:
    return _checkout().site().home


def _ensure_edge(stack: Stack) -> None:
    """Build the shipped edge tier if there is none yet."""
    out = _home() / "edge"
    if "edge" in stack.functions and not (out / "manifest.json").is_file():
        adapter = ROOT / "models" / "tiers" / "edge"
        models.commands.build_tier(
            _models(), "smollm2", out, adapter if adapter.is_dir() else None, "int4", prefill=True
        )


# ---- bundles for a while; their logs are shown only if they do not start ----


def _silent(_name: str, _line: str) -> None:
    pass


@contextmanager
def _bundle(site: str, variables: Mapping[str, str]) -> Iterator[str]:
    """One site of stack.yml behind a gateway of its own, or all of it."""
    from deploy.local.bundle import running

    stack = _checkout().stack(site=site, variables=variables)
    _ensure_edge(stack)
    with running(stack, _checkout().settings(), _silent) as address:
        yield address


@contextmanager
def _service(url: str, variables: Mapping[str, str]) -> Iterator[str]:
    """The named bundle, the local one, or one started here, which is the only one that `variables` are for."""
    from deploy.local.bundle import answers

    local = f"http://127.0.0.1:{os.environ.get('EDGECASCADE_PORT', deploy.local.commands.DEFAULT_PORT)}"
    if url or (not variables and answers(local)):
        yield url.rstrip("/") or local
        return
    print("no bundle runs here: starting one for the while (`edgecascade up` keeps one running)", file=sys.stderr)
    with _bundle("", variables) as address:
        yield address


@contextmanager
def _variants(variants: Mapping[str, Variant]) -> Iterator[Running]:
    """The named variants of the stack's functions."""
    from bench.bundle import Running
    from deploy.local.bundle import Bundle

    whole = _checkout().stack()
    _ensure_edge(whole.only(tuple({variant.of for variant in variants.values()})))
    stack = whole.varied({name: (variant.of, variant.environment) for name, variant in variants.items()})
    with Bundle(stack, _checkout().settings(), _silent) as bundle:
        urls = {name: f"http://127.0.0.1:{port}" for name, port in bundle.ports.items()}
        yield Running(urls, {process.name: process.pid for process in bundle.processes})


@contextmanager
def _autoscaled(variants: Mapping[str, Variant], scaling: Scaling) -> Iterator[str]:
    """The named variants behind a gateway, one of them under the autoscaler."""
    from deploy.local.autoscale import Autoscale, Timing, autoscaled

    stack = _checkout().stack().varied({name: (variant.of, variant.environment) for name, variant in variants.items()})
    _ensure_edge(stack)
    timing = Timing(down_window_s=10.0)  # the scaler holds besides
    held = scaling.slo_s, scaling.percentile, scaling.minimum, scaling.maximum
    options = Autoscale((scaling.function,), *held, timing, scaling.record)
    with autoscaled(stack, _checkout().settings(), options, _silent) as (bundle, running):
        yield bundle.url
    if running.failure is not None:
        raise running.failure


@contextmanager
def _whole() -> Iterator[Rolling]:
    """All of stack.yml, its functions joined by the gateway."""
    from deploy.local.rolling import Rolling

    stack = _checkout().stack()
    _ensure_edge(stack)
    with Rolling(stack, _checkout().settings(), _silent) as bundle:
        yield bundle


@contextmanager
def _placed(placing: Placing) -> Iterator[Placed]:
    """The edge tier under the rebalancer."""
    from deploy.local.rebalance import Rebalance, rebalanced

    edge = "edge"
    stack = _checkout().stack((edge,)).varied({edge: (edge, placing.environment)})
    options = Rebalance(placing.problem, edge, policy=placing.policy, slowdown=placing.slowdown)
    with rebalanced(stack, _checkout().settings(), options, _silent, placing.told) as (bundle, running):
        yield _PlacedHere(f"{bundle.url}/function/{edge}", running)
        if running.failure is not None:
            raise running.failure


@dataclass(frozen=True)
class _PlacedHere:
    """What the benches see of the rebalancer."""

    url: str
    running: Rebalanced

    @property
    def plan(self) -> Plan:
        return self.running.controller.state.plan

    def throttle(self, node: str, factor: float) -> None:
        self.running.throttle(node, factor)

    def kill(self, node: str) -> int:
        return self.running.chain.kill(node)


if __name__ == "__main__":
    main()
