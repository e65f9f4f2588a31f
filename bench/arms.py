"""The ways to join two tiers that `bench cascade` compares: one table, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.bundle import Variant

SEQUENTIAL = "sequential"
"""What the others' accuracy is held against, and whose share local the random router gets."""

EDGE_IN_TIME = "edge-exits"
"""What an edge can say under the deadline, for the oracle that has to keep it."""
ORACLE_IN_TIME = "oracle-in-time"


@dataclass(frozen=True)
class Arm:
    """One row: the model that requests name, and what its dispatcher's environment sets.

    `hurried`: its requests carry the bench's deadline. `edge`: what is changed of an edge tier of its own, if anything.
    """

    name: str
    title: str
    environment: Mapping[str, str]
    model: str = "auto"
    hurried: bool = True
    edge: Mapping[str, str] = field(default_factory=dict)

    @property
    def dispatcher(self) -> str:
        """The name of its own dispatcher."""
        return f"dispatcher-{self.name}"

    @property
    def variant(self) -> Variant:
        """Its dispatcher."""
        return Variant("dispatcher", self.environment)


_PLAIN = {"POLICY_EDGE_EARLY": "false", "POLICY_EDGE_HEDGE": "0", "POLICY_EDGE_DRAFT": "false"}
_EXITS = {"EXIT_THRESHOLD": "tuned"}
ARMS = (
    Arm("device", "device only", model="device", environment=_PLAIN, hurried=False),
    Arm("edge", "edge only", model="edge", environment=_PLAIN, hurried=False),
    Arm(SEQUENTIAL, "sequential escalation", environment=_PLAIN, hurried=False),
    Arm("early", "early decision", environment={**_PLAIN, "POLICY_EDGE_EARLY": "true"}),
    Arm(
        "exits",
        "early decision, early exits",
        environment={**_PLAIN, "POLICY_EDGE_EARLY": "true"},
        edge=_EXITS,
    ),
    Arm(EDGE_IN_TIME, "edge only, early exits", model="edge", environment=_PLAIN, edge=_EXITS),
    Arm("draft", "draft/verify", environment={**_PLAIN, "POLICY_EDGE_DRAFT": "true"}),
    Arm("hedged", "hedged", environment={**_PLAIN, "POLICY_EDGE_HEDGE": "0.2"}),
)
TITLES = {**{arm.name: arm.title for arm in ARMS}, "random": "random router", "oracle": "oracle"} | {
    ORACLE_IN_TIME: "oracle in time"
}
