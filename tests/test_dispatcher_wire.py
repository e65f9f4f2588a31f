"""What comes from a tier, piece by piece: events out of any cuts of the bytes, and the bell that wakes who waits."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.dispatcher.bell import Bells
from functions.dispatcher.call import poll
from functions.dispatcher.drafting import Drafting
from functions.dispatcher.wire import MalformedReplyError, StreamReader
from functions.serving.ask import Ask, Message, Shape
from functions.serving.events import Draft, End, Event, Piece, Report, Start, Timing, Usage

ASK = Ask(Shape.CHAT, "edge", "chat", (Message("user", "hi"),))
REPORT = Report(source="edge", route="edge", reason="requested")
CHUNKS = [
    {"model": "m", "choices": [{"delta": {"role": "assistant"}}]},
    {"model": "m", "choices": [{"delta": {"content": "über"}}]},
    {"model": "m", "choices": [{"delta": {"content": "all"}, "finish_reason": "length"}]},
    {"model": "m", "choices": [], "usage": Usage.of(3, 2).model_dump(), "edgecascade": REPORT.model_dump()},
]


def sse(chunks: list[object], last: str = "data: [DONE]\n\n", newline: str = "\n") -> bytes:
    text = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + last
    return text.replace("\n", newline).encode()


def read(data: bytes, cuts: list[int] | tuple[int, ...] = ()) -> list[Event]:
    reader = StreamReader(ASK)
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    return [event for begin, end in pairwise(places) for event in reader.feed(data[begin:end])]


@given(st.lists(st.integers(0, 1000)), st.sampled_from(["\n", "\r\n"]))
def test_however_the_bytes_are_cut_the_events_are_the_same(cuts: list[int], newline: str) -> None:
    events = read(sse(CHUNKS, newline=newline), cuts)
    assert events[:3] == [Start("m", Report(source="", route="", reason="")), Piece("über"), Piece("all")]
    assert events[3:] == [End("length", Usage.of(3, 2), REPORT)]


def test_comments_and_what_follows_the_end_are_passed_over() -> None:
    data = b": alive\n\n" + sse(CHUNKS) + b"data: nonsense\n\n"
    assert len(read(data)) == 4


@pytest.mark.parametrize(
    "data",
    [
        sse([{"error": {"message": "x"}}]),
        sse([*CHUNKS[:2]]),
        sse([[]]),
        sse([3]),
        sse(["text"]),
        sse([{"model": "m"}]),
        sse([{"model": "m", "choices": [{"delta": None}]}]),
        sse([{"model": "m", "choices": [], "edgecascade": {"source": 3}}]),
        b"data: {\n\n",
        b"data: \xff\xfe\n\n",
    ],
)
def test_what_is_no_stream_of_answers_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedReplyError):
        read(data)


def learn(drafting: Drafting, skill: str, draft: Draft | None, prefill_ms: float = 2.0) -> None:
    """100 tokens read and 10 said, at 2 ms a step."""
    steps = 10 - (draft.accepted if draft else 0)
    timing = Timing(prefill=prefill_ms, decode=2.0 * steps, total=prefill_ms + 2.0 * steps)
    report = Report(source="edge", route="edge", reason="requested", timing_ms=timing, draft=draft)
    drafting.learn(skill, Usage.of(100, 10), report, timing.total + 10)


def test_a_draft_goes_along_where_the_edge_gets_done_sooner_with_it() -> None:
    drafting = Drafting()
    assert drafting.draft("home", "words", 10) == "words", "nothing is known: only a draft shows what it is worth"
    for _ in range(8):
        learn(drafting, "home", Draft(proposed=10, accepted=9))
    assert drafting.draft("home", "words", 10) == "words"
    assert drafting.draft("home", "words", 0) == ""
    for _ in range(20):
        learn(drafting, "home", Draft(proposed=8, accepted=0), prefill_ms=400)
    assert drafting.draft("home", "words", 10) == "", "it is never right, and looking at it is dear"
    assert drafting.draft("other", "words", 10) == "words", "each skill is judged by itself"


def test_an_edge_that_takes_no_drafts_gets_no_more_of_them() -> None:
    drafting = Drafting()
    learn(drafting, "home", Draft(ignored=True))
    assert drafting.draft("home", "words", 10) == ""
    learn(drafting, "chat", None)
    learn(drafting, "chat", Draft(proposed=3, accepted=5))
    assert drafting.draft("chat", "words", 10) == "words", "impossible figures count for nothing"


def test_a_bell_wakes_who_polls_once_for_all_rings_and_may_ring_for_nobody() -> None:
    bells = Bells()
    with bells.one() as bell, bells.one() as other:
        assert not bell.answered()
        threading.Timer(0.02, bell.ring).start()
        assert poll([], 1e6, 0.0, bell.heard) == []
        bells.ring()
        assert (bell.answered(), other.answered()) == (True, True)
        assert not bell.answered()
        for _ in range(100_000):
            bell.ring()
        assert bell.answered()
    bells.ring()
    with bells.one() as again:
        assert again in {bell, other}
        assert not again.answered()
    bell.close()
    bell.ring()
