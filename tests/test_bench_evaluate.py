"""Asking tiers: interleaved, compared by whole frames, through a fake at the seam."""

import json

import httpx
import pytest

from bench.client import Client, Reply
from bench.errors import QueryFileError, ServiceError
from bench.evaluate import WARM_UP, ask_all, evaluation
from bench.queries import OUT_OF_SCOPE, Query, count_by_skill, read, sample


def completion(intent, slots=None, *, source="device", confidence=0.9, threshold=0.8):
    frame = {"intent": intent, "slots": slots or {}}
    crossed = {"sent": 100, "received": 200} if source == "edge" else {}
    extra = {
        "source": source, "route": source, "reason": "requested", "degraded": False, "confidence": confidence,
        "threshold": threshold, "frame": frame, "network_bytes": crossed,
        "joules": {"value": 0.5, "kind": "modelled", "source": "a card"},
    }  # fmt: skip
    return {"choices": [{"message": {"content": json.dumps(frame)}}], "edgecascade": extra}


class Service:
    """The device knows 'a' only; the edge knows all; the cascade trusts the device on short texts."""

    def __init__(self):
        self.seen = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        text, model = body["messages"][-1]["content"], body["model"]
        self.seen.append((model, text))
        source = {"device": "device", "edge": "edge"}.get(model) or ("device" if len(text) < 5 else "edge")
        intent = "a" if source == "device" else text.split()[-1]
        slots = {"x": "y"} if "slot" in text and source == "edge" else {}
        return httpx.Response(200, json=completion(intent, slots, source=source))


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def client(service):
    with Client("http://test", httpx.MockTransport(service)) as made:
        yield made


QUERIES = [
    Query("assistant", "a", "a"),
    Query("assistant", "say it b", "b"),
    Query("assistant", "b", "b"),
    Query("home", "with slot c", "c", {"x": "y"}),
    Query("assistant", f"{OUT_OF_SCOPE}", OUT_OF_SCOPE),
]


def test_rows_of_each_tier_the_cascade_and_the_oracle(client):
    found = evaluation(ask_all(client, QUERIES, ["device", "edge", "auto"]))
    rows = found.rows
    assert list(rows) == ["device", "edge", "cascade", "oracle"]
    assert rows["device"].accuracy == pytest.approx(1 / 5)
    assert rows["edge"].accuracy == pytest.approx(1.0)
    assert rows["cascade"].accuracy == pytest.approx(4 / 5)
    assert rows["cascade"].share_local == pytest.approx(2 / 5)
    assert (rows["oracle"].accuracy, rows["oracle"].share_local) == (pytest.approx(1.0), pytest.approx(1 / 5))
    assert found.realised_local_error == pytest.approx(1 / 2)
    assert (rows["device"].bytes, rows["edge"].bytes) == (0, 300)
    assert rows["edge"].joules == pytest.approx(0.5)
    assert found.trade_off()[-1].accuracy == pytest.approx(1 / 5)


def test_the_json_has_the_promised_names(client):
    values = json.loads(json.dumps(evaluation(ask_all(client, QUERIES, ["device", "edge", "auto"])).as_dict()))
    assert set(values) == {"n", "rows", "realised_local_error", "threshold"}
    wanted = {
        "accuracy",
        "in_scope_accuracy",
        "oos_recall",
        "oos_precision",
        "share_local",
        "ece",
        "ece_floor",
        "p50_ms",
        "p95_ms",
        "p99_ms",
    }
    assert wanted | {"mean_ms", "mean_confidence", "joules", "bytes", "n"} == set(values["rows"]["cascade"])
    assert values["threshold"] == pytest.approx(0.8)


def test_one_tier_alone_gives_one_row(client):
    found = evaluation(ask_all(client, QUERIES, ["edge"]))
    assert list(found.rows) == ["edge"]
    assert found.trade_off() == []
    assert found.as_dict()["threshold"] is None


def test_a_skill_can_be_looked_at_alone(client):
    part = evaluation(ask_all(client, QUERIES, ["device", "edge", "auto"])).of_skill("home")
    assert part.rows["edge"].n == 1
    assert part.rows["edge"].accuracy == pytest.approx(1.0)
    assert part.as_dict()["n"] == 1


