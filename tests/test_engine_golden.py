"""Real models against golden texts; each test skips where its model or texts are absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from models.artifact.keys import LocalKey
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.fetch import GGUF_SHA256, MEMBER
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubSource
from models.build.seal import seal_artifact
from models.build.verify import GoldenCase, golden, golden_cases, golden_texts, report_golden
from models.errors import DataError
from models.runtime.local import LocalTier
from models.runtime.tier import Chat, DraftUse, JsonForm, Limits, Tool, ToolUse
from tests.tiny_models import quiet

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
HOME = Path(os.environ.get("EDGECASCADE_HOME", ROOT / "var"))


@pytest.mark.parametrize("quant", ["fp32", "int8"])
def test_stories260k_tells_its_stories(tmp_path: Path, quant: str) -> None:
    """A model of 260,000 parameters, from a Hugging Face folder; in 8 bits it may leave a story half way."""
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    build(HubSource(folder), tmp_path / "out", quant, None, quiet, texts=golden_texts(folder / "golden.json"))
    results = golden(tmp_path / "out", folder / "golden.json", threads=1)
    least = 1.0 if quant == "fp32" else 0.3
    assert all(r.same >= least * len(r.case.greedy_ids) for r in results)
    keys = LocalKey(bytes(32))
    seal_artifact(Artifact.open(tmp_path / "out"), tmp_path / "sealed", keys, None, quiet)
    assert golden(tmp_path / "sealed", folder / "golden.json", threads=1, keys=keys) == results


def told_together(artifact: Path, golden_path: Path, threads: int = 2) -> list[tuple[bool, bool]]:
    """Whether each golden text comes out, four at a time, and its end once more when its beginning is in the cache."""
    tier = LocalTier.open(artifact, "golden", threads, prefix_cache_bytes=1 << 28)
    cases = golden_cases(golden_path)
    assert tier._writer is not None
    write = tier._writer.write

    def same(case: GoldenCase, told: int = 0) -> bool:
        left = case.greedy_ids[told:]
        tokens = write((*case.prompt_ids, *case.greedy_ids[:told]), Limits(max_tokens=len(left)))
        return tuple(token.id for token in tokens) == left

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(same, cases))
        again = list(pool.map(same, cases, [len(case.greedy_ids) * 3 // 4 for case in cases]))
    stats = tier.stats()
    assert stats.prefix_reused_tokens > 0
    assert stats.pass_tokens > stats.passes, "no pass was shared"
    return list(zip(first, again, strict=True))


def test_stories260k_tells_them_together_and_from_the_cache(tmp_path: Path) -> None:
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    build(HubSource(folder), tmp_path / "out", "fp32", None, quiet)
    assert all(a and b for a, b in told_together(tmp_path / "out", folder / "golden.json", threads=1))


def told_with_drafts(artifact: Path, golden_path: Path, threads: int = 1) -> Iterator[tuple[bool, DraftUse]]:
    """Whether each golden text comes out with itself as a draft, as it is and with a word in its middle changed."""
    tier = LocalTier.open(artifact, "golden", threads, lookup_tokens=4)
    tokenizer = Tokenizer.from_str(Artifact.open(artifact).tokenizer_json())
    assert tier._writer is not None
    for case in golden_cases(golden_path):
        text = tokenizer.decode(list(case.greedy_ids))
        words = text.split(" ")
        words[len(words) // 2] = "lantern"
        for draft in (text, " ".join(words)):
            limits = Limits(max_tokens=len(case.greedy_ids), draft=draft)
            tokens = list(tier._writer.write(case.prompt_ids, limits))
            assert tokens[-1].draft is not None
            yield tuple(token.id for token in tokens) == case.greedy_ids, tokens[-1].draft


def test_stories260k_tells_them_with_any_draft(tmp_path: Path) -> None:
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    build(HubSource(folder), tmp_path / "out", "fp32", None, quiet)
    told = list(told_with_drafts(tmp_path / "out", folder / "golden.json"))
    assert all(same for same, _ in told)
    assert sum(use.accepted for _, use in told[::2]) > 0.5 * sum(use.proposed for _, use in told[::2]) > 0


@pytest.fixture(scope="module")
def smollm2() -> GgufSource:
    path = HOME / "cache" / Path(MEMBER).name
    if not path.is_file() or not (DATA / "smollm2").is_dir():
        pytest.skip("SmolLM2 (`edgecascade build smollm2 …` fetches it) or its golden texts are absent")
    source = GgufSource(path)
    assert source.digest() == GGUF_SHA256
    return source


@pytest.mark.slow
def test_smollm2_in_fp32_reproduces_all_golden_texts(smollm2: GgufSource, tmp_path: Path) -> None:
    golden_path = DATA / "smollm2" / "golden.json"
    build(smollm2, tmp_path / "out", "fp32", None, quiet)
    assert "12 of 12 golden texts reproduced" in report_golden(tmp_path / "out", golden_path)


@pytest.mark.slow
def test_smollm2_in_fp32_reproduces_them_together_and_from_the_cache(smollm2: GgufSource, tmp_path: Path) -> None:
    build(smollm2, tmp_path / "out", "fp32", None, quiet)
    assert all(a and b for a, b in told_together(tmp_path / "out", DATA / "smollm2" / "golden.json"))


@pytest.mark.slow
def test_smollm2_in_fp32_reproduces_them_with_any_draft(smollm2: GgufSource, tmp_path: Path) -> None:
    build(smollm2, tmp_path / "out", "fp32", None, quiet)
    told = list(told_with_drafts(tmp_path / "out", DATA / "smollm2" / "golden.json", threads=2))
    assert all(same for same, _ in told)
    assert sum(use.accepted for _, use in told[::2]) > 0.9 * sum(use.proposed for _, use in told[::2])


@pytest.mark.slow
def test_smollm2_in_int4_loses_little(smollm2: GgufSource, tmp_path: Path) -> None:
    """The file's own grid is kept; what is lost comes from rounding activations to int8."""
    texts = golden_texts(DATA / "smollm2" / "golden.json")
    lost = build(smollm2, tmp_path / "out", "int4", None, quiet, texts=texts).manifest.losses
    assert lost["token_mean_kl"] < 0.01
    assert lost["token_top1_agreement"] > 0.95


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"enum": ["mammal", "bird", "fish"]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            },
            "required": ["label", "children"],
            "additionalProperties": False,
        },
        "leaf": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]},
    },
    "$ref": "#/$defs/node",
}
HELD: list[tuple[str, dict[str, Any]]] = [
    ("Anna is 34, lives in Lyon and plays chess. Describe her as JSON.", PERSON),
    ("Which animals do you know? Answer as a tree.", TREE),
    ("When was the French revolution?", {"type": "string", "format": "date"}),
    ("Is the sky blue?", {"enum": ["yes", "no", "\u65e5\u672c"]}),
    (
        "Give me three numbers.",
        {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 3, "maxItems": 3},
    ),
    ("A licence plate?", {"type": "string", "pattern": "^[A-Z]{1,3}-[A-Z]{2} [0-9]{2,4}$"}),
]


