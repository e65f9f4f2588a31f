"""Answers held to a form: whatever the model would say, JSON is what its schema allows and calls are calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from models.build.gguf_source import GgufSource
from models.errors import GrammarError
from models.runtime.decode import FREE, Guide, Vocabulary, decode
from models.runtime.grammar import SCHEMA_FIELD, Grammars
from models.runtime.sampling import draw, pick
from models.runtime.tier import JsonForm, Limits, Token, Tool, ToolUse
from tests.tiny_models import SHAPE, write_gguf

END = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "colour": {"enum": ["red", "blue"]}},
    "required": ["name", "colour"],
    "additionalProperties": False,
}
CITY = {**PERSON, "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
TOOLS = (Tool("get_weather", json.dumps(CITY)), Tool("get_time"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return GgufSource(write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")).tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer.to_str(), SHAPE.vocab_size, [END])


class Babbler:
    """Random logits, the same for the same ids; remembers what it read."""

    def __init__(self, seed: int = 0) -> None:
        self.read: list[int] = []
        self.passes = 0
        self._seed = seed

    def __call__(self, new: Sequence[int]) -> np.ndarray:
        self.read.extend(new)
        self.passes += 1
        rng = np.random.default_rng([self._seed, *self.read])
        return (3 * rng.normal(size=SHAPE.vocab_size)).astype(np.float32)


class Parrot(Babbler):
    """Wants to say one text, in the tokens that its tokenizer makes of it, and then to end."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        super().__init__()
        self._ids = [*tokenizer.encode(text).ids, END]

    def __call__(self, new: Sequence[int]) -> np.ndarray:
        logits = super().__call__(new)
        logits[self._ids[len(self.read) - 1]] += 99
        return logits


def say(model: Babbler, tokenizer: Tokenizer, limits: Limits, guide: Guide = FREE) -> list[Token]:
    return list(decode(model, [5], Vocabulary(tokenizer.decode, {END}), limits, 4000, guide))


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def form(schema: Any, *, strict: bool = True) -> JsonForm:
    return JsonForm(json.dumps(schema), strict=strict)


@pytest.fixture(scope="module")
def babble(tokenizer: Tokenizer, grammars: Grammars) -> Callable[..., tuple[list[Token], Babbler]]:
    def answer(model_seed: int = 0, /, **limits: Any) -> tuple[list[Token], Babbler]:
        wanted, model = Limits(**{"max_tokens": 2000, **limits}), Babbler(model_seed)
        return say(model, tokenizer, wanted, grammars.guide(wanted)), model

    return answer


# Schemas of what ends: a random model would count or write for ever.
values = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(st.characters(exclude_categories=["C"]), max_size=9)
)
names = st.text('abcdeé_ "\\日', min_size=1, max_size=6)
leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-99, 99), st.integers(0, 500)
    ),
    st.builds(lambda v: {"const": v}, values),
    st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=4)),
    st.sampled_from([{"type": "string", "pattern": "^[a-f]{2,4}-\\d$"}, {"type": "string", "format": "date"}]),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], optional: int) -> dict[str, Any]:
        required = list(properties)[optional:]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(made, st.dictionaries(names, inner, max_size=4), st.integers(0, 2))


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


schemas = st.recursive(
    leaves,
    lambda inner: objects(inner) | arrays(inner) | st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x}),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas, st.integers(0, 9), st.sampled_from([0.0, 1.0]))
def test_whatever_the_model_prefers_the_answer_is_of_the_schema(
    babble: Callable[..., Any], schema: Any, seed: int, temperature: float
) -> None:
    tokens, model = babble(seed, json=form(schema), temperature=temperature, seed=seed)
    said = text_of(tokens)
    Draft202012Validator(schema).validate(json.loads(said))
    assert tokens[-1].finish_reason == "stop"
    assert "\N{REPLACEMENT CHARACTER}" not in said
    assert model.read == [5, *(token.id for token in tokens)][: len(model.read)]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([JsonForm(), form({}), form({"type": ["number", "array"]})]), st.integers(0, 99))
def test_what_could_go_on_for_ever_is_cut_or_valid(babble: Callable[..., Any], wish: JsonForm, seed: int) -> None:
    tokens, _model = babble(seed, json=wish, max_tokens=60, temperature=1.0, seed=seed)
    if tokens[-1].finish_reason == "stop":
        Draft202012Validator(json.loads(wish.schema)).validate(json.loads(text_of(tokens)))
    else:
        assert (tokens[-1].finish_reason, len(tokens)) == ("length", 60)


def test_forced_tokens_cost_no_pass_each(babble: Callable[..., Any]) -> None:
    tokens, model = babble(json=form(PERSON), top_logprobs=3)
    forced = [token for token in tokens if (token.logprob, token.margin) == (0.0, 1.0) and len(token.top) == 1]
    assert len(forced) >= len('{"name": ') + len('", "colour": "') + len('"}') - 6
    assert model.passes <= len(tokens) - len(forced) + 1
    assert all(token.top[0][1] == 0.0 for token in forced)


