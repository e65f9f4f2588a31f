"""The seam: what every source of power readings is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from routing.power import Reading

Clock = Callable[[], float]


class PowerSource(Protocol):
    """One place that knows something of the battery or the heat. Making one does no work; `read` does it all."""

    @property
    def name(self) -> str:
        """Stands in readings, logs and metrics."""

    def read(self) -> Reading | None:
        """What is known now; None where there is nothing, or nothing that makes sense. Does not raise for hardware."""

    def close(self) -> None:
        """Let go of what was opened; may be called again."""
