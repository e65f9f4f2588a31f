"""Readings from a local topic of AWS IoT Greengrass: another component publishes them, classic and lite alike.

The component needs `aws.greengrass#SubscribeToTopic` on the topic in its recipe's `accessControl`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast

from functions.dispatcher.power import message
from functions.dispatcher.power.source import Clock
from routing.power import Reading

_LOG = logging.getLogger(__name__)
_AGAIN_AFTER_S = 30.0


class Client(Protocol):
    """What is used of `awsiot.greengrasscoreipc.clientv2.GreengrassCoreIPCClientV2`."""

    def subscribe_to_topic(
        self,
        *,
        topic: str,
        on_stream_event: Callable[[Any], None],
        on_stream_error: Callable[[Exception], bool],
        on_stream_closed: Callable[[], None],
    ) -> tuple[Any, Any]:
        """Begin; events arrive in a thread of the client's own."""

    def close(self, *, executor_wait: bool = True) -> Any:
        """End the connection and with it all subscriptions."""


def connect() -> Client:
    """The nucleus of this machine, by the socket and token that it gave the component."""
    module: Any = import_module("awsiot.greengrasscoreipc.clientv2")
    return cast("Client", module.GreengrassCoreIPCClientV2())


@dataclass
class GreengrassSource:
    """The last message on `topic`. The first read subscribes; a connection that was lost is made anew, not at once.

    `heard` is called at each message, so that nobody need wait for the next look.
    """

    topic: str
    heard: Callable[[], None] = lambda: None
    connect: Callable[[], Client] = connect
    clock: Clock = time.monotonic
    name: str = "greengrass"
    _client: Client | None = field(default=None, init=False)
    _last: Reading | None = field(default=None, init=False)
    _next_try_s: float | None = field(default=None, init=False)
    _lost: Client | None = field(default=None, init=False)

    def read(self) -> Reading | None:
        """What came last, with the time when it came; None before anything did."""
        if self._client is not None and self._lost is self._client:
            self.close()
        if self._client is None and (self._next_try_s is None or self.clock() >= self._next_try_s):
            self._next_try_s = self.clock() + _AGAIN_AFTER_S
            self._subscribe()
        return self._last

    def close(self) -> None:
        """End the subscription."""
        client, self._client = self._client, None
        if client is not None:
            client.close(executor_wait=False)

    def _subscribe(self) -> None:
        client = None
        try:
            client = self.connect()
            client.subscribe_to_topic(
                topic=self.topic,
                on_stream_event=self._event,
                on_stream_error=self._failed,
                on_stream_closed=partial(self._closed, client),
            )
        except Exception as error:  # noqa: BLE001  # the library's own, OSError, KeyError where no nucleus started us
            _LOG.warning("no subscription to %s: %s; trying again later", self.topic, type(error).__name__)
            if client is not None:
                client.close(executor_wait=False)
            return
        self._client = client

    def _event(self, event: Any) -> None:
        """A message, as JSON or as bytes; what makes no sense is left out, and the last one ages."""
        if event.json_message is not None:
            reading = message.from_object(event.json_message.message, self.name, self.clock())
        else:
            reading = message.parse(event.binary_message.message, self.name, self.clock())
        if reading is not None:
            self._last = reading
            self.heard()

    def _failed(self, error: Exception) -> bool:
        _LOG.warning("the subscription to %s failed: %s", self.topic, type(error).__name__)
        return True  # close it

    def _closed(self, client: Client) -> None:
        """`client` tells a late word of an old connection from one of the new."""
        self._lost = client
