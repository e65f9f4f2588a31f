"""The federation's environment: read once, and a mistake in it has a name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from functions.federation.app import create_app
from functions.federation.config import FederationConfig
from functions.serving.settings import FEDERATION_KEYS, ConfigError

NODES = {"FEDERATION_NODES": "a=http://headset-1:8080, b=https://store.example/function/device/"}


def test_defaults() -> None:
    config = FederationConfig.from_environment(NODES)
    assert config.nodes == {"a": "http://headset-1:8080", "b": "https://store.example/function/device"}
    assert config.votes_needed == 2
    assert (config.edge_url, config.state_path, config.redis_url, config.mqtt_url) == ("", None, "", "")
    assert (config.bounds.max_events, config.bounds.retention_s, config.deferred_limit) == (10_000, 86_400.0, 1000)


def test_everything_can_be_set() -> None:
    config = FederationConfig.from_environment(
        {
            **NODES,
            "FEDERATION_QUORUM": "1",
            "FEDERATION_STATE_PATH": "/data",
            "FEDERATION_REDIS_URL": "rediss://:secret@redis:6380/1",
            "FEDERATION_MQTT_URL": "mqtts://me:secret@broker",
            "FEDERATION_MAX_EVENTS": "7",
            "FEDERATION_RETENTION_S": "3600",
            "FEDERATION_DEFERRED_LIMIT": "5",
            "EDGE_URL": "http://edge:8080",
            "DEADLINE_MS": "200",
        }
    )
    assert (config.votes_needed, config.state_path, config.edge_url) == (1, Path("/data"), "http://edge:8080")
    assert (config.bounds.max_events, config.bounds.retention_s, config.deferred_limit) == (7, 3600.0, 5)
    assert config.common.deadline_s == 0.2
    assert "secret" not in repr(config)


@pytest.mark.parametrize(("count", "votes"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_the_quorum_is_more_than_half_unless_it_is_set(count: int, votes: int) -> None:
    nodes = ",".join(f"n{number}=http://n{number}" for number in range(count))
    assert FederationConfig.from_environment({"FEDERATION_NODES": nodes}).votes_needed == votes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("FEDERATION_NODES", ""),
        ("FEDERATION_NODES", "http://a:1"),
        ("FEDERATION_NODES", "a="),
        ("FEDERATION_NODES", "a=http://x,"),
        ("FEDERATION_NODES", "a=http://x,a=http://y"),
        ("FEDERATION_NODES", "a b=http://x"),
        ("FEDERATION_NODES", "a=ftp://x"),
        ("FEDERATION_NODES", "a=http://me:hunter2@x"),
        ("FEDERATION_NODES", ",".join(f"n{number}=http://n{number}" for number in range(65))),
        ("FEDERATION_QUORUM", "0"),
        ("FEDERATION_QUORUM", "3"),
        ("FEDERATION_QUORUM", "half"),
        ("FEDERATION_REDIS_URL", "http://:hunter2@redis"),
        ("FEDERATION_REDIS_URL", "redis://:hunter2@:6379"),
        ("FEDERATION_REDIS_URL", "redis://:hunter2@redis:99999"),
        ("FEDERATION_MQTT_URL", "tcp://me:hunter2@broker"),
        ("FEDERATION_MAX_EVENTS", "0"),
        ("FEDERATION_RETENTION_S", "nan"),
        ("FEDERATION_DEFERRED_LIMIT", "-1"),
        ("FEDERATION_QUORUMS", "1"),
        ("EDGE_URL", "edge"),
    ],
)
def test_a_mistake_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        FederationConfig.from_environment({**NODES, key: value})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "url", "library"),
    [
        ("FEDERATION_REDIS_URL", "redis://127.0.0.1:1", "redis"),
        ("FEDERATION_MQTT_URL", "mqtt://127.0.0.1:1", "paho.mqtt"),
    ],
)
def test_a_server_whose_library_is_missing_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, key: str, url: str, library: str
) -> None:
    monkeypatch.delitem(sys.modules, "functions.federation.state.redis", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    config = FederationConfig.from_environment({**NODES, key: url})
    with pytest.raises(ConfigError, match=rf"{key} is set, but its library is missing"):
        create_app(config)


def test_every_setting_is_documented() -> None:
    documented = (Path(__file__).parents[1] / "functions" / "README.md").read_text("utf-8")
    for key in FEDERATION_KEYS:
        assert f"`{key}`" in documented, key
