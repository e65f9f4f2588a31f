"""What the commands of `deploy` are handed of rooms that it must not import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.checkout import Checkout

if TYPE_CHECKING:  # `--help` loads no numpy
    from deploy.stack import Stack
    from scaler.placement.values import Problem


@dataclass(frozen=True)
class Rooms:
    """The command line puts it into the context's `obj`, by this class.

    `ensure_edge` builds the edge tier if the stack has one and there is none yet; `layers` says how many a tier has;
    `problem` reads nodes files and a tier for placement.
    """

    checkout: Checkout
    ensure_edge: Callable[[Stack], None]
    layers: Callable[[Path], int]
    problem: Callable[[Sequence[Path], Path], Problem]
