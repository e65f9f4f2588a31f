"""`bench cascade` and `bench overhead`: sums by hand and by property, runs on the real dispatcher and fake tiers."""

import json
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import overhead, plot, tables
from bench.arms import ARMS, TITLES, Arm
from bench.bundle import Variant
from bench.cascade import (
    Asker,
    Way,
    at_random,
    compare,
    frontier,
    gap_closed,
    in_time,
    refused,
    router_ms,
    rows,
    stage_for,
    tier_means,
    verdict,
    ways,
)
from bench.client import Client, reply
from bench.errors import ServiceError
from bench.flood import Flood, request
from bench.metrics import Outcome, row
from bench.slow_tiers import Site, slowed_to, solve
from tests.fake_bundle import QUERIES, SURE, UNSURE, WRONG, start_here
from tests.fakes import free_port


def outcomes(rights, local):
    return [Outcome("a", "a", right, local, 10.0 if local else 50.0) for right in rights]


DEVICE = outcomes([True, True, False, False], local=True)
EDGE = outcomes([True, False, True, False], local=False)


def test_a_random_router_keeps_the_share_and_loses_nothing_of_the_mix():
    found = row(at_random(DEVICE, EDGE, 0.5, draws=500))
    assert found.n == 2000
    assert found.share_local == pytest.approx(0.5)
    assert found.accuracy == pytest.approx(0.5, abs=0.03)
    assert found.mean_ms == pytest.approx(30.0)
    assert at_random(DEVICE, EDGE, 0.5) == at_random(DEVICE, EDGE, 0.5)


@given(st.floats(0, 1))
def test_the_gap_closed_is_none_of_it_for_chance_and_all_of_it_for_the_oracle(local):
    device, edge = replace(row(DEVICE), accuracy=0.8), replace(row(EDGE), accuracy=0.9)
    chance = replace(row(DEVICE), share_local=local, accuracy=local * 0.8 + (1 - local) * 0.9)
    assert gap_closed(chance, device, edge, 0.95) == pytest.approx(0.0, abs=1e-9)
    assert gap_closed(replace(chance, accuracy=0.95), device, edge, 0.95) == pytest.approx(1.0)


def test_no_gap_is_no_share_of_it():
    same = replace(row(DEVICE), accuracy=0.8)
    assert gap_closed(same, same, same, 0.8) is None
    assert gap_closed(row([]), same, same, 0.9) is None


def timing(**ms):
    return reply({"edgecascade": {"timing_ms": ms}}, 1.0)


def test_a_routers_own_time_is_what_the_parts_leave():
    assert router_ms(timing(total=10, queue=1, network=2, prefill=3, decode=1.5, first_token=9)) == pytest.approx(2.5)
    assert router_ms(timing(total=10, prefill=12)) is None, "two tiers at the same time"
    assert router_ms(timing()) is None


def test_each_way_has_its_deadline():
    chosen = ways([Arm("device", "d", {}, "device", hurried=False), Arm("hedged", "h", {})], 80, [60, 100.5])
    assert [(w.name, w.deadline_ms) for w in chosen] == [
        ("device", None), ("hedged", 80), ("hedged@60", 60), ("hedged@100.5", 100.5),
    ]  # fmt: skip


def test_each_arm_is_named_and_titled_once():
    assert len({arm.name for arm in ARMS}) == len(ARMS) == len({arm.title for arm in ARMS})
    assert {arm.name for arm in ARMS} < set(TITLES)


@given(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(60, 500))
def test_two_trials_on_a_line_find_the_slowdown(fixed_ms, pass_ms, wanted_ms):
    def taken(slowdown):
        return fixed_ms + pass_ms * slowdown

    first = solve([(1.0, taken(1.0))], wanted_ms)
    found = solve([(1.0, taken(1.0)), (first, taken(first))], wanted_ms)
    if wanted_ms > taken(1.0) and first > 1.25 and found < 1000:
        assert taken(found) == pytest.approx(wanted_ms, rel=1e-6)
    assert 1 <= found <= 1000


def test_a_tier_that_is_slower_already_stays_as_it_is():
    assert solve([(1.0, 50.0)], 38.0) == 1.0
    assert solve([(1.0, 50.0), (1.0, 52.0)], 38.0) == 1.0
    assert solve([(1.0, 50.0), (2.0, 49.0)], 38.0) == 2.0, "no slope: what was tried last"


def test_trials_on_a_running_bundle_give_a_site():
    said = []
    measured = partial(tier_means, start_here, ARMS[:2], QUERIES)
    site = slowed_to(measured, {"device": 1e6, "edge": 1e-3}, 4.0, said.append)
    assert (site.slowdown, site.network_ms) == ({"device": 1000.0, "edge": 1.0}, 4.0)
    assert len(said) == 3


@pytest.fixture(scope="module")
def compared():
    with stage_for(start_here, Site(network_ms=2.0), ARMS) as (stage, clients):
        return compare(stage, clients, ways(ARMS, 500.0, [0.05, 5000.0]), QUERIES)


