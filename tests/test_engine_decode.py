"""Sampling and the token loop, on made-up logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ArtifactError, PromptError
from models.runtime.chat import ChatTemplate
from models.runtime.decode import StopFilter, TextStream, Vocabulary, decode
from models.runtime.sampling import best_ids, draw, nucleus, pick
from models.runtime.tier import Limits, Token

RNG = np.random.default_rng
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60).map(lambda xs: np.array(xs, np.float32))
BYTES = [bytes([b]) for b in range(256)]
END = 256


def show(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes."""
    return b"".join(BYTES[i] for i in ids if i != END).decode("utf-8", "replace")


class Script:
    """Says its text byte by byte, then ends; a wrong turn cannot happen, every other logit is far lower."""

    def __init__(self, text: str) -> None:
        self.ids = [*text.encode(), END]
        self.read: list[int] = []

    def __call__(self, new: Sequence[int]) -> np.ndarray:
        self.read.extend(new)
        logits = np.zeros(257, np.float32)
        logits[self.ids[len(self.read) - 3]] = 20.0
        return logits


def say(text: str, limits: Limits, room: int = 1000) -> list[Token]:
    return list(decode(Script(text), (1, 2, 3), Vocabulary(show, {END}), limits, room))


def joined(tokens: Iterable[Token]) -> str:
    return "".join(token.text for token in tokens)


@given(LOGITS)
def test_greedy_takes_the_first_best_and_says_how_sure_it_is(logits: np.ndarray) -> None:
    found = pick(logits, Limits(top_logprobs=3), RNG(0))
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    first, second = np.sort(p)[::-1][:2]
    assert found.id == int(logits.argmax())
    assert np.exp(found.logprob) == pytest.approx(first, abs=1e-5)
    assert found.margin == pytest.approx(first - second, abs=1e-5)
    assert [i for i, _ in found.top] == best_ids(logits, 3).tolist()
    assert found.top[0] == (found.id, pytest.approx(found.logprob))


@given(LOGITS, st.floats(0.05, 0.999))
def test_a_nucleus_is_the_smallest_set_that_reaches_top_p(logits: np.ndarray, top_p: float) -> None:
    ids, weights = nucleus(logits, top_p)
    assert len(set(ids.tolist())) == len(ids)
    assert (np.diff(weights) <= 0).all()
    assert weights.sum() >= top_p - 1e-9
    assert weights[:-1].sum() < top_p
    outside = np.setdiff1d(np.arange(len(logits)), ids)
    assert not len(outside) or logits[outside].max() <= logits[ids].min()


def test_a_flat_nucleus_needs_more_than_the_first_look() -> None:
    ids, weights = nucleus(np.zeros(4096, np.float32), 0.5)
    assert len(ids) == 2048
    assert weights.sum() == pytest.approx(0.5)


@given(LOGITS, st.integers(0, 2**32), st.floats(0.1, 3), st.floats(0.1, 1))
def test_the_same_seed_draws_the_same_token_from_the_nucleus(
    logits: np.ndarray, seed: int, temperature: float, top_p: float
) -> None:
    drawn = draw(logits, temperature, top_p, RNG(seed))
    assert drawn == draw(logits, temperature, top_p, RNG(seed))
    scaled = ((logits - logits.max()) / temperature).astype(np.float32)
    assert drawn in nucleus(scaled, top_p)[0]


def test_draws_follow_the_probabilities() -> None:
    """5,000 draws, p = 0.75: three standard deviations are 0.0184."""
    rng, logits = RNG(3), np.log(np.array([0.75, 0.2, 0.05], np.float32))
    share = np.mean([draw(logits, 1.0, 1.0, rng) == 0 for _ in range(5_000)])
    assert share == pytest.approx(0.75, abs=0.0184)


def test_a_low_temperature_is_greedy() -> None:
    assert {draw(np.array([1.0, 1.1, 0.9], np.float32), 1e-4, 1.0, RNG(s)) for s in range(50)} == {1}


