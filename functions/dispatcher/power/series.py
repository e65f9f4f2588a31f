"""The state of the power as Prometheus reads it: `metrics.add(series(watch.power))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from routing.power import Power, PowerMode

Labels = dict[str, str]


def series(read: Callable[[], Power]) -> Callable[[Labels], Iterable[Metric]]:
    """What collects the gauges of the state that `read` gives; what nobody measures has none."""
    return lambda labels: _gauges(read(), labels)


def _gauges(power: Power, labels: Labels) -> Iterator[Metric]:
    mode = GaugeMetricFamily(
        "edgecascade_power_mode", "1 for the mode that battery and heat ask for.", labels=[*labels, "mode"]
    )
    for one in PowerMode:
        mode.add_metric([*labels.values(), one.value], float(power.mode is one))
    yield mode
    yield _gauge("hot", "1 while it is too warm, or throttled.", power.hot, labels)
    if power.level is not None:
        by_source = {**labels, "source": power.source}
        yield _gauge("battery_level_ratio", "The battery, 1: full.", power.level, by_source)
    if power.charging is not None:
        yield _gauge("battery_charging", "1 while power comes from outside.", power.charging, labels)
    if power.celsius is not None:
        yield _gauge("temperature_celsius", "The hottest place that is measured.", power.celsius, labels)


def _gauge(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = GaugeMetricFamily(f"edgecascade_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family
