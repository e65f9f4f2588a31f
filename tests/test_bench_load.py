"""The load generator: arrivals by property, runs against a fake client and a fake clock."""

import statistics
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import plot
from bench.client import reply
from bench.errors import BenchError, ServiceError
from bench.load import Load, Run, Shot, poisson, steps, summary
from bench.metrics import Outcome, row, trade_off


class Clock:
    """Time passes only in `pause`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.now += seconds


class Fake:
    """Answers with two pieces; every third text fails."""

    def __init__(self):
        self.sent = []
        self.lock = threading.Lock()
        self.running = self.most = 0

    def stream(self, skill, messages, model, max_tokens):
        with self.lock:
            self.sent.append(messages[0]["content"])
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if messages[0]["content"] == "bad":
                raise ServiceError("refused", 429)
            yield "a"
            yield "b"
            yield reply({"edgecascade": {"source": "edge"}}, 1.0)
        finally:
            with self.lock:
                self.running -= 1


@given(st.floats(min_value=0.5, max_value=50), st.floats(min_value=1, max_value=20), st.integers(0, 99))
def test_arrivals_are_ordered_within_the_time_and_repeatable(rate, duration_s, seed):
    times = poisson(rate, duration_s, seed)
    assert times == sorted(times)
    assert all(0 < t < duration_s for t in times)
    assert times == poisson(rate, duration_s, seed)


def test_the_rate_of_arrivals_is_the_rate():
    """10,000 expected arrivals have a standard deviation of 100: six of them are never seen by chance."""
    times = poisson(100, 100, seed=3)
    assert abs(len(times) - 10_000) < 600
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)


def test_steps_change_the_rate():
    times = steps([1, 50], 10, seed=1)
    assert times == sorted(times)
    assert len([t for t in times if t < 10]) < 40 < len([t for t in times if t >= 10])


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (-1, 1)])
def test_a_rate_or_time_of_nothing_is_refused(wrong):
    with pytest.raises(BenchError, match="greater than 0"):
        poisson(*wrong)


def test_a_run_has_a_bound():
    with pytest.raises(BenchError, match="at most 100000"):
        poisson(10_000, 100)
    with pytest.raises(BenchError, match="1…512 callers"):
        Run(Fake(), Load(["a"])).closed(0, 1)


def test_a_closed_loop_sends_exactly_what_was_asked_from_no_more_callers():
    fake, ticks = Fake(), []
    shots = Run(fake, Load(["x", "y", "bad"]), lambda: ticks.append(1)).closed(callers=4, requests=30)
    assert len(shots) == len(ticks) == 30
    assert sorted(fake.sent) == sorted(["x", "y", "bad"] * 10)
    assert fake.most <= 4
    found = summary(shots)
    assert (found["requests"], found["answered"], found["errors"]) == (30, 20, {"429": 10})
    assert found["sources"] == {"edge": 20}


def test_an_open_loop_sends_on_time_whatever_comes_back():
    clock, fake = Clock(), Fake()
    arrivals = [0.5, 1.0, 4.0]
    shots = sorted(Run(fake, Load(["x"]), clock=clock, pause=clock.pause).open(arrivals), key=lambda s: s.due_s)
    assert [s.due_s for s in shots] == arrivals
    assert clock.now == pytest.approx(4.0)


def test_a_late_request_is_timed_from_when_it_was_due():
    shots = [Shot(due_s=1.0, sent_s=3.0, first_s=3.5, done_s=4.0, pieces=3, source="edge")]
    found = summary(shots)
    assert found["latency_ms"]["p50"] == pytest.approx(3000)
    assert found["first_token_ms"]["p50"] == pytest.approx(2500)
    assert found["sent_late_ms"]["max"] == pytest.approx(2000)
    assert found["between_tokens_ms"]["mean"] == pytest.approx(250)


def test_nothing_sent_is_nothing_measured():
    found = summary([])
    assert found["requests"] == 0
    assert found["latency_ms"]["p99"] is None


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_plots_are_pictures(tmp_path):
    shots = [Shot(i, i, i + 0.1, i + 0.2, 2, "edge", "" if i % 5 else "429") for i in range(20)]
    plot.load(shots, tmp_path / "load.png")
    pairs = [
        (Outcome("a", "a", i % 3 > 0, True, 1.0, i / 20), Outcome("a", "a", i % 4 > 0, False, 1.0)) for i in range(20)
    ]
    place = row([d for d, _ in pairs])
    plot.trade_off(trade_off(pairs), place, place, "assistant", tmp_path / "trade.png")
    assert is_png(tmp_path / "load.png")
    assert is_png(tmp_path / "trade.png")
