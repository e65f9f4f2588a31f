"""The exception tree of placement.

PlacementError
├── NodesFileError    a nodes file that cannot be used, or that contradicts itself
├── InfeasibleError   no plan exists, or none was found; the message says what is missing
└── ApplyError        a plan that could not be put into force
"""

from scaler.errors import ScalerError


class PlacementError(ScalerError):
    """Base of all errors of placement; the message is one sentence that says what to do."""


class NodesFileError(PlacementError):
    """A nodes file, or a value made of it, is not what it should be."""


class InfeasibleError(PlacementError):
    """The layers cannot be placed on these nodes."""


class ApplyError(PlacementError):
    """The platform did not take the plan."""
