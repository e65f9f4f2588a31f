"""Asks one tier over HTTP through a pool of connections."""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from functions.dispatcher import wire
from functions.dispatcher.breaker import Breaker
from functions.dispatcher.call import OK, TOO_MANY, Call, TierFailedError, as_json
from functions.dispatcher.exchange import BrokenError, Exchange, Pool, Traffic, UnreachedError, Url, fetched
from functions.dispatcher.health import Health
from functions.serving.ask import Ask
from functions.serving.parse import DEADLINE_HEADER
from functions.serving.render import EVENT_STREAM

_PROBE_S = 1.0
_JSON = {"Accept": "application/json"}


@dataclass(frozen=True)
class Target:
    """Which tier, and where. `timeout_s`: the longest it is waited for; `headers` and `trusted` as `Pool` has them."""

    name: str
    url: str
    timeout_s: float
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    trusted: ssl.SSLContext | None = None


class TierClient:
    """Asks one tier, and knows how it has been doing."""

    def __init__(self, target: Target, breaker: Breaker | None = None) -> None:
        self._pool = Pool(Url.of(target.url), headers=target.headers, trusted=target.trusted)
        self._health = Health(target.name, target.timeout_s, breaker or Breaker(self.probe))

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._health.name

    @property
    def breaker(self) -> Breaker:
        """Its circuit breaker."""
        return self._health.breaker

    def is_up(self) -> bool:
        """False while the tier is left alone after failures."""
        return self.breaker.allows()

    def takes_s(self, skill: str, share: float, *, lately: bool = False) -> float | None:
        """See `Health.takes_s`."""
        return self._health.takes_s(skill, share, lately=lately)

    def ask(
        self,
        ask: Ask,
        remaining_s: float,
        traffic: Traffic,
        *,
        useful_s: float = math.inf,
        stream: bool = False,
        draft: str = "",
    ) -> Call:
        """Begin to ask; raises `TierFailedError` where there is no time left, or no way to the tier.

        The tier is granted the time in which its answer can be here: `useful_s`, if that is less than the rest.
        `draft` is another tier's answer, for this one to verify. Costs are counted into `traffic`.
        """
        limit_s = self._health.limit_s(ask.skill, remaining_s)
        if limit_s <= 0:
            raise TierFailedError("deadline")
        headers = _headers(self._health.granted_s(min(limit_s, useful_s)), stream=stream)
        body = json.dumps(wire.request_body(ask, self.name, stream=stream, draft=draft), ensure_ascii=False).encode()
        try:
            exchange = Exchange.begin(self._pool, "POST", wire.path_of(ask), headers, body)
        except UnreachedError as error:
            self.breaker.refused()
            raise TierFailedError(f"{self.name}_unavailable") from error
        exchange.traffic = traffic
        return Call(self._health, exchange, ask, remaining_s, stream=stream)

    def describe(self) -> dict[str, Any] | None:
        """The tier's entry in its `/v1/models`; None when it does not answer."""
        if not self.is_up():
            return None
        try:
            status, body = fetched(self._pool, "GET", "/v1/models", _JSON, b"", _PROBE_S)
            found = as_json(body)
            entries = found["data"] if status == OK else []
            return next((entry for entry in entries if entry.get("id") == self.name), None)
        except UnreachedError:
            self.breaker.refused()
            return None
        except (BrokenError, LookupError, TypeError, AttributeError):
            return None

    def probe(self) -> bool:
        """Whether the tier's model is ready. One that is full is alive."""
        try:
            status, _ = fetched(self._pool, "GET", "/_/ready", _JSON, b"", _PROBE_S)
        except (UnreachedError, BrokenError):
            return False
        return status in {OK, TOO_MANY}


def _headers(granted_s: float, *, stream: bool) -> Mapping[str, str]:
    return {
        DEADLINE_HEADER: f"{1e3 * granted_s:.3f}",
        "Content-Type": "application/json",
        "Accept": EVENT_STREAM if stream else "application/json",
    }
