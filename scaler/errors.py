"""The exception tree of `scaler`.

ScalerError
├── SettingsError     a setting of the process is missing, misspelt or out of range
├── MetadataError     a trigger's metadata cannot be used (`key` names the culprit)
├── CrowdedError      as many triggers or streams as there may be
├── SourceError       what replicas are computed from is missing or too old
└── PlacementError    layers cannot be placed on nodes (`scaler/placement/errors.py`)

`service` translates the three in the middle to gRPC codes, once; the command line the others.
"""


class ScalerError(Exception):
    """Base of all errors raised by `scaler`; the message is one sentence that says what to do."""


class SettingsError(ScalerError):
    """A setting of the scaler's process stops its start."""


class MetadataError(ScalerError):
    """A trigger asks for what cannot be; `key` is the metadata key to blame."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key} {message}")
        self.key = key


class CrowdedError(ScalerError):
    """A bound is reached; what is served already goes on."""


class SourceError(ScalerError):
    """Metrics or replicas cannot be read, or were not for too long; there is no answer, least of all zero."""
