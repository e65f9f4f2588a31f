"""An artifact is read strictly, checked file by file, and written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from models.artifact.manifest import Energy, Manifest, Sealed, parse_manifest
from models.artifact.names import MANIFEST, TOKENIZER, Span, file_of, spans
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.artifact.tensors import read_tensors, tensor_pieces
from models.errors import ArtifactError
from tests.tiny_models import SHAPE, SKILLS

PLAIN_MANIFEST = Manifest(
    model_id="tiny",
    model_version="1",
    architecture=SHAPE,
    quantisation="int4",
    eos_ids=(2,),
    chat_template="{{ messages }}",
    lm_head=True,
    skills=SKILLS,
    exits=(1, 2),
    calibration={"lamp": {"threshold": 0.5}},
    energy=Energy(3.5, "made up"),
    losses={"mean_kl": 0.1},
    made={"by": "a test"},
)
SEALED_MANIFEST = replace(PLAIN_MANIFEST, sealed=Sealed("local", "00ff", b"wrapped"))


def fill(writer: ArtifactWriter) -> Manifest:
    writer.add_bytes(TOKENIZER, b"{}")
    writer.add_grouped({"layers.0.w": np.ones((2, 2), np.float32), "head.w": np.zeros(3, np.float32)})
    return PLAIN_MANIFEST


def test_a_manifest_comes_back_as_it_was() -> None:
    for manifest in (PLAIN_MANIFEST, SEALED_MANIFEST):
        assert parse_manifest(manifest.as_json()) == manifest


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda m: m.update(colour="red"), "unknown key 'colour'"),
    "unknown key inside": (lambda m: m["model"].update(size=1), "unknown key 'model.size'"),
    "unknown architecture key": (lambda m: m["architecture"].update(experts=8), "unknown key 'architecture.experts'"),
    "missing key": (lambda m: m.pop("eos_ids"), "lacks the key 'eos_ids'"),
    "wrong type": (lambda m: m.update(lm_head=1), "'lm_head' has the wrong type"),
    "bool for a number": (lambda m: m["architecture"].update(width=True), "'architecture.width' has the wrong type"),
    "not positive": (lambda m: m["architecture"].update(n_layers=0), "'architecture.n_layers' is not positive"),
    "other schema": (lambda m: m.update(schema=1), "schema 1"),
    "no word on sealing": (lambda m: m.pop("sealed"), "lacks the key 'sealed'"),
    "sealed by half": (lambda m: m["sealed"].pop("key_id"), "lacks the key 'sealed.key_id'"),
    "sealed and more": (lambda m: m["sealed"].update(chunk_bytes=1), "unknown key 'sealed.chunk_bytes'"),
    "no provider": (lambda m: m["sealed"].update(provider="../x"), "'sealed'"),
    "no key id": (lambda m: m["sealed"].update(key_id="a\nb"), "'sealed'"),
    "wrapped key not base64": (lambda m: m["sealed"].update(wrapped_key="a?b="), "'sealed.wrapped_key'"),
    "no wrapped key": (lambda m: m["sealed"].update(wrapped_key=""), "'sealed.wrapped_key'"),
    "wrapped key beyond size": (lambda m: m["sealed"].update(wrapped_key="AAAA" * 4000), "'sealed.wrapped_key'"),
    "a parent": (lambda m: m["files"].update({"..": {"sha256": "0" * 64, "size_bytes": 1}}), "files..."),
    "files without end": (
        lambda m: m["files"].update({f"f{n}": {"sha256": "0" * 64, "size_bytes": 1} for n in range(10_001)}),
        "'files'",
    ),
    "unknown quantisation": (lambda m: m.update(quantisation="int2"), "'int2'"),
    "exit outside": (lambda m: m.update(exits=[1, 3]), "'exits'"),
    "exits falling": (lambda m: m.update(exits=[2, 1]), "'exits'"),
    "path for a name": (lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "size_bytes": 1}}), "files.../x"),
    "short digest": (lambda m: m["files"].update(x={"sha256": "00", "size_bytes": 1}), "files.x"),
    "malformed skill": (lambda m: m["skills"].update(lamp=3), "'skills'"),
    "negative id": (lambda m: m.update(eos_ids=[-1]), "'eos_ids'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_is_not_right_is_refused_by_name(change: str) -> None:
    values = json.loads(SEALED_MANIFEST.as_json())
    alter, word = CHANGES[change]
    alter(values)
    with pytest.raises(ArtifactError, match="manifest") as caught:
        parse_manifest(json.dumps(values))
    assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="JSON"):
        parse_manifest(text)


def test_an_artifact_is_written_and_read(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", fill)
    assert Artifact.open(tmp_path / "a") == artifact
    assert set(artifact.manifest.files) == {TOKENIZER, "layer-000.safetensors", "head.safetensors"}
    assert np.array_equal(artifact.tensors("layer-000.safetensors")["layers.0.w"], np.ones((2, 2)))


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_an_altered_file_is_refused_when_it_is_read(tmp_path: Path, damage: str) -> None:
    artifact = write_artifact(tmp_path / "a", fill)
    path = tmp_path / "a" / "layer-000.safetensors"
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "change" else data[:-5])
    with pytest.raises(ArtifactError, match="layer-000"):
        artifact.tensors("layer-000.safetensors")
    artifact.tensors("head.safetensors")


def test_a_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", fill)
    (tmp_path / "a" / "more.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no file"):
        artifact.read("more.bin")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(writer: ArtifactWriter) -> Manifest:
        fill(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path / "a", stop)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_artifact(tmp_path: Path) -> None:
    old = write_artifact(tmp_path / "a", fill)

    def fail(_writer: ArtifactWriter) -> Manifest:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ArtifactError, match="cannot be written: Input/output error"):
        write_artifact(tmp_path / "a", fail)
    assert Artifact.open(tmp_path / "a") == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: ArtifactWriter) -> Manifest:
        fill(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="no space left"):
        write_artifact(tmp_path / "deep" / "a", fail)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ArtifactError, match="not an artifact"):
        write_artifact(tmp_path / "a", fill)
    assert (tmp_path / "a" / "thesis.txt").exists()


def test_what_is_no_artifact_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="edgecascade build"):
        Artifact.open(tmp_path / "nowhere")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not an artifact"):
        Artifact.open(tmp_path)


def test_another_calibration_changes_nothing_else(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", fill)
    changed = artifact.recalibrated({"lamp": {"threshold": 0.9}})
    assert Artifact.open(tmp_path / "a") == changed
    assert changed.manifest.calibration == {"lamp": {"threshold": 0.9}}
    assert changed.manifest.files == artifact.manifest.files


def test_tensor_names_say_their_files() -> None:
    assert file_of("layers.12.qkv.q") == "layer-012.safetensors"
    assert file_of("adapter.3.out.a") == "adapter-003.safetensors"
    assert file_of("final_norm") == file_of("head.q") == "head.safetensors"
    assert file_of("embeddings.w") == "embeddings.safetensors"


def test_spans_cover_the_layers_in_order() -> None:
    assert spans(6, (), lm_head=True) == [Span(0, 6, "final_norm", head=True)]
    assert spans(6, (2, 4), lm_head=False) == [
        Span(0, 2, "layers.1.exit_norm", head=False),
        Span(2, 4, "layers.3.exit_norm", head=False),
        Span(4, 6, "final_norm", head=False),
    ]


def test_bfloat16_is_widened() -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes.fromhex("803f00c0")
    assert read_tensors(data, "x")["x"].tolist() == [1.0, -2.0]


TENSORS = st.dictionaries(
    st.text("ab.é0", min_size=1, max_size=5),
    st.tuples(st.sampled_from(["f4", "f2", "u1", "i1", "i4", "i8", "?"]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@given(TENSORS)
def test_tensors_are_laid_out_as_the_library_does(tensors: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(7)
    tensors = {name: rng.integers(0, 2, dims).astype(kind) for name, (kind, dims) in tensors.items()}
    assert b"".join(tensor_pieces(tensors)) == save(tensors)


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_truncated_tensor_file_is_refused(cut: int) -> None:
    data = save({"x": np.arange(6, dtype=np.float32)})
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        read_tensors(data[:cut], "x")
