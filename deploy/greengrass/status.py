"""Tells a local topic of Greengrass how a function is; where no nucleus listens, nobody is told.

The component needs `aws.greengrass#PublishToTopic` on the topic in its recipe's `accessControl`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

_LOG = logging.getLogger(__name__)
_AGAIN_AFTER_S = 60.0


class Publish(Protocol):
    """Sends one message to a topic."""

    def __call__(self, topic: str, message: Mapping[str, Any]) -> None:
        """Raises what the library raises."""

    def close(self) -> None:
        """End the connection."""


class IpcPublish:
    """The nucleus of this machine, by the socket and token that it gave the component (awsiotsdk)."""

    def __init__(self) -> None:
        """Connect; raises what the library raises, `ModuleNotFoundError` where it is not installed."""
        module: Any = import_module("awsiot.greengrasscoreipc.clientv2")
        self._model: Any = import_module("awsiot.greengrasscoreipc.model")
        self._client = module.GreengrassCoreIPCClientV2()

    def __call__(self, topic: str, message: Mapping[str, Any]) -> None:
        """Publish as JSON."""
        body = self._model.PublishMessage(json_message=self._model.JsonMessage(message=dict(message)))
        self._client.publish_to_topic(topic=topic, publish_message=body)

    def close(self) -> None:
        """End the connection."""
        self._client.close(executor_wait=False)


@dataclass
class StatusTopic:
    """Publishes to `topic`; never raises. After a failure it is quiet for a minute, and says each kind of it once."""

    topic: str
    connect: Callable[[], Publish] = IpcPublish
    clock: Callable[[], float] = time.monotonic
    _publish: Publish | None = field(default=None, init=False)
    _next_try_s: float | None = field(default=None, init=False)
    _said: str = field(default="", init=False)

    def tell(self, message: Mapping[str, Any]) -> bool:
        """Send one message; tells whether it went out."""
        if not self.topic or (self._next_try_s is not None and self.clock() < self._next_try_s):
            return False
        try:
            if self._publish is None:
                self._publish = self.connect()
            self._publish(self.topic, message)
        except Exception as error:  # noqa: BLE001  # the library's own, OSError, KeyError where no nucleus started us
            self._failed(type(error).__name__)
            return False
        self._next_try_s, self._said = None, ""
        return True

    def close(self) -> None:
        """End the connection, whatever it says to that."""
        publish, self._publish = self._publish, None
        if publish is not None:
            try:
                publish.close()
            except Exception as error:  # noqa: BLE001
                _LOG.warning("the connection to the nucleus did not close: %s", type(error).__name__)

    def _failed(self, kind: str) -> None:
        if kind != self._said:
            _LOG.warning("no status to %s: %s; the function goes on, and this is tried again later", self.topic, kind)
        self._said, self._next_try_s = kind, self.clock() + _AGAIN_AFTER_S
        self.close()
