"""The garbage collector in a server's process: seldom, and never over what lives as long as the process."""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 20)
"""Allocations before a young collection, and young ones before older: Python's own 700 are two a request."""


def collect_seldom() -> None:
    """For a server's process, once it is wired; a collection of everything took longer than a request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
