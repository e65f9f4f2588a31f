"""The policy: documented key by key, checked as a whole, read again when its file changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from functions.dispatcher.policy_file import PolicySource, PolicyWatch, keys, parse, variable
from functions.serving.settings import ConfigError
from routing.policy import OnEscalation, Policy

PAGE = Path(__file__).parents[1] / "docs" / "policy.md"


def watch_of(path: Path, now: list[float]) -> PolicyWatch:
    return PolicyWatch(PolicySource(path), clock=lambda: now[0])


def write(path: Path, text: str) -> None:
    """Write as editors do: a new file takes the old one's place."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def test_each_key_is_documented_and_nothing_else_is() -> None:
    assert set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(), re.MULTILINE)) == set(keys())


def test_documented_defaults_are_those_of_the_code() -> None:
    for key, said in re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \|", PAGE.read_text(), re.MULTILINE):
        value: Any = Policy()
        for part in key.split("."):
            value = getattr(value, part)
        if value is None or value == frozenset():
            assert said.strip() in {"never", "none", "the device's calibrated one"}
        else:
            assert yaml.safe_load(said) == value, key


def test_the_example_is_a_policy() -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    policy = parse(yaml.safe_load(example))
    assert (policy.battery.downscale_below, policy.local_only_skills) == (0.3, frozenset({"health"}))


def test_nothing_given_is_the_default() -> None:
    assert parse({}) == PolicySource().load() == Policy()


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"batery": {}}, "batery"),
        ({"battery": {"downscale": 0.3}}, "battery.downscale"),
        ({"battery": {"downscale_below": "low"}}, "battery.downscale_below"),
        ({"battery": {"downscale_below": True}}, "battery.downscale_below"),
        ({"battery": {"downscale_below": 30}}, "battery.downscale_below"),
        ({"battery": {"fallback_below": 0.5}}, "battery.fallback_below"),
        ({"battery": {"hysteresis": float("nan")}}, "battery.hysteresis"),
        ({"battery": 3}, "battery"),
        ({"battery": None}, "battery"),
        ({"heat": {"cool_below_c": 90}}, "heat.cool_below_c"),
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"confidence_threshold": "0.5"}, "confidence_threshold"),
        ({"deadline_ms": {"voice": -80}}, "deadline_ms.voice"),
        ({"deadline_ms": {"voice": float("inf")}}, "deadline_ms.voice"),
        ({"deadline_ms": 80}, "deadline_ms"),
        ({"latency": {"canned_above_ms": 0}}, "latency.canned_above_ms"),
        ({"edge": {"hedge": 2}}, "edge.hedge"),
        ({"edge": {"early": 1}}, "edge.early"),
        ({"retry_budget": -0.1}, "retry_budget"),
        ({"local_only_skills": "health"}, "local_only_skills"),
        ({"save": {"max_tokens": 0}}, "save.max_tokens"),
        ({"save": {"max_tokens": 1.5}}, "save.max_tokens"),
        ({"stream": {"on_escalation": "guess"}}, "stream.on_escalation"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tree: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^(the policy's )?{re.escape(named)}\b"):
        parse(tree)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.dictionaries(st.text(), v)))
def test_whatever_the_file_holds_it_is_a_policy_or_a_sentence(tree: Any) -> None:
    try:
        policy = parse({"battery": tree})
    except ConfigError:
        return
    assert policy == Policy(), "only an empty mapping is one"


def test_the_environment_outranks_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    write(path, "edge: {hedge: 0.5, least_ms: 20}\nconfidence_threshold: 0.6")
    source = PolicySource.read(
        {
            "POLICY_FILE": str(path),
            "POLICY_EDGE_HEDGE": "0.25",
            "POLICY_DEADLINE_MS": "{voice: 60}",
            "POLICY_STREAM_ON_ESCALATION": "event",
            "POLICY_RETRY_BUDGET": "",
            "CONFIDENCE_THRESHOLD": "0.7",
        }
    )
    policy = source.load()
    assert (policy.edge.hedge, policy.edge.least_ms, policy.confidence_threshold) == (0.25, 20, 0.7)
    assert (policy.deadline_ms, policy.stream.on_escalation) == ({"voice": 60}, OnEscalation.EVENT)


def test_each_key_has_a_variable() -> None:
    assert len({variable(key) for key in keys()}) == len(set(keys()))


def test_a_variable_that_names_no_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^POLICY_EDGE_HEDGING is no key"):
        PolicySource.read({"POLICY_EDGE_HEDGING": "1"})


@pytest.mark.parametrize("text", ["{", "a: b: c", "- 1", "just words", "\x00", "!!python/object:os.system {}"])
def test_a_file_that_is_no_mapping_is_one_sentence(tmp_path: Path, text: str) -> None:
    write(tmp_path / "p.yaml", text)
    with pytest.raises(ConfigError, match=r"^POLICY_FILE"):
        PolicySource(tmp_path / "p.yaml").load()


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^POLICY_FILE: .*cannot be read"):
        PolicySource(tmp_path / "p.yaml").load()


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "p.yaml", [0.0]
    write(path, "retry_budget: 0.2")
    watch = watch_of(path, now)
    write(path, "retry_budget: 0.31")
    assert watch.policy().retry_budget == 0.2, "it looks once a second"
    now[0] = 1.0
    assert (watch.policy().retry_budget, watch.reloads) == (0.31, 1)
    write(path, "retry_budgte: 0.5")
    now[0] = 2.0
    assert (watch.policy().retry_budget, watch.refused) == (0.31, 1)
    assert "retry_budgte" in caplog.text
    now[0] = 3.0
    assert (watch.policy().retry_budget, watch.refused) == (0.31, 1), "told once"
    path.unlink()
    now[0] = 4.0
    assert (watch.policy().retry_budget, watch.refused) == (0.31, 2)
    write(path, "retry_budget: 0.4")
    now[0] = 5.0
    assert watch.policy().retry_budget == 0.4