def test_models_take_turns_in_going_first(client, service):
    ticks = []
    ask_all(client, QUERIES, ["device", "edge"], lambda: ticks.append(1))
    counted = service.seen[WARM_UP * 2 :]
    assert [model for model, _ in counted[:6]] == ["device", "edge", "edge", "device", "device", "edge"]
    assert len(counted) == 2 * len(QUERIES)
    assert len(ticks) == len(QUERIES)


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (
            lambda _: httpx.Response(422, json={"error": {"message": "skill 'x' is unknown"}}),
            "answered 422: skill 'x' is unknown",
        ),
        (lambda _: httpx.Response(500, text="oops"), "answered 500: oops"),
        (lambda _: httpx.Response(200, text="<html>"), "did not answer with JSON"),
        (lambda _: httpx.Response(200, json=[]), "JSON object"),
    ],
)
def test_a_service_that_fails_is_one_sentence(handler, says):
    with Client("http://test", httpx.MockTransport(handler)) as client, pytest.raises(ServiceError, match=says):
        client.ask("assistant", "a")


def test_an_absent_service_is_one_sentence():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with Client("http://test", httpx.MockTransport(refuse)) as client:
        with pytest.raises(ServiceError, match=r"start it with: edgecascade up"):
            client.ask("assistant", "a")
        with pytest.raises(ServiceError, match="did not answer"):
            list(client.stream("chat", []))


def test_a_stream_is_asked_for_as_the_gateway_wants_and_ends_with_its_reply():
    seen = []

    def handler(request):
        seen.append(request)
        chunks = [{"choices": [{"delta": {"content": t}}]} for t in ("He", "llo")]
        last = {"choices": [{"delta": {}}], "edgecascade": completion("x", source="edge")["edgecascade"]}
        lines = [f"data: {json.dumps(c)}\n\n" for c in (*chunks, last)]
        return httpx.Response(200, text="".join([": ping\n\n", *lines, "data: [DONE]\n\n", "data: {}\n\n"]))

    with Client("http://test", httpx.MockTransport(handler), api_key="k") as client:
        *pieces, last = client.stream("chat", [{"role": "user", "content": "hi"}], max_tokens=5)
    assert pieces == ["He", "llo"]
    assert isinstance(last, Reply)
    assert (last.text, last.source, last.network_bytes) == ("Hello", "edge", 300)
    assert seen[0].headers["Accept"] == "text/event-stream"
    assert seen[0].headers["Authorization"] == "Bearer k"
    assert json.loads(seen[0].content)["max_tokens"] == 5


def test_a_stream_that_breaks_off_says_so():
    def handler(request):
        return httpx.Response(200, text='data: {"error": {"message": "edge died"}}\n\n')

    with (
        Client("http://test", httpx.MockTransport(handler)) as client,
        pytest.raises(ServiceError, match="broke off: edge died"),
    ):
        list(client.stream("chat", []))


def test_query_files_are_read_line_by_line(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"text": "a", "intent": "i"}\n\n{"text": "b", "intent": "j", "slots": {"s": ["x", "y"]}, "skill": "home"}\n'
    )
    assert read(file, "home") == [Query("home", "a", "i"), Query("home", "b", "j", {"s": ["x", "y"]})]
    assert read(file, "banking") == [Query("banking", "a", "i")]
    assert read(file, "home")[1].frame == {"intent": "j", "slots": {"s": ["x", "y"]}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not an object"),
        ('{"text": "a"}', "line 1 needs 'intent'"),
        ('{"text": " ", "intent": "i"}', "line 1 needs 'text'"),
        ('{"text": "a", "intent": "i", "label": 1}', "unknown key 'label'"),
        ('{"text": "a", "intent": "i", "slots": {"x": 1}, "skill": "s"}', "'slots' must map"),
        ('{"text": "a", "intent": "i"}', "names no skill"),
        ("", "holds no query"),
    ],
)
def test_a_bad_query_file_is_named_with_its_line(tmp_path, line, says):
    file = tmp_path / "q.jsonl"
    file.write_text(line)
    with pytest.raises(QueryFileError, match=says):
        read(file)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(QueryFileError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


def test_samples_are_the_same_each_time_and_even_by_skill():
    many = [Query(skill, str(i), "x") for skill in ("assistant", "home") for i in range(50)]
    assert sample(many, 20) == sample(many, 20)
    assert count_by_skill(sample(many, 20)) == {"assistant": 20, "home": 20}
    assert sorted(q.text for q in sample(many, 500)) == sorted(q.text for q in many)