def test_a_fully_forced_answer_costs_no_pass_at_all(babble: Callable[..., Any]) -> None:
    tokens, model = babble(json=form({"const": {"a": [1, "x"], "b": None}}))
    assert text_of(tokens) == '{"a": [1, "x"], "b": null}'
    assert model.passes == 0
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == "stop"


def test_logprobs_are_over_what_is_allowed(babble: Callable[..., Any]) -> None:
    tokens, _model = babble(json=form({"enum": ["red", "blue", "green"]}), top_logprobs=20)
    choice = next(token for token in tokens if len(token.top) > 1)
    assert sum(np.exp(logprob) for _, logprob in choice.top) == pytest.approx(1, abs=1e-5)
    assert {text for text, _ in choice.top} <= set('rbg"')
    assert all(logprob > -np.inf for token in tokens for _, logprob in token.top)


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=40), st.integers(0, 2**20), st.floats(0.1, 1))
def test_what_is_masked_is_never_drawn(values: list[float], seed: int, top_p: float) -> None:
    logits = np.array(values, np.float32)
    logits[::2] = -np.inf
    assert draw(logits, 1.5, top_p, np.random.default_rng(seed)) % 2 == 1
    found = pick(logits, Limits(top_logprobs=20), np.random.default_rng(0))
    assert all(token_id % 2 == 1 for token_id, _ in found.top)


@pytest.mark.parametrize("text", ["日本", "Zoë \N{PARTY POPPER}", "\N{FAMILY}é", 'a\nb\t"c\\'])
def test_characters_over_several_tokens_come_whole(babble: Callable[..., Any], text: str) -> None:
    tokens, _model = babble(json=form({"enum": [text, text + "!", "?"]}))
    assert json.loads(text_of(tokens)) in {text, text + "!", "?"}
    assert not any("\N{REPLACEMENT CHARACTER}" in token.text for token in tokens)


json_values = st.recursive(
    values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(json_values)
def test_a_form_that_the_model_keeps_to_by_itself_changes_nothing(
    tokenizer: Tokenizer, grammars: Grammars, value: Any
) -> None:
    text = json.dumps(value, ensure_ascii=False)
    limits = Limits(max_tokens=1000)
    free = say(Parrot(tokenizer, text), tokenizer, limits)
    held = say(Parrot(tokenizer, text), tokenizer, limits, grammars.guide(replace(limits, json=form({}))))
    assert text_of(held) == text_of(free) == text


@pytest.mark.parametrize("text", ["Hello there.\nSo <b>what</b>? <tool_cal", "", "日本 {}"])
def test_text_is_free_where_calls_are_possible(tokenizer: Tokenizer, grammars: Grammars, text: str) -> None:
    limits = Limits(max_tokens=1000, tools=ToolUse(TOOLS))
    assert text_of(say(Parrot(tokenizer, text), tokenizer, limits, grammars.guide(limits))) == text


def test_max_tokens_cuts_json_and_an_answer_whole_by_then_has_stopped(babble: Callable[..., Any]) -> None:
    whole, _model = babble(json=form(PERSON))
    cut, _model = babble(json=form(PERSON), max_tokens=len(whole) - 1)
    exact, _model = babble(json=form(PERSON), max_tokens=len(whole))
    assert (cut[-1].finish_reason, exact[-1].finish_reason) == ("length", "stop")
    assert text_of(exact) == text_of(whole)
    assert text_of(whole).startswith(text_of(cut))


def test_a_stop_string_ends_an_answer_as_ever(babble: Callable[..., Any]) -> None:
    tokens, _model = babble(json=form(PERSON), stop=('", "col',))
    assert tokens[-1].finish_reason == "stop"
    assert "colour" not in text_of(tokens)
    assert text_of(tokens).startswith('{"name": "')


USES = [
    (ToolUse(TOOLS, required=True), {"get_weather", "get_time"}, 8),
    (ToolUse(TOOLS, required=True, parallel=False), {"get_weather", "get_time"}, 1),
    (ToolUse(TOOLS, only="get_time"), {"get_time"}, 1),
    (ToolUse(TOOLS, only="get_weather"), {"get_weather"}, 1),
]


@pytest.mark.parametrize(("use", "names", "most"), USES)
@pytest.mark.parametrize("seed", range(4))
def test_calls_that_must_be_made_are_made(
    babble: Callable[..., Any], use: ToolUse, names: set[str], most: int, seed: int
) -> None:
    tokens, _model = babble(seed, tools=use, temperature=1.0, seed=seed)
    calls = text_of(tokens).split("</tool_call>")[:-1]
    assert 1 <= len(calls) <= most
    for call in calls:
        made = json.loads(call.removeprefix("\n").removeprefix("<tool_call>\n"))
        assert made["name"] in names
        schema = next(tool.parameters for tool in TOOLS if tool.name == made["name"])
        Draft202012Validator(json.loads(schema)).validate(made["arguments"])


def test_with_a_schema_and_functions_the_answer_is_either(babble: Callable[..., Any]) -> None:
    beginnings = {
        text_of(babble(seed, json=form(PERSON), tools=ToolUse(TOOLS), temperature=2.0, seed=seed)[0])[0]
        for seed in range(12)
    }
    assert beginnings == {"<", "{"}


BAD: list[tuple[Any, str]] = [
    ({"type": "wizard"}, "wizard"),
    ({"type": "string", "pattern": "(("}, "unclosed group"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"$ref": "#/$defs/nobody"}, "nobody"),
    ({"$ref": "http://example.com/schema.json"}, r"\$ref"),
    ({"$ref": "#/default", "default": {"type": "string"}}, r"\$ref"),
    ({"$ref": 5}, r"\$ref"),
    ({"allOf": [{"type": "string"}, {"maxLength": 4}]}, "allOf"),
    ({"properties": {"a": {"anyOf": [{"type": "object"}], "properties": {}}}}, "anyOf"),
]


