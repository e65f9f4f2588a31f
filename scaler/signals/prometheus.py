"""Signals out of Prometheus: the samples of one window, as range selectors give them.

Rates are not left to PromQL: with the samples themselves we know how old they are, and one arithmetic (`series`) holds
for Prometheus and for pages alike. Whatever Prometheus kept is there at the first look, also after a restart of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from scaler import fetch
from scaler.errors import SourceError
from scaler.replicas import Replica
from scaler.signals.series import Series, Window
from scaler.signals.source import FUNCTION, GATEWAY, gateway_name
from scaler.trigger import Trigger

_WHO = "Prometheus"


@dataclass(frozen=True)
class PrometheusSource:
    """Asks a Prometheus over its HTTP API (`/api/v1/query`); `names` are the series of a function that it wants."""

    client: httpx.Client
    trigger: Trigger
    names: Sequence[str] = FUNCTION

    def read(self, replicas: Sequence[Replica], now_s: float) -> Window:  # noqa: ARG002 - Prometheus finds them
        """Three queries: its clock, what the function says, what the gateway says; raises `SourceError`."""
        trigger = self.trigger
        window = f"[{math.ceil(trigger.window_s)}s]"
        try:
            (_, theirs) = self._query("time()")
            later_s = now_s - float(theirs)
            gateway = f'function_name="{gateway_name(trigger.function, trigger.namespace)}"'
            found = [
                *_series(self._query(_selector(self.names, trigger.selector) + window), later_s),
                *_series(self._query(_selector(GATEWAY, gateway) + window), later_s),
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{_WHO} answered with what its API does not promise; is that its address?") from error
        return Window(found)

    def _query(self, query: str) -> Any:
        body = fetch.text(self.client, f"{self.trigger.prometheus}/api/v1/query", _WHO, {"query": query})
        answer = json.loads(body)
        if answer["status"] != "success":
            raise SourceError(f"{_WHO} refused a query ({answer.get('errorType', 'no reason given')})")
        return answer["data"]["result"]


def _selector(names: Sequence[str], matchers: str) -> str:
    return f'{{__name__=~"{"|".join(names)}",{matchers}}}'


def _series(result: Any, later_s: float) -> Iterator[Series]:
    """Series with their times moved to our clock; values that are no numbers are left out."""
    for one in result:
        labels = dict(one["metric"])
        samples = [(float(at) + later_s, float(value)) for at, value in one["values"]]
        samples = [sample for sample in samples if math.isfinite(sample[1])]
        if samples:
            yield Series(labels.pop("__name__"), labels, samples)
