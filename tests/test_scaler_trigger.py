"""Trigger metadata: read into values, or refused by the key that is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.errors import MetadataError, SettingsError
from scaler.settings import Settings
from scaler.trigger import parse

LEAST = {"function": "edge", "sloSeconds": "2", "prometheusAddress": "http://prometheus:9090"}


def test_the_least_that_must_be_said():
    trigger = parse({**LEAST, "scalerAddress": "scaler:6000", "enableTLS": "true"}, "openfaas-fn")
    assert (trigger.function, trigger.namespace, trigger.prometheus) == (
        "edge",
        "openfaas-fn",
        "http://prometheus:9090",
    )
    target = trigger.target
    assert (target.slo_s, target.percentile, target.minimum, target.maximum) == (2.0, 0.95, 1, 5)
    assert trigger.selector == 'faas_function="edge"'
    assert trigger.metric_name == "edgecascade-edge-replicas"


def test_everything_that_may_be_said():
    trigger = parse(
        {
            "function": "edge", "namespace": "other", "sloSeconds": "0.5", "percentile": "99", "minReplicas": "0",
            "maxReplicas": "12", "coldStartSeconds": "4", "slots": "4", "windowSeconds": "30", "staleSeconds": "5",
            "metricsAddress": "replicas, http://10.0.0.7:8081", "gatewayAddress": "http://gateway:8082/",
            "selector": 'app="edge",zone=~"a|b"', "tolerance": "0.05",
        },
        "openfaas-fn",
    )  # fmt: skip
    assert trigger.pages == ("replicas", "http://10.0.0.7:8081", "http://gateway:8082")
    assert (trigger.namespace, trigger.target.percentile, trigger.target.minimum) == ("other", 0.99, 0)
    assert (trigger.target.cold_start_s, trigger.target.slots, trigger.tolerance) == (4.0, 4, 0.05)
    assert (trigger.window_s, trigger.stale_s) == (30.0, 5.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"function": ""}, "function is not set"),
        ({"function": 'edge"} or up{x="'}, "function must be a name"),
        ({"function": "e" * 64}, "function must be a name"),
        ({"namespace": "no/such"}, "namespace must be a name"),
        ({"sloSeconds": ""}, "sloSeconds is not set"),
        ({"sloSeconds": "fast"}, "sloSeconds must be a number from 0.001 to 3600"),
        ({"sloSeconds": "nan"}, "sloSeconds must be a number"),
        ({"sloSeconds": "-1"}, "sloSeconds must be a number"),
        ({"percentile": "100"}, "percentile must"),
        ({"percentile": "0"}, "percentile must"),
        ({"minReplicas": "-1"}, "minReplicas must be a whole number from 0 to 1000"),
        ({"maxReplicas": "0"}, "maxReplicas must be a whole number from 1 to 1000"),
        ({"maxReplicas": "1e3"}, "maxReplicas must be a whole number"),
        ({"minReplicas": "6"}, "minReplicas is 6, above maxReplicas, which is 5"),
        ({"prometheusAddress": "prometheus:9090"}, "prometheusAddress must look like http://host:port"),
        ({"prometheusAddress": "file:///etc/passwd"}, "prometheusAddress must look like"),
        ({"prometheusAddress": "http://user:secret@host"}, "prometheusAddress must look like"),
        ({"prometheusAddress": ""}, "prometheusAddress or metricsAddress must be there"),
        ({"metricsAddress": "replicas"}, "prometheusAddress or metricsAddress must be there, and not both"),
        ({"prometheusAddress": "", "metricsAddress": "ftp://x"}, "metricsAddress must look like"),
        ({"prometheusAddress": "", "metricsAddress": "http://x," * 40}, "metricsAddress has 40 addresses"),
        ({"selector": 'a="b"} or {c="d"'}, "selector must be labels"),
        ({"windowSeconds": "1"}, "windowSeconds must be a number from 2 to 3600"),
        ({"tolerance": "2"}, "tolerance must be a number from 0 to 1"),
        ({"sloSecond": "2"}, "sloSecond is not known; did you mean sloSeconds?"),
        ({"x" * 3000: "2"}, "a key is not known"),
        ({"function": "e" * 3000}, "function is longer than 2048 characters"),
        ({f"k{i}": "" for i in range(80)}, "metadata has 83 keys; at most 64"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(changes, says):
    with pytest.raises(MetadataError) as caught:
        parse({**LEAST, **changes}, "openfaas-fn")
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith(caught.value.key)


@given(st.dictionaries(st.sampled_from([*LEAST, "percentile", "slots", "selector", "x"]), st.text(max_size=40)))
def test_whatever_comes_it_is_a_trigger_or_names_a_key(metadata):
    try:
        trigger = parse(metadata, "openfaas-fn")
    except MetadataError:
        return
    assert 0 < trigger.target.percentile < 1
    assert 0 <= trigger.target.minimum <= trigger.target.maximum
    assert '"' not in trigger.function


def test_settings_have_defaults_and_kubernetes_links_are_no_settings():
    links = {"SCALER_PORT": "tcp://10.1.2.3:6000", "SCALER_SERVICE_HOST": "10.1.2.3", "SCALER_PORT_6000_TCP": "x"}
    assert Settings.from_environment(links) == Settings.from_environment({}) == Settings()
    assert Settings().port == 6000
    assert Settings.from_environment({"SCALER_PORT": "7000", "SCALER_POLL_MS": "500"}).poll_s == 0.5


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SCALER_PROT": "1"}, "SCALER_PROT is not a setting of the scaler"),
        ({"SCALER_PORT": "http"}, "SCALER_PORT is 'http'; it must be a whole number from 0 to 65535"),
        ({"SCALER_POLL_MS": "1"}, "SCALER_POLL_MS is '1'"),
        ({"SCALER_TLS_CERT_FILE": "/nowhere"}, "SCALER_TLS_CERT_FILE is '/nowhere', and there is no such file"),
        ({"SCALER_TLS_KEY_FILE": __file__}, "must be set together"),
        ({"SCALER_TLS_CLIENT_CA_FILE": __file__}, "must be set together"),
    ],
)
def test_bad_settings_stop_the_start(environment, says):
    with pytest.raises(SettingsError, match=says):
        Settings.from_environment(environment)
