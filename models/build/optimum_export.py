"""Export a model by optimum, take the graph apart, and write it as an artifact. Needs torch; holds the whole model."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from models.artifact.manifest import EXPORTED, Manifest
from models.artifact.names import PLAIN, TOKENIZER, graph_file
from models.artifact.shape import SILU, LlamaShape
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.build import reference
from models.build.assemble import OPTIMUM, BuildKey, up_to_date
from models.build.dissect import BITS, Dissected, dissect
from models.build.hub_source import HubFolder
from models.build.losses import Losses, Tally, check, describe, probe
from models.build.measure import CHECKED_TEXTS, CHECKED_TOKENS
from models.build.progress import Report
from models.build.reference import Expected
from models.build.source import Floats
from models.errors import SourceError
from models.runtime.exported import ExportedDecoder
from models.runtime.sessions import EngineOptions

USUAL_ROPE_THETA = 10000.0


def build_exported(
    folder: HubFolder, out: Path, quant: str, report: Report, texts: Sequence[Sequence[int]] = ()
) -> Artifact:
    """Write the artifact of a Hugging Face folder's model, as optimum exports it, to `out`.

    Raises `SourceError` or `ArtifactError`; whatever happens, `out` holds the old artifact or the new one.
    """
    if quant not in BITS:
        raise SourceError(f"an exported graph is stored as one of {', '.join(BITS)}, not as '{quant}'")
    if not reference.can_load() or not importlib.util.find_spec("optimum"):
        raise SourceError("--via optimum needs torch, transformers and optimum: pip install -e '.[optimum]'")
    key = BuildKey(folder.digest(), None, quant, merged=False, via=OPTIMUM)
    cached = up_to_date(out, key, report)
    if cached:
        return cached
    artifact = write_artifact(out, lambda writer: _fill(writer, folder, key, texts, report))
    report(1, 1, describe(artifact.manifest.losses))
    return artifact


def _fill(
    writer: ArtifactWriter, folder: HubFolder, key: BuildKey, texts: Sequence[Sequence[int]], report: Report
) -> Manifest:
    steps = 5
    report(0, steps, "transformers reads the model")
    model = reference.load(folder.path)
    tokenizer = folder.tokenizer()
    numbers = model.config
    report(1, steps, "optimum exports it")
    exported = _export(model)
    shape = _shape(numbers, exported)
    found = probe(tokenizer, None, shape, texts, lm_head=True)
    expected = reference.expect(model, [ids[:CHECKED_TOKENS] for ids in found.tokens[:CHECKED_TEXTS]])
    del model
    report(2, steps, "taking the graph apart")
    exact = dissect(exported, "fp32", shape.vocab_size)
    packed = exact if key.quantisation == "fp32" else dissect(exported, key.quantisation, shape.vocab_size)
    del exported
    report(3, steps, "comparing with the source")
    made = {
        "key": asdict(key),
        "with": {name: version(name) for name in ("edgecascade", "onnx", "numpy", "optimum-onnx", "torch")},
        "checked": _checked(shape, exact, expected),
    }
    losses = Losses() if packed is exact else _losses(shape, packed, exact, found.tokens)
    report(4, steps, "writing")
    writer.add_bytes(TOKENIZER, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode())
    writer.add_grouped(packed.tensors)
    writer.add_bytes(graph_file(PLAIN, 0), packed.graph(last_only=True))
    return Manifest(
        model_id=folder.model_id,
        model_version=f"{key.quantisation}-{key.source[:8]}-{OPTIMUM}",
        architecture=shape,
        quantisation=key.quantisation,
        eos_ids=tuple(folder.eos_ids),
        chat_template=folder.chat_template,
        lm_head=True,
        losses=losses,
        made=made,
        graph=EXPORTED,
    )


def _export(model: Any) -> ModelProto:
    """Let optimum write the model with its key-value memory, and read that back; raises `SourceError`."""
    from optimum.exporters.onnx import onnx_export_from_model

    logging.getLogger("optimum").setLevel(logging.ERROR)  # its hints are for those who call it themselves
    with tempfile.TemporaryDirectory(prefix="edgecascade.export.") as work:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer's, about shapes that are constant on purpose
                onnx_export_from_model(model, work, task="text-generation-with-past", do_validation=False)
            return onnx.load(Path(work) / "model.onnx")
        except OSError:
            raise
        except Exception as error:  # torch and optimum raise whatever they like
            said = str(error).strip().partition("\n")[0]
            raise SourceError(f"optimum cannot export this model: {said}") from error


def _shape(config: Any, exported: ModelProto) -> LlamaShape:
    """The model's numbers; those of the attention are read off the graph's memory."""
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in exported.graph.input}
    memory = dims["past_key_values.0.key"]
    shape = LlamaShape(
        n_layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        n_heads=int(config.num_attention_heads),
        n_kv_heads=memory[1],
        head_dim=memory[3],
        mlp_width=int(_first(config, "intermediate_size", "n_inner") or 4 * config.hidden_size),
        vocab_size=int(config.vocab_size),
        context=int(_first(config, "max_position_embeddings", "seq_length") or 2048),
        rope_theta=float(_first(config, "rope_theta", "rotary_emb_base") or USUAL_ROPE_THETA),
        norm_eps=float(_first(config, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") or 1e-5),
        activation=SILU,
    )
    if fault := shape.fault():
        raise SourceError(f"the exported model has a '{fault}' that cannot be")
    return shape


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


class _Whole:
    """A dissected model that gives logits (T, V) at every position."""

    def __init__(self, shape: LlamaShape, parts: Dissected) -> None:
        decoder = ExportedDecoder(shape, parts.graph(last_only=False), parts.tensors, EngineOptions(spin=False))
        self._sequence = decoder.fresh()

    def logits(self, ids: Sequence[int]) -> Floats:
        self._sequence.reset()
        return self._sequence.all_logits(ids)


def _checked(shape: LlamaShape, exact: Dissected, expected: Sequence[Expected]) -> Mapping[str, Any]:
    """Hold the fp32 graph against transformers: logits at once, then the greedy answer token by token."""
    name = f"transformers {version('transformers')}"
    whole = _Whole(shape, exact)
    checked = check(name, expected, lambda index: whole.logits(expected[index].ids))
    decoder = ExportedDecoder(shape, exact.graph(last_only=True), exact.tensors, EngineOptions(spin=False))
    sequence = decoder.fresh()
    for case in expected:
        sequence.reset()
        new: Sequence[int] = case.ids[: case.n_prompt]
        for position in range(case.n_prompt, len(case.ids)):
            logits = sequence.logits(new)
            if np.abs(logits - case.logits[position - 1]).max() > 0.01 * case.logits.std():
                raise SourceError(f"the exported graph decodes otherwise than {name}; nothing was written")
            new = (case.ids[position],)
    return checked


def _losses(shape: LlamaShape, packed: Dissected, exact: Dissected, texts: Sequence[Sequence[int]]) -> Losses:
    tally = Tally()
    ours, reference_ = _Whole(shape, packed), _Whole(shape, exact)
    for ids in texts:
        tally.add(ours.logits(ids), reference_.logits(ids))
    return tally.losses("token")
