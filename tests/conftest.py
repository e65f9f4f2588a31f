"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Settings of the functions: a test must not see what the shell that runs it has set.
_SETTINGS = (
    *("API_KEY", "CA_FILE", "CACHE_", "CONFIDENCE_", "DEADLINE_", "DEFAULT_SKILL", "DEVICE_", "EDGE", "EXACT_"),
    *("EXECUTION_", "FEDERATION_", "LINGER_", "LOOKUP_", "MAX_", "MODEL_", "NODE_ID", "POWER_", "PREFIX_", "QUEUE_"),
    *("SCALER_", "SHARD_", "SLOWDOWN"),
)

# A busy machine is no failure.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an environment without our settings."""
    for key in list(os.environ):
        if key.startswith(_SETTINGS) and key != "EDGECASCADE_HOME":
            monkeypatch.delenv(key)
