"""Breaks the network on purpose: a TCP proxy that delays, thins, cuts, garbles, swallows, and counts every byte."""

from bench.faults.proxy import FaultProxy
from bench.faults.values import NO_FAULTS, Faults, Traffic

__all__ = ["NO_FAULTS", "FaultProxy", "Faults", "Traffic"]