def test_rows_of_every_way_of_chance_and_of_the_oracle(compared):
    figures = rows(compared)
    assert {"device", "edge", "sequential", "random", "oracle"} <= set(figures)
    assert figures["device"].row.accuracy == pytest.approx(2 / 3)
    assert figures["sequential"].row.share_local == pytest.approx(2 / 3), "'maybe' went to the edge"
    assert figures["oracle"].row.accuracy == pytest.approx(2 / 3)
    assert figures["edge"].row.bytes > 0
    assert figures["sequential"].same_as_edge == figures["edge"].same_as_edge == 1.0
    assert figures["device"].same_as_edge is None
    assert figures["device"].row.bytes == 0
    assert figures["device"].router_p50_ms is not None
    assert json.loads(json.dumps(figures["sequential"].as_dict()))["gap_closed"] is None, "here is no gap"


def test_the_oracle_in_time_is_right_only_where_somebody_was_in_time(compared):
    figures = rows(compared)
    limit = figures["oracle-in-time"].row.accuracy
    assert limit <= figures["oracle"].row.accuracy
    late = Outcome("a", "a", True, True, latency_ms=81.0)
    assert (in_time(late, 80.0).right, in_time(late, 80.0).latency_ms) == (False, 80.0)
    assert in_time(late, 81.0) == late
    best = max(f.row.accuracy for f in figures.values() if f.deadline_ms)
    assert verdict(figures, p99_ms=1e6, points=0.5)["points_to_oracle"] == pytest.approx(100 * (limit - best))


def test_under_a_deadline_nobody_can_keep_answers_are_flagged_or_refused(compared):
    hopeless = rows(compared)["sequential@0.05"]
    assert hopeless.degraded == 1.0
    assert hopeless.row.accuracy == 0.0


def test_bytes_on_the_link_are_at_least_what_replies_report(compared):
    assert compared.link_bytes >= compared.reported_bytes > 0


def test_the_frontier_has_a_point_for_each_deadline_and_a_picture(compared, tmp_path):
    figures = rows(compared)
    points = frontier(compared, figures)
    assert {(p.arm, p.deadline_ms) for p in points} >= {("sequential", 0.05), ("sequential", 5000.0)}
    plot.frontier(points, TITLES, 0.9, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert tables.cascade_table(figures, TITLES, "t").row_count == len(figures)


def test_the_verdict_names_rows_in_time_and_as_good(compared):
    figures = rows(compared)
    named = verdict(figures, p99_ms=1e6, points=0.5)["rows"]
    assert "sequential@5000" in named
    assert not any(name.endswith("@0.05") for name in named), "nobody answers in 50 µs"
    assert verdict(figures, p99_ms=0.0, points=100)["passed"] is False


def test_a_refusal_is_an_answer_that_is_not_right_and_silence_is_an_error():
    class Full:
        def __init__(self, status):
            self.status = status

        def clock(self):
            return 0.0

        def ask(self, *args, **kwargs):
            raise ServiceError("no", self.status)

    way = Way("x", Arm("x", "x", environment={}))
    assert Asker({"dispatcher-x": Full(503)}, [way]).ask("assistant", "hi", "x") == refused(503, 0.0)
    with pytest.raises(ServiceError):
        Asker({"dispatcher-x": Full(None)}, [way]).ask("assistant", "hi", "x")


# ---- overhead ----


def test_what_a_dispatcher_adds_by_hand():
    near, far = overhead.Timed.of(10.0, {"prefill": 6.0, "decode": 2.0}), overhead.Timed.of(13.0, {"prefill": 7.0})
    assert (near.beside_ms, far.beside_ms) == (2.0, 6.0)
    paired = overhead.of_pairs([(near, far)] * 3)
    assert (paired.p50_ms, paired.beside_p99_ms) == (3.0, 4.0)
    assert overhead.of_quantiles([near], [far]) == paired
    assert overhead.of_quantiles([], [far]).p50_ms is None


@pytest.mark.parametrize(("found", "passed"), [(1.0, True), (1.6, False), (-0.5, True), (-40.0, None), (None, None)])
def test_a_bound_is_kept_or_not_or_lost_in_noise(found, passed):
    assert overhead._at_most(found, 1.5)["passed"] is passed


def test_overhead_of_a_running_bundle():
    with start_here({name: Variant(name) for name in ("device", "edge", "dispatcher")}) as running:
        figures = overhead.measure(running, [SURE, UNSURE, WRONG], count=6, rate=40, seconds=1.0)
    assert figures["pairs"]["n"] == 6
    assert figures["at_rate"]["answered"] == figures["at_rate"]["n"]
    assert figures["at_rate"]["n"]["device"] == figures["at_rate"]["n"]["dispatcher"] > 0
    assert set(figures["verdict"]) == {"median", "p99_at_rate"}
    assert tables.added_table(figures).row_count == 2


def test_a_flood_keeps_what_came_and_notes_what_did_not():
    requests = [request(SURE, "device", 5000), request(SURE, "nothing")]
    with start_here({"device": Variant("device")}) as running:
        found = Flood(running.urls["device"], requests).closed(callers=3, requests=10)
        opened = Flood(running.urls["device"], requests[:1]).open([0.0, 0.01, 0.02])
        with Client(running.urls["device"]) as client:
            assert client.ask("assistant", "hello", "device").timing_ms["total"] > 0
    assert sorted(a.status for a in found) == [200] * 5 + [404] * 5
    assert {a.extra.get("source") for a in found} == {"device", None}
    assert [a.due_s for a in opened] == [0.0, 0.01, 0.02]
    silent = Flood(f"http://127.0.0.1:{free_port()}", requests).closed(1, 2)
    assert [a.status for a in silent] == [0, 0]
