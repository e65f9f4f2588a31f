"""A sealed tier answers like the plain one, opens for nobody else, and leaves no weights in the clear anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.check import check
from models.artifact.keys import (
    PUBLIC,
    SEALING,
    SIGNING,
    LocalKey,
    check_signature,
    key_text,
    parse_key,
    public_key_of,
    sign_manifest,
)
from models.artifact.names import EMBEDDINGS, HEAD, LABELS, MANIFEST, SIGNATURE, TOKENIZER, in_range
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.seal import seal_artifact, write_keys
from models.errors import ArtifactError, KeyUnavailableError, SealError
from models.runtime.local import LocalTier
from models.runtime.tier import Completion, Limits, SkillQuery
from tests.tiny_models import quiet, write_adapter, write_gguf

ROOT = Path(__file__).parents[1]
KEYS, SIGNING_KEY = LocalKey(bytes(range(32))), bytes(range(32, 64))
SIGNER = public_key_of(SIGNING_KEY)
PROMPTS = (Completion(" the"), SkillQuery("radio", "play that song"), SkillQuery("lamp", "on"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    build(source, folder / "tier", "int4", write_adapter(folder / "adapter", source), quiet)
    return folder / "tier"


@pytest.fixture(scope="module")
def sealed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sealed") / "tier"
    seal_artifact(Artifact.open(plain), out, KEYS, SIGNING_KEY, quiet)
    return out


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    """The sealed tier, to be tampered with."""
    (tmp_path / "tier").mkdir()
    for file in sealed.iterdir():
        (tmp_path / "tier" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "tier"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values), "utf-8")


def answers(tier: LocalTier) -> list[Any]:
    return [list(tier.generate(prompt, Limits(max_tokens=8))) for prompt in PROMPTS]


# ---- it works ----


def test_sealed_or_not_the_answers_are_the_same(plain: Path, sealed: Path) -> None:
    one = LocalTier.open(plain, "edge", threads=1)
    two = LocalTier.open(sealed, "edge", threads=1, keys=KEYS, signer=SIGNER)
    assert answers(one) == answers(two)


def test_every_file_but_the_manifest_is_sealed(plain: Path, sealed: Path) -> None:
    before, after = Artifact.open(plain), Artifact.open(sealed, keys=KEYS)
    assert list(after.files) == list(before.files)
    for name in before.files:
        assert after.read(name) == before.read(name)
        assert (sealed / name).read_bytes()[:6] == b"ECSEAL"
    assert {p.name for p in sealed.iterdir()} == {MANIFEST, SIGNATURE, *before.files}


def test_sealing_twice_repeats_nothing(plain: Path, sealed: Path, tmp_path: Path) -> None:
    again = seal_artifact(Artifact.open(plain), tmp_path / "again", KEYS, None, quiet)
    first = Artifact.open(sealed, keys=KEYS)
    assert again.manifest.sealed != first.manifest.sealed
    assert all((again.path / n).read_bytes() != (sealed / n).read_bytes() for n in again.files)


def test_an_artifact_may_be_sealed_in_its_own_place(plain: Path, tmp_path: Path) -> None:
    here = tmp_path / "tier"
    here.mkdir()
    for file in plain.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    seal_artifact(Artifact.open(here), here, KEYS, None, quiet)
    assert not check(Artifact.open(here, keys=KEYS)).faulty
    assert [p.name for p in tmp_path.iterdir()] == ["tier"]


def test_interrupted_sealing_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    def stop(done: int, _total: int, _text: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal_artifact(Artifact.open(plain), tmp_path / "out", KEYS, None, stop)
    assert not list(tmp_path.iterdir())


def test_no_room_is_one_sentence_and_leaves_the_old(plain: Path, tmp_path: Path) -> None:
    before = seal_artifact(Artifact.open(plain), tmp_path / "out", KEYS, None, quiet)

    def full(done: int, _total: int, _text: str) -> None:
        if done == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="no space left"):
        seal_artifact(Artifact.open(plain), tmp_path / "out", KEYS, None, full)
    assert Artifact.open(tmp_path / "out", keys=KEYS) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_sealed_is_not_sealed_again(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(SealError, match="sealed already"):
        seal_artifact(Artifact.open(sealed, keys=KEYS), tmp_path / "out", KEYS, None, quiet)


# ---- a stolen device ----

_RUN = """
import resource, sys
path, secret, limit_bytes = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
from pathlib import Path
from models.artifact.keys import LocalKey
from models.runtime.local import LocalTier
from models.runtime.tier import Completion, Limits, SkillQuery
tier = LocalTier.open(Path(path), "edge", threads=1, keys=LocalKey(bytes.fromhex(secret)))
prompts = (Completion(" the"), SkillQuery("radio", "play that song"), SkillQuery("lamp", "on"))
print(ascii([list(tier.generate(prompt, Limits(max_tokens=8))) for prompt in prompts]), flush=True)
sys.stdin.read()
"""


def sealed_run(sealed: Path, folder: Path, limit_bytes: int) -> subprocess.Popen[str]:
    """A process that answers from the sealed tier; its home, temporary and working folders lie below `folder`."""
    for name in ("home", "temporary", "working"):
        (folder / name).mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temporary"),
    }
    command = [sys.executable, "-c", _RUN, str(sealed), KEYS.secret.hex(), str(limit_bytes)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder / "working", env=environment, stdin=pipe, stdout=pipe, text=True)


def windows(plain: Path) -> set[bytes]:
    """Pieces of 32 bytes from all over the plain files, but those with too little in them to be anyone's."""
    found: set[bytes] = set()
    for name in Artifact.open(plain).files:
        data = (plain / name).read_bytes()
        pieces = (data[at : at + 32] for at in range(0, len(data) - 31, max(32, len(data) // 64)))
        found |= {piece for piece in pieces if len(set(piece)) > 12}
    return found


def holds(folder: Path, pieces: set[bytes]) -> list[str]:
    """The files that hold any of the pieces."""
    datas = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    return [name for name, data in datas.items() if any(piece in data for piece in pieces)]


def test_a_sealed_run_leaves_no_weights_in_the_clear(plain: Path, sealed: Path, tmp_path: Path) -> None:
    pieces = windows(plain)
    assert len(holds(plain, pieces)) == len(Artifact.open(plain).files), "the search finds what lies in the clear"
    with sealed_run(sealed, tmp_path, 1 << 40) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("[[Token(")
        assert not holds(tmp_path, pieces)
        assert not holds(sealed, pieces)
        process.communicate()
    assert process.returncode == 0
    assert not holds(tmp_path, pieces)


def test_a_sealed_run_needs_to_write_no_file_at_all(plain: Path, sealed: Path, tmp_path: Path) -> None:
    """With a file size limit of 0 the kernel refuses every byte, wherever it goes and however briefly it lies there."""
    with sealed_run(sealed, tmp_path, 0) as process:
        said = process.communicate()[0]
    assert process.returncode == 0
    assert said.strip() == ascii(answers(LocalTier.open(plain, "edge", threads=1)))


# ---- tampering ----


@pytest.mark.parametrize("name", [TOKENIZER, "graph-plain-0.onnx", "layer-001.safetensors", "adapter-002.safetensors"])
def test_an_altered_file_is_refused_even_if_its_digest_is_made_to_fit(copy: Path, sealed: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(SealError, match=name):
        Artifact.open(copy, keys=KEYS).read(name)
    adopt_digests(copy)
    with pytest.raises(SealError, match=name):
        Artifact.open(copy, keys=KEYS).read(name)


def adopt_digests(folder: Path) -> None:
    """Make the manifest's digests those of the files that lie there, as a forger would."""

    def change(values: dict[str, Any]) -> None:
        for name, entry in values["files"].items():
            data = (folder / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    rewrite(folder, change)


def test_files_that_changed_places_are_refused(copy: Path) -> None:
    one, two = copy / "layer-000.safetensors", copy / "layer-001.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    adopt_digests(copy)
    for name in (one.name, two.name):
        with pytest.raises(SealError, match=name):
            Artifact.open(copy, keys=KEYS).read(name)


def test_a_file_of_another_sealing_is_refused(copy: Path, plain: Path, tmp_path: Path) -> None:
    other = seal_artifact(Artifact.open(plain), tmp_path / "other", KEYS, None, quiet)
    (copy / HEAD).write_bytes((other.path / HEAD).read_bytes())
    adopt_digests(copy)
    with pytest.raises(SealError, match="head"):
        Artifact.open(copy, keys=KEYS).read(HEAD)


def test_a_plain_file_in_a_sealed_artifact_is_refused(copy: Path, plain: Path) -> None:
    (copy / HEAD).write_bytes((plain / HEAD).read_bytes())
    adopt_digests(copy)
    with pytest.raises(SealError):
        Artifact.open(copy, keys=KEYS).read(HEAD)


def test_another_key_opens_nothing(sealed: Path) -> None:
    with pytest.raises(SealError, match="cannot be unwrapped"):
        Artifact.open(sealed, keys=LocalKey(bytes(32)))


def test_without_a_key_nothing_but_the_manifest_is_read(sealed: Path) -> None:
    artifact = Artifact.open(sealed)
    assert artifact.manifest.model_id
    with pytest.raises(SealError, match="no key was handed in"):
        artifact.read(TOKENIZER)
    with pytest.raises(SealError, match="no key was handed in"):
        LocalTier.open(sealed, "edge")


def test_a_key_takes_no_unsealed_artifact(plain: Path) -> None:
    with pytest.raises(SealError, match="not sealed"):
        Artifact.open(plain, keys=KEYS)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no seal": lambda m: m.update(sealed=None),
    "another model": lambda m: m["model"].update(id="other"),
    "another version": lambda m: m["model"].update(version="2"),
    "another provider": lambda m: m["sealed"].update(provider="aws-kms"),
    "another wrapped key": lambda m: m["sealed"].update(wrapped_key="AAAA"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_manifest_that_says_something_else_opens_nothing(copy: Path, what: str) -> None:
    rewrite(copy, FORGED[what])
    with pytest.raises(SealError):
        Artifact.open(copy, keys=KEYS)


# ---- the signature ----


@pytest.mark.parametrize("change", [lambda m: m["calibration"].update(lamp={}), lambda m: m.update(eos_ids=[1])])
def test_a_signed_manifest_cannot_be_changed(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    Artifact.open(copy, keys=KEYS, signer=SIGNER)
    rewrite(copy, change)
    Artifact.open(copy, keys=KEYS)
    with pytest.raises(SealError, match="signature"):
        Artifact.open(copy, keys=KEYS, signer=SIGNER)


def test_an_absent_a_foreign_and_a_cut_signature_are_refused(copy: Path) -> None:
    signature = (copy / SIGNATURE).read_bytes()
    with pytest.raises(SealError, match="signature"):
        Artifact.open(copy, signer=public_key_of(bytes(32)))
    for wrong in (b"", signature[:-1], signature + b"x", bytes(64), signature[::-1]):
        (copy / SIGNATURE).write_bytes(wrong)
        with pytest.raises(ArtifactError, match=r"manifest.s"):
            Artifact.open(copy, signer=SIGNER)
    (copy / SIGNATURE).unlink()
    with pytest.raises(SealError, match="not signed"):
        Artifact.open(copy, signer=SIGNER)


def test_the_signature_is_verified_before_anything_is_parsed(copy: Path) -> None:
    (copy / MANIFEST).write_bytes(b'{"schema": 99, \xff')
    with pytest.raises(SealError, match="signature"):
        Artifact.open(copy, keys=KEYS, signer=SIGNER)


def test_a_plain_artifact_can_be_signed_too(plain: Path, tmp_path: Path) -> None:
    here = tmp_path / "tier"
    here.mkdir()
    for file in plain.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    (here / SIGNATURE).write_bytes(sign_manifest((here / MANIFEST).read_bytes(), SIGNING_KEY))
    assert Artifact.open(here, signer=SIGNER).read(TOKENIZER)


def test_a_signed_artifact_is_not_recalibrated(sealed: Path) -> None:
    with pytest.raises(ArtifactError, match="is signed"):
        Artifact.open(sealed, keys=KEYS).recalibrated({})


def test_a_signature_is_of_a_manifest_or_of_nothing() -> None:
    check_signature(b"{}", sign_manifest(b"{}", SIGNING_KEY), SIGNER)
    bare = Ed25519PrivateKey.from_private_bytes(SIGNING_KEY).sign(b"{}")
    with pytest.raises(SealError):
        check_signature(b"{}", bare, SIGNER)


# ---- a range of layers ----


def test_a_range_opens_the_files_that_its_layers_need(sealed: Path) -> None:
    middle = Artifact.open(sealed, layers=range(1, 2), keys=KEYS)
    everything = Artifact.open(sealed, keys=KEYS)
    assert {n for n in middle.files if n.endswith(".safetensors")} == {
        "layer-001.safetensors",
        "adapter-001.safetensors",
    }
    for name in everything.files:
        if name in middle.files:
            assert middle.read(name) == everything.read(name)
        else:
            with pytest.raises(ArtifactError, match="layers 1 to 1"):
                middle.read(name)


def test_a_range_does_without_the_other_files(copy: Path) -> None:
    for name in ("layer-000.safetensors", "layer-002.safetensors", "adapter-002.safetensors", HEAD, LABELS):
        (copy / name).unlink()
    artifact = Artifact.open(copy, layers=range(1, 2), keys=KEYS, signer=SIGNER)
    assert not check(artifact).faulty
    assert artifact.tensors("layer-001.safetensors")


@pytest.mark.parametrize("layers", [range(0), range(2, 2), range(-1, 2), range(2, 9), range(0, 3, 2), range(3, 4)])
def test_a_range_must_be_of_its_layers(plain: Path, layers: range) -> None:
    with pytest.raises(ArtifactError, match="layers"):
        Artifact.open(plain, layers=layers)


def test_ends_of_the_model_need_its_ends() -> None:
    def needed(layers: range, *, tied: bool) -> list[str]:
        return [n for n in (EMBEDDINGS, HEAD, LABELS, TOKENIZER) if in_range(n, layers, 6, tied=tied)]

    assert needed(range(2), tied=False) == [EMBEDDINGS, LABELS, TOKENIZER]
    assert needed(range(2), tied=True) == [EMBEDDINGS, HEAD, LABELS, TOKENIZER]
    assert needed(range(2, 4), tied=True) == [TOKENIZER]
    assert needed(range(4, 6), tied=False) == [HEAD, LABELS, TOKENIZER]


# ---- keys ----


@settings(deadline=None, max_examples=25)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.dictionaries(st.text(), st.text()))
def test_a_wrapped_key_comes_back_in_its_context_only(secret: bytes, key: bytes, context: dict[str, str]) -> None:
    local = LocalKey(secret)
    wrapped = local.wrap(key, context)
    assert local.unwrap(wrapped, context) == key
    for changed in (wrapped[:-1], wrapped[:11], b"", wrapped[:-1] + bytes([wrapped[-1] ^ 1])):
        with pytest.raises(SealError):
            local.unwrap(changed, context)
    with pytest.raises(SealError):
        local.unwrap(wrapped, {**context, "more": "x"})
    with pytest.raises(SealError):
        LocalKey(bytes(b ^ 1 for b in secret)).unwrap(wrapped, context)


def test_a_secret_shows_nowhere() -> None:
    key = LocalKey(b"S" * 32)
    assert "SSS" not in repr(key)
    assert key.key_id == LocalKey(b"S" * 32).key_id != LocalKey(b"T" * 32).key_id
    assert key.secret.hex() not in key.key_id


def test_each_key_is_read_as_what_it_is_for() -> None:
    for purpose in (SEALING, SIGNING, PUBLIC):
        assert parse_key(purpose, key_text(purpose, bytes(range(32))) + "\n") == bytes(range(32))
    secret = key_text(SIGNING, b"k" * 32)
    for text in (secret, "", "hunter2", f"{SEALING}:hunter2", key_text(SEALING, b"k" * 31), secret.partition(":")[2]):
        with pytest.raises(KeyUnavailableError) as caught:
            parse_key(SEALING, text)
        assert "hunter2" not in str(caught.value)
        assert "a2tra2" not in str(caught.value)


def test_keys_are_for_their_owner_and_never_replaced(tmp_path: Path) -> None:
    sealing, signing, public = write_keys(tmp_path / "keys")
    assert [p.stat().st_mode & 0o777 for p in (sealing, signing, tmp_path / "keys")] == [0o600, 0o600, 0o700]
    assert public_key_of(parse_key(SIGNING, signing.read_text())) == parse_key(PUBLIC, public.read_text())
    before = sealing.read_bytes()
    public.unlink()
    with pytest.raises(KeyUnavailableError, match="not replaced"):
        write_keys(tmp_path / "keys")
    assert sealing.read_bytes() == before
    assert not public.exists()