def test_logprobs_are_those_before_temperature() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    found = pick(logits, Limits(temperature=5.0), RNG(1))
    assert np.exp(found.logprob) == pytest.approx([0.5, 0.3, 0.2][found.id], rel=1e-5)
    assert found.margin == pytest.approx(0.2, rel=1e-4)


@given(st.text(max_size=40))
def test_text_arrives_whole_characters_at_a_time(text: str) -> None:
    tokens = say(text, Limits(max_tokens=500))
    assert joined(tokens) == text
    assert tokens[-1].finish_reason == "stop"
    assert not any(
        "\N{REPLACEMENT CHARACTER}" in t.text for t in tokens[:-1] if "\N{REPLACEMENT CHARACTER}" not in text
    )
    assert len(tokens) == len(text.encode()) + 1


def test_a_character_cut_off_at_the_end_is_shown_as_broken() -> None:
    tokens = say("aé", Limits(max_tokens=2))
    assert [t.text for t in tokens] == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert tokens[-1].finish_reason == "length"


@given(st.lists(st.integers(0, 255), max_size=20))
def test_any_bytes_come_out_as_one_decode_would_show_them(ids: list[int]) -> None:
    stream = TextStream(show)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == show(ids)


@given(st.text("ab.", max_size=30), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_nothing_from_a_stop_string_on_is_shown(text: str, stops: list[str]) -> None:
    tokens = say(text, Limits(max_tokens=500, stop=tuple(stops)))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text
    wanted = min((seen.find(stop) for stop in stops if stop in seen), default=len(text))
    assert joined(tokens) == text[:wanted]
    assert tokens[-1].finish_reason == "stop"
    assert all(t.finish_reason is None for t in tokens[:-1])


def test_a_stop_string_over_tokens_is_held_back() -> None:
    stops = StopFilter(["END"])
    assert [stops.push(piece) for piece in ("go E", "N", "ough")] == [("go ", False), ("", False), ("ENough", False)]
    assert stops.push("E") == ("", False)
    assert stops.flush() == "E"


@pytest.mark.parametrize(("max_tokens", "room"), [(4, 100), (100, 4)])
def test_length_ends_at_the_budget_and_at_the_context(max_tokens: int, room: int) -> None:
    tokens = say("abcdefgh", Limits(max_tokens=max_tokens), room)
    assert joined(tokens) == "abcd"
    assert [t.finish_reason for t in tokens] == [None, None, None, "length"]


def test_an_answer_that_ends_on_its_last_token_has_stopped() -> None:
    assert say("abc", Limits(max_tokens=4))[-1].finish_reason == "stop"


def test_the_model_reads_the_prompt_once_and_then_what_it_said() -> None:
    script = Script("hi")
    list(decode(script, (1, 2, 3), Vocabulary(show, {END}), Limits(), 100))
    assert script.read == [1, 2, 3, *b"hi"]


def test_closing_early_reads_no_further() -> None:
    script = Script("hello")
    tokens = decode(script, (1, 2, 3), Vocabulary(show, {END}), Limits(), 100)
    assert next(tokens).text == "h"
    tokens.close()
    assert len(script.read) == 3


def test_alternatives_are_reported_if_asked() -> None:
    (token, *_) = say("a", Limits(top_logprobs=2))
    assert token.top[0][0] == "a"
    assert len(token.top) == 2


def test_a_template_is_rendered_with_the_generation_prompt() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ add_generation_prompt }}"
    )
    assert template.render([{"role": "user", "content": "hi"}]) == "user: hi\nTrue"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[5].role }}",
    ],
)  # fmt: skip
def test_what_a_template_may_not_do_is_a_prompt_error(source: str) -> None:
    with pytest.raises(PromptError) as caught:
        ChatTemplate(source + "{{ nothing.at.all }}").render([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"


def test_a_template_that_does_not_compile_is_the_artifact_s_fault() -> None:
    with pytest.raises(ArtifactError, match="chat template"):
        ChatTemplate("{% for %}")
