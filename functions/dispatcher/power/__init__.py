"""How much power there is: sources that read it, and `PowerWatch` that keeps the latest."""

from functions.dispatcher.power.config import PowerConfig
from functions.dispatcher.power.series import series
from functions.dispatcher.power.source import PowerSource
from functions.dispatcher.power.watch import PowerWatch

__all__ = ["PowerConfig", "PowerSource", "PowerWatch", "series"]