@pytest.mark.parametrize(("schema", "word"), BAD)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_name(grammars: Grammars, schema: Any, word: str) -> None:
    with pytest.raises(GrammarError, match=word) as caught:
        grammars.guide(Limits(json=form(schema)))
    assert caught.value.field == SCHEMA_FIELD
    assert len(str(caught.value)) < 400
    with pytest.raises(GrammarError, match=word) as caught:
        grammars.guide(Limits(tools=ToolUse((*TOOLS, Tool("f", json.dumps(schema), strict=True)))))
    assert caught.value.field == "tools[2].function.parameters"


def test_a_schema_that_nothing_satisfies_is_refused(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match=r"no answer.*NoExtension"):
        grammars.guide(Limits(json=form({"$ref": "#"})))


def test_without_strict_what_is_unknown_is_passed_over(babble: Callable[..., Any], grammars: Grammars) -> None:
    schema = {"type": "integer", "minimum": 5, "maximum": 9, "not": {"const": 7}}
    tokens, _model = babble(json=form(schema, strict=False))
    assert 5 <= json.loads(text_of(tokens)) <= 9
    with pytest.raises(GrammarError):
        grammars.guide(Limits(json=form(schema)))


def test_options_of_the_library_in_a_schema_change_nothing(babble: Callable[..., Any]) -> None:
    schema = {"const": [1, 2], "x-guidance": {"item_separator": " ; ", "lenient": True}}
    assert text_of(babble(json=form(schema))[0]) == "[1, 2]"


def test_merging_is_refused_before_it_takes_for_ever(grammars: Grammars) -> None:
    """Compiled, each of the two would take minutes; refusing them takes no work worth timing, so nothing is timed."""
    patterns = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(24)]}
    products: dict[str, Any] = {}
    for _ in range(10):
        products = {"properties": {"a": products}, "anyOf": [{"properties": {"b": {"const": n}}} for n in range(5)]}
    for schema in (patterns, products):
        with pytest.raises(GrammarError, match="write out"):
            grammars.guide(Limits(json=form(schema)))


def test_a_form_too_complex_to_go_on_is_an_error_when_it_comes_to_that(babble: Callable[..., Any]) -> None:
    """A thousand optional properties are more than the parser may hold open at once."""
    many = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1000)}}
    for schema in (many, {"properties": {"a": {"enum": ["b", "c"]}, "many": many}, "required": ["a", "many"]}):
        with pytest.raises(GrammarError, match=r"no answer.*items"):
            babble(json=form({**schema, "type": "object", "additionalProperties": False}))


def test_a_grammar_is_compiled_once_and_few_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer.to_str(), SHAPE.vocab_size, [END])
    for number in [1, 1, 1, *range(60)]:
        grammars.guide(Limits(json=form({"const": number})))
    info = grammars._compiled.cache_info()
    assert (info.misses, info.hits) == (60, 3)
    assert info.currsize == info.maxsize == 32


def test_answers_under_one_grammar_do_not_meet(grammars: Grammars) -> None:
    limits = Limits(json=form({"enum": ["ab", "cd"]}))
    first, second = grammars.guide(limits), grammars.guide(limits)
    first.forced()
    first.take(int(np.flatnonzero(np.isfinite(first.masked(np.zeros(SHAPE.vocab_size, np.float32))))[0]))
    assert len(first.forced()) == 2
    assert list(second.forced()) != list(first.forced())


def test_without_a_form_nothing_is_compiled(tokenizer: Tokenizer) -> None:
    assert Grammars("no tokenizer", 10, [END]).guide(Limits()) is FREE


def test_a_tokenizer_that_cannot_be_read_refuses_forms_only() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars("{}", 10, [END]).guide(Limits(json=JsonForm()))
