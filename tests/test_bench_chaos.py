"""`bench chaos`: what counts as a lie, the sums by hand, and the real dispatcher between tiers that break."""

import json
from contextlib import contextmanager

import pytest

from bench import chaos, saturation, tables
from bench.bundle import Running
from bench.chaos import KINDS, Around, Plan, Shot, case, cases, untruth
from bench.client import reply
from bench.errors import BenchError
from bench.flood import Answer
from bench.slow_tiers import Site
from tests.fake_bundle import QUERIES, start_here, start_processes

SITE = Site()


def said(source, reason, *, degraded=False, confidence=None, threshold=None, ms=10.0):
    extra = {
        "source": source, "reason": reason, "degraded": degraded, "confidence": confidence, "threshold": threshold,
    }  # fmt: skip
    return reply({"edgecascade": extra}, ms)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("edge", said("device", "confident", confidence=0.9, threshold=0.8)),
        ("edge", said("device", "edge_unavailable", degraded=True, confidence=0.1, threshold=0.8)),
        ("edge", said("device", "deadline", degraded=True, confidence=0.1, threshold=0.8)),
        ("edge", said("canned", "edge_error", degraded=True)),
        ("device", said("edge", "device_unavailable", confidence=0.2, threshold=0.8)),
        ("device", said("rules", "deadline", degraded=True)),
        ("", said("edge", "low_confidence", confidence=0.9, threshold=0.8)),
    ],
)
def test_what_is_true(target, found):
    assert untruth(target, found) == ""


@pytest.mark.parametrize(
    ("target", "found", "says"),
    [
        ("edge", said("edge", "low_confidence"), "names the edge"),
        ("edge", said("canned", "edge_unavailable"), "not flagged"),
        ("edge", said("device", "confident", degraded=True), "not what happened"),
        ("edge", said("device", "device_error", degraded=True), "not what happened"),
        ("", said("device", "edge_unavailable", degraded=True), "not what happened"),
        ("edge", said("device", "confident", confidence=0.1, threshold=0.8), "unsure"),
    ],
)
def test_what_is_a_lie(target, found, says):
    assert says in untruth(target, found)


def test_the_sums_of_a_case_by_hand():
    good, lie = said("device", "confident", confidence=0.9, threshold=0.8), said("edge", "low_confidence")
    shots = [Shot(100.0, good), Shot(115.0, lie), Shot(1.0, None, 429), Shot(70.0, None, 0)]
    found = case("edge slow", "edge", shots, 100.0, Around(reached=6, local_only_bytes=3, recovered_s=None))
    assert (found.sent, found.admitted, found.answered) == (4, 3, pytest.approx(2 / 3))
    assert (found.in_time, found.worst_late_ms) == (pytest.approx(1 / 3), 15.0)
    assert (found.truthful, sum(found.lies.values())) == (0.5, 1)
    assert (found.amplification, found.statuses) == (1.5, {"429": 1, "0": 1})
    assert found.failings == ["answered", "in_time", "truthful", "amplification", "local_only", "recovered"]


def test_nothing_admitted_is_nothing_answered():
    found = case("x", "edge", [Shot(1.0, None, 503)], 100.0, Around())
    assert (found.answered, found.p99_ms) == (0.0, None)


PROXIED = [kind for kind in KINDS if kind != "stalled"]


@pytest.mark.parametrize("kind", PROXIED)
def test_whatever_breaks_every_request_is_answered_and_the_reply_says_so(kind):
    """In this process; what takes how long is not judged here."""
    deadline_ms = 400 if kind == "slow" else 4000  # only there is a deadline waited for
    found = cases(start_here, SITE, QUERIES, Plan(9, callers=2, deadline_ms=deadline_ms, local_only=6), [kind])
    assert [c.name for c in found] == ["none", f"device {kind}", f"edge {kind}"]
    for c in found:
        assert (c.answered, c.truthful, c.lies, c.statuses) == (1.0, 1.0, {}, {}), c
        assert c.local_only_bytes == 0
        assert c.amplification <= 1.2
        assert c.recovered_s is not None
    assert set(found[1].sources) <= {"edge", "canned"}
    assert set(found[2].sources) <= {"device", "canned"}
    assert kind == "slow" or found[0].sources == {"device": 6, "edge": 3}
    assert tables.chaos_table(found, "t").row_count == 3
    assert json.loads(json.dumps(chaos.as_dict(found)))["cases"][0]["name"] == "none"


def test_what_is_no_process_is_not_stalled():
    with pytest.raises(BenchError, match="no process group"):
        cases(start_here, SITE, QUERIES, Plan(requests=1, deadline_ms=4000), ["stalled"])


@pytest.mark.slow
def test_real_processes_broken_in_every_way():
    """SIGSTOP included: the kernel still accepts connections for a stalled tier."""
    found = cases(start_processes, SITE, QUERIES, Plan(requests=30, callers=2, deadline_ms=400))
    assert len(found) == 1 + 2 * len(KINDS)
    for c in found:
        assert (c.answered, c.truthful, c.lies, c.local_only_bytes) == (1.0, 1.0, {}, 0), c
        assert c.amplification <= 1.2
        assert c.recovered_s is not None


@pytest.mark.slow
def test_real_processes_under_a_flood_answer_or_refuse(monkeypatch):
    """Two callers do not saturate fakes: five times what they get is what one machine can both send and serve."""
    monkeypatch.setattr(saturation, "_CALLERS", (2,))
    most, steps = saturation.around(start_processes, saturation.Flooding(SITE, 1.5), QUERIES, 400.0)
    assert most > 0
    assert [s.load for s in steps] == list(saturation.LOADS)
    assert all(s.unanswered == 0 for s in steps)
    assert sum(steps[0].sources.values()) == steps[0].answered > 0
    assert tables.saturation_table(steps, "t").row_count == len(steps)
    assert set(saturation.as_dict(most, steps)["verdict"]) == {"goodput", "rejections"}


def answer(ms, status=200, source="device", due_s=0.0):
    return Answer(due_s, due_s, due_s + ms / 1e3, status, {"edgecascade": {"source": source}})


def test_the_sums_of_a_rate_by_hand():
    answers = [answer(100), answer(300), answer(100, source="canned"), answer(5, 429), answer(7, 503), answer(9, 0)]
    found = saturation.step(5.0, 20.0, answers, deadline_ms=100.0)
    assert found.goodput_per_s == pytest.approx(1 / 0.3), "one in time and by a tier, in 0.3 s"
    assert (found.answered, found.rejected, found.unanswered) == (3, 2, 1)
    assert (found.rejected_p50_ms, found.rejected_worst_ms) == (pytest.approx(6.0), pytest.approx(7.0))
    verdict = saturation.as_dict(4.0, [found])["verdict"]
    assert (verdict["goodput"]["passed"], verdict["rejections"]["passed"]) == (True, True)


def test_a_bundle_that_does_not_answer_is_said_before_anything_is_broken(monkeypatch):
    @contextmanager
    def start_nothing(variants):
        yield Running(dict.fromkeys(variants, "http://127.0.0.1:9"), {})

    monkeypatch.setattr(chaos, "_RECOVERY_S", 0.2)
    with pytest.raises(BenchError, match="nothing was broken yet"):
        cases(start_nothing, SITE, QUERIES, Plan(), ["stopped"])
