"""The environment: read once, and a mistake in it has a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from functions.dispatcher.config import DispatcherConfig
from functions.serving.settings import COMMON_KEYS, DISPATCHER_KEYS, TIER_KEYS, ConfigError, TierConfig

URLS = {"DEVICE_URL": "http://127.0.0.1:1", "EDGE_URL": "https://gateway.example:8080/function/edge/"}


def test_a_tiers_defaults() -> None:
    config = TierConfig.from_environment({"MODEL_PATH": "models/tiers/device"}, "device")
    assert (config.name, config.model_path, config.threads) == ("device", "models/tiers/device", 2)
    assert (config.prefix_cache_bytes, config.providers) == (32 << 20, ("CPU",))
    common = config.common
    assert (common.shard_id, common.max_body_bytes, common.default_skill) == ("whole", 1 << 20, "assistant")


def test_everything_can_be_set() -> None:
    values = {
        **URLS,
        "NODE_ID": "shop-3",
        "SHARD_ID": "0",
        "MAX_BODY_BYTES": "2048",
        "MAX_INFLIGHT": "9",
        "QUEUE_LIMIT": "0",
        "DEADLINE_MS": "1500",
        "DEFAULT_SKILL": "home",
        "EDGE_TIMEOUT_MS": "250",
        "CONFIDENCE_THRESHOLD": "0.85",
    }
    config = DispatcherConfig.from_environment(values)
    assert config.edge_url == "https://gateway.example:8080/function/edge"
    assert (config.policy.load().confidence_threshold, config.edge_timeout_s) == (0.85, 0.25)
    common = config.common
    assert (common.node_id, common.shard_id, common.default_skill) == ("shop-3", "0", "home")
    assert (common.max_body_bytes, common.max_inflight, common.queue_limit) == (2048, 9, 0)
    assert common.deadline_s == 1.5


def test_an_empty_value_counts_as_absent() -> None:
    config = DispatcherConfig.from_environment({**URLS, "CONFIDENCE_THRESHOLD": "", "NODE_ID": " "})
    assert (config.policy.load().confidence_threshold, config.common.node_id) == (None, "local")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("EDGE_URL", ""),
        ("EDGE_URL", "edge:8080"),
        ("EDGE_URL", "ftp://edge"),
        ("EDGE_URL", "http://"),
        ("EDGE_URL", "http://edge:99999"),
        ("EDGE_URL", "http://me:hunter2@edge"),
        ("DEVICE_URL", "http://device/?a=b"),
        ("CONFIDENCE_THRESHOLD", "85%"),
        ("CONFIDENCE_THRESHOLD", "1.5"),
        ("CONFIDENCE_THRESHOLD", "nan"),
        ("MAX_BODY_BYTES", "1MB"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_INFLIGHT", "0"),
        ("QUEUE_LIMIT", "-1"),
        ("QUEUE_LIMIT", "1.5"),
        ("DEADLINE_MS", "0"),
        ("DEADLINE_MS", "soon"),
        ("EDGE_TIMEOUT_MS", "0"),
        ("EDGE_TIMEOUT", "5"),
        ("MAX_INFLIGHTS", "5"),
        ("CONFIDENCE_TRESHOLD", "0.5"),
        ("THREADSS", "4"),
        ("NODE_IDS", "a"),
    ],
)
def test_a_mistake_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        DispatcherConfig.from_environment({**URLS, key: value})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "PATH",
        "NODE_IP",
        "MAX_JOBS",
        "EDGE_PORT",
        "EDGE_SERVICE_HOST",
        "EDGE_SERVICE_PORT_HTTP",
        "DEVICE_PORT_8080_TCP_ADDR",
        "DISPATCHER_SERVICE_PORT",
        "MODEL_PATH",
        "EDGECASCADE_HOME",
        "max_inflight",
    ],
)
def test_other_peoples_variables_are_let_alone(key: str) -> None:
    """Kubernetes announces Services, the watchdog has settings of its own, and the functions share an environment."""
    plain = DispatcherConfig.from_environment(URLS)
    assert DispatcherConfig.from_environment({**URLS, key: "http://10.0.0.1:8080"}) == plain


def test_a_tiers_engine_can_be_set() -> None:
    values = {"MODEL_PATH": "m", "THREADS": "4", "PREFIX_CACHE_MB": "0", "EXECUTION_PROVIDERS": "OpenVINO, CPU"}
    values |= {"SLOWDOWN": "2.5", "SLOWDOWN_FILE": "f"}
    config = TierConfig.from_environment(values, "edge")
    assert (config.threads, config.prefix_cache_bytes, config.providers) == (4, 0, ("OpenVINO", "CPU"))
    assert (config.slowdown, config.slowdown_file) == (2.5, Path("f"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("EXECUTION_PROVIDERS", "CPU,GPU"),
        ("EXECUTION_PROVIDERS", "cpu"),
        ("EXECUTION_PROVIDERS", "CPU,"),
        ("EXECUTION_PROVIDER", "CPU"),
        ("PREFIX_CACHE_MB", "-1"),
        ("PREFIX_CACHE", "64"),
        ("SLOWDOWN", "0.5"),
        ("SLOWDOWN", "inf"),
        ("SLOWDOWNS", "2"),
    ],
)
def test_a_mistake_in_a_tiers_settings_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        TierConfig.from_environment({"MODEL_PATH": "m", key: value}, "edge")


def test_a_tier_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="MODEL_PATH is not set"):
        TierConfig.from_environment({}, "edge")


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[1] / "functions" / "README.md").read_text()
    for key in (*COMMON_KEYS, *TIER_KEYS, *DISPATCHER_KEYS):
        assert f"`{key}`" in text, f"{key} is missing in functions/README.md"
