"""The ways to join two tiers that `bench cascade` compares: one table, each with its settings.

A way that needs what this bundle has not (`environment` None) is left out and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.bundle import Variant
from bench.errors import BenchError

SEQUENTIAL = "sequential"
"""What the others' accuracy is held against, and whose share local the random router gets."""


@dataclass(frozen=True)
class Arm:
    """One row: the model that requests name, and what its dispatcher's environment sets.

    `hurried`: its requests carry the bench's deadline.
    """

    name: str
    title: str
    model: str = "auto"
    environment: Mapping[str, str] | None = None
    hurried: bool = True

    @property
    def dispatcher(self) -> str:
        """The name of its own dispatcher."""
        return f"dispatcher-{self.name}"

    @property
    def variant(self) -> Variant:
        """Its dispatcher; raises `BenchError` where there is none."""
        if self.environment is None:
            raise BenchError(f"this bundle has no {self.title}")
        return Variant("dispatcher", self.environment)


_PLAIN = {"POLICY_EDGE_EARLY": "false", "POLICY_EDGE_HEDGE": "0"}
ARMS = (
    Arm("device", "device only", model="device", environment=_PLAIN, hurried=False),
    Arm("edge", "edge only", model="edge", environment=_PLAIN, hurried=False),
    Arm(SEQUENTIAL, "sequential escalation", environment=_PLAIN, hurried=False),
    Arm("early", "early decision", environment={**_PLAIN, "POLICY_EDGE_EARLY": "true"}),
    Arm("draft", "draft/verify"),
    Arm("hedged", "hedged", environment={**_PLAIN, "POLICY_EDGE_HEDGE": "0.2"}),
)
TITLES = {**{arm.name: arm.title for arm in ARMS}, "random": "random router", "oracle": "oracle"}


def available(arms: Sequence[Arm] = ARMS) -> list[Arm]:
    """Those that this bundle has."""
    return [arm for arm in arms if arm.environment is not None]


def left_out(arms: Sequence[Arm] = ARMS) -> list[str]:
    """The titles of the others."""
    return [arm.title for arm in arms if arm.environment is None]
