"""Tell others that something new can be read. An announcement holds no content, only where to look.

The log and the store are the truth: whoever missed an announcement reads on after the last number it knows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

STATE_TOPIC, DEFERRED_TOPIC = "state", "deferred"
_KEEPALIVE_S = 30
_LONGEST_PAUSE_S = 30
_QUEUED = 1000
_PORTS = {"mqtt": 1883, "mqtts": 8883}


class Announce(Protocol):
    """A way to tell; never waits for anybody and never fails the call that had something to tell."""

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Announcements by what became of them."""

    def tell(self, topic: str, said: Mapping[str, Any]) -> None:
        """Announce `said` under `topic`."""

    def close(self) -> None:
        """Say goodbye."""


class Silence:
    """No broker, no announcements."""

    outcomes: Mapping[str, int] = {}  # it stays empty

    def tell(self, topic: str, said: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class MqttAnnouncer:
    """Announces over MQTT 3.1.1, at least once (QoS 1), the last of each topic retained for those who come later.

    While the broker is away up to a thousand are kept and sent when it is back; beyond that they are dropped, which
    loses nothing but time.
    """

    def __init__(self, url: str, prefix: str) -> None:
        """`url` is `mqtt://` or `mqtts://[user:password@]host[:port]`; connects in the background."""
        from paho.mqtt import client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.outcomes: Counter[str] = Counter()
        self._prefix = prefix
        self._lost = mqtt.MQTT_ERR_QUEUE_SIZE
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(_QUEUED)
        self._client.reconnect_delay_set(1, _LONGEST_PAUSE_S)
        self._client.on_publish = self._published
        parts = urlsplit(url)
        if parts.scheme == "mqtts":
            self._client.tls_set()
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        self._client.connect_async(parts.hostname or "", parts.port or _PORTS[parts.scheme], _KEEPALIVE_S)
        self._client.loop_start()

    def tell(self, topic: str, said: Mapping[str, Any]) -> None:
        """Hand it to the client's own queue."""
        sent = self._client.publish(f"{self._prefix}/{topic}", json.dumps(said), qos=1, retain=True)
        self.outcomes["dropped" if sent.rc == self._lost else "queued"] += 1

    def close(self) -> None:
        """Say goodbye; what is still queued is dropped."""
        self._client.disconnect()
        self._client.loop_stop()

    def _published(self, *_arguments: Any) -> None:
        self.outcomes["delivered"] += 1
