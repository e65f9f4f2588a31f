"""An artifact from outside: nothing but plain files of the announced sizes is read, and no graph reaches out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from models.artifact.manifest import FileEntry, Manifest
from models.artifact.names import MANIFEST, TOKENIZER, Span
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.errors import ArtifactError
from models.runtime.sessions import EngineOptions, Segment, _session
from tests.test_artifact_store import fill

WEIGHTS = "layer-000.safetensors"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "a", fill)


def moved_away(artifact: Artifact, name: str) -> Path:
    """Put a file of the artifact somewhere else."""
    return (artifact.path / name).rename(artifact.path.parent / name)


@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, WEIGHTS])
def test_links_are_not_followed(artifact: Artifact, name: str) -> None:
    elsewhere = moved_away(artifact, name)
    (artifact.path / name).symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="symbolic link"):
        Artifact.open(artifact.path).read(name)
    (artifact.path / name).unlink()
    (artifact.path / name).hardlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="hard link"):
        Artifact.open(artifact.path).read(name)
    elsewhere.unlink()
    assert name == MANIFEST or Artifact.open(artifact.path).read(name)


def test_the_folder_itself_may_be_a_link(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("a")
    assert Artifact.open(tmp_path / "current").read(TOKENIZER) == b"{}"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_what_is_no_file_is_refused_without_waiting(artifact: Artifact, name: str, kind: str) -> None:
    moved_away(artifact, name)
    if kind == "pipe":
        os.mkfifo(artifact.path / name)
    else:
        (artifact.path / name).mkdir()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Artifact.open(artifact.path).read(name)


@pytest.mark.parametrize("delta", [-1, 1, 1 << 40])
def test_a_size_is_checked_before_anything_is_read(artifact: Artifact, delta: int) -> None:
    """The last of these is a terabyte with holes; reading it would not end."""
    path = artifact.path / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + delta)
    with pytest.raises(ArtifactError, match=WEIGHTS):
        artifact.read(WEIGHTS)


@pytest.mark.parametrize(("name", "size_bytes"), [(WEIGHTS, 17 << 30), (TOKENIZER, 1 << 30)])
def test_no_file_is_too_large_to_be_refused(tmp_path: Path, name: str, size_bytes: int) -> None:
    def pretend(writer: ArtifactWriter) -> Manifest:
        manifest = fill(writer)
        writer._files[name] = FileEntry("0" * 64, size_bytes)
        return manifest

    artifact = write_artifact(tmp_path / "a", pretend)
    with (artifact.path / name).open("r+b") as file:
        file.truncate(size_bytes)
    with pytest.raises(ArtifactError, match="at most"):
        artifact.read(name)


def test_a_manifest_is_not_read_without_end(artifact: Artifact) -> None:
    with (artifact.path / MANIFEST).open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(ArtifactError, match="at most"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("location", ["w.bin", "../w.bin", "{folder}/w.bin", "/dev/zero"])
def test_a_graph_that_names_a_file_of_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """Weights are handed in; were the file read, onnxruntime would take what lies there for weights."""
    (tmp_path / "w.bin").write_bytes(bytes(16))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path if location == "w.bin" else tmp_path / "below")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.format(folder=tmp_path))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    segment = Segment(Span(0, 1, "final_norm", head=False), model.SerializeToString(), {})
    with pytest.raises(ArtifactError, match="External data path"):
        _session(segment, EngineOptions(threads=1))
