"""Execution providers: an ordered list that always ends at the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from models.build.gguf_source import GgufSource
from models.build.pack import pack
from models.runtime.engine import Decoder, Embeddings, EngineOptions
from models.runtime.providers import PROVIDERS, usable
from tests.tiny_models import quiet, write_gguf

HERE = ("OpenVINOExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["CPU"], ["CPUExecutionProvider"]),
        ([], ["CPUExecutionProvider"]),
        (["CUDA", "TensorRT"], ["CPUExecutionProvider"]),
        (["CUDA", "OpenVINO"], list(HERE)),
        (["CPU", "OpenVINO"], list(reversed(HERE))),
        (["OpenVINO", "OpenVINO", "CPU"], list(HERE)),
    ],
)
def test_absent_providers_are_passed_over(wanted: Sequence[str], found: Sequence[str]) -> None:
    assert usable(wanted, HERE) == found


def test_names_are_onnxruntimes() -> None:
    assert set(PROVIDERS.values()) <= {*ort.get_all_providers(), "ROCMExecutionProvider", "QNNExecutionProvider"}


def test_a_decoder_falls_back_to_the_cpu(tmp_path: Path) -> None:
    assert _decoder(tmp_path, "TensorRT", "CUDA").provider == "CPU"


def test_openvino_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    """In an environment of its own: `pip install onnxruntime-openvino` in place of onnxruntime."""
    if PROVIDERS["OpenVINO"] not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no OpenVINO; it comes with the package onnxruntime-openvino")
    ids = [5, 77, 140, 9, 260, 33]
    found = {}
    for provider in ("CPU", "OpenVINO"):
        engine = _decoder(tmp_path, provider)
        assert engine.provider == provider
        with engine.sequence() as sequence:
            found[provider] = np.stack(
                [sequence.logits(ids[:4]).copy(), *(sequence.logits([i]).copy() for i in ids[4:])]
            )
    assert np.allclose(found["CPU"], found["OpenVINO"], atol=0.01 * np.abs(found["CPU"]).max())


def _decoder(folder: Path, *providers: str) -> Decoder:
    packed = pack(GgufSource(write_gguf(folder / "tiny.gguf")), "fp32", None, quiet)
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    options = EngineOptions(threads=1, providers=providers)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, options)
