"""Execution providers: an ordered list that always ends at the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from models.build.gguf_source import GgufSource
from models.build.pack import pack
from models.runtime.engine import Decoder, Embeddings
from models.runtime.providers import PROVIDERS, usable
from models.runtime.sessions import EngineOptions
from models.runtime.slowed import SlowedSession
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


def test_a_slowed_session_lasts_a_multiple_of_each_pass() -> None:
    class Session:
        def run_with_iobinding(self, binding: str) -> None:
            ticks.append(ticks[-1] + int(binding))

        def run_with_ort_values(self, names: str, feed: str) -> str:
            ticks.append(ticks[-1] + 10)
            return names + feed

        def get_providers(self) -> list[str]:
            return ["CPU"]

    ticks, slept = [0], []
    slowed = SlowedSession(Session(), 2.5, clock=lambda: ticks[-1], sleep=slept.append)
    slowed.run_with_iobinding("4")
    assert slowed.run_with_ort_values("a", "b") == "ab"
    assert slowed.get_providers() == ["CPU"]
    assert slept == [6.0, 15.0]


def test_a_slowed_decoder_says_the_same(tmp_path: Path) -> None:
    found = []
    for slowdown in (1.0, 1.5):
        with _decoder(tmp_path, "CPU", slowdown=slowdown).sequence() as sequence:
            found.append(np.stack([sequence.logits([5, 77]).copy(), sequence.logits([9]).copy()]))
    assert np.array_equal(found[0], found[1])


def _decoder(folder: Path, *providers: str, slowdown: float = 1.0) -> Decoder:
    packed = pack(GgufSource(write_gguf(folder / "tiny.gguf")), "fp32", None, quiet)
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    options = EngineOptions(threads=1, providers=providers, slowdown=slowdown)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, options)