@pytest.fixture(scope="module")
def smollm2_int4(smollm2: GgufSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "edge"
    build(smollm2, folder, "int4", None, quiet)
    return folder


@pytest.fixture(scope="module")
def smollm2_tier(smollm2_int4: Path) -> LocalTier:
    return LocalTier.open(smollm2_int4, "edge")


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["", "The capital of France", "Once upon a time there was a lantern"])
def test_smollm2_in_int4_says_the_same_with_exact_drafts(smollm2_int4: Path, draft: str) -> None:
    alone, ahead = (LocalTier.open(smollm2_int4, "edge", exact_drafts=True, lookup_tokens=lookup) for lookup in (0, 4))
    for text in ("What is the capital of France?", "Tell me a story.", "Count from one to ten, twice."):
        chat, limits = Chat(({"role": "user", "content": text},)), Limits(max_tokens=60)
        said = [token.id for token in alone.generate(chat, limits)]
        own = "".join(token.text for token in alone.generate(chat, limits))
        for tier in (alone, ahead):
            drafted = replace(limits, draft=draft or own)
            assert [token.id for token in tier.generate(chat, drafted)] == said


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("text", "schema"), HELD)
def test_smollm2_answers_in_the_form_that_is_asked_for(
    smollm2_tier: LocalTier, text: str, schema: dict[str, Any], temperature: float
) -> None:
    limits = Limits(max_tokens=150, temperature=temperature, seed=7, json=JsonForm(json.dumps(schema), strict=True))
    tokens = list(smollm2_tier.generate(Chat(({"role": "user", "content": text},)), limits))
    Draft202012Validator(schema).validate(json.loads("".join(token.text for token in tokens)))
    assert tokens[-1].finish_reason == "stop"


@pytest.mark.slow
def test_smollm2_calls_the_function_that_fits(smollm2_tier: LocalTier) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tools = (
        Tool("get_weather", json.dumps({**city, "additionalProperties": False}), "The weather in a city"),
        Tool("set_alarm", description="Wake the user"),
    )
    chat = Chat(({"role": "user", "content": "What is the weather in Paris?"},), tools)
    limits = Limits(max_tokens=150, tools=ToolUse(tools, required=True, parallel=False))
    said = "".join(token.text for token in smollm2_tier.generate(chat, limits))
    call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}


def test_a_file_without_golden_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "golden.json").write_text('[{"prompt": "x"}]', "utf-8")
    with pytest.raises(DataError, match="golden"):
        golden_texts(tmp_path / "golden.json")
