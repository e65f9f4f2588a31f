"""What an answer costs the battery, and which way to answer costs least for a deadline. Pure, and a model.

Joules are watts × predicted seconds, plus the radio's joules per byte and its tail: after a transfer a cellular radio
stays awake for seconds (Balasubramanian et al., "Energy Consumption in Mobile Phones", IMC 2009). Every figure comes
in with its source; there is none in here. What a missing figure would decide stays undecided, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

DEVICE = "device"
FEWER_THREADS = "device, fewer threads"
IDLE = "idle"
EDGE = "edge"
RADIO = "radio"


@dataclass(frozen=True)
class Draw:
    """Power drawn while something is busy, and who says so. `on_battery` False: not from the device's battery."""

    watts: float
    source: str
    on_battery: bool = True

    def __post_init__(self) -> None:
        """Raise `ValueError` for a figure that is none, or that has no source."""
        _check("watts", self.watts)
        _check_source(self.source)


@dataclass(frozen=True)
class Radio:
    """The device's link: joules per byte each way; `tail_joules` for `tail_s` seconds awake after a transfer."""

    joules_per_byte_sent: float
    joules_per_byte_received: float
    source: str
    tail_joules: float = 0.0
    tail_s: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError` for a figure that is none, or that has no source."""
        for name in ("joules_per_byte_sent", "joules_per_byte_received", "tail_joules", "tail_s"):
            _check(name, getattr(self, name))
        _check_source(self.source)

    def joules(self, traffic: Traffic) -> float:
        """Energy of a transfer; one within the tail of the last prolongs it by the time between them only."""
        awake = min(1.0, traffic.since_last_s / self.tail_s) if self.tail_s else 1.0
        carried = (
            traffic.sent_bytes * self.joules_per_byte_sent + traffic.received_bytes * self.joules_per_byte_received
        )
        return carried + awake * self.tail_joules


@dataclass(frozen=True)
class Figures:
    """What is known of a site: draws by name (`DEVICE`, `FEWER_THREADS`, `IDLE`, `EDGE`), and its radio."""

    draws: Mapping[str, Draw] = field(default_factory=dict)
    radio: Radio | None = None


@dataclass(frozen=True)
class Traffic:
    """One exchange over the radio. `since_last_s`: since the one before, infinite if there was none."""

    sent_bytes: float
    received_bytes: float
    since_last_s: float = math.inf


class Saving(StrEnum):
    """The ways to answer that are open under SAVE; hedging is not among them."""

    EARLY_EXIT = "early exit"
    SHORTER_ANSWER = "shorter answer"
    DEVICE_ONLY = "device only"
    FEWER_THREADS = "fewer threads"
    NO_HEDGING = "no hedging"
    """The device first, then the edge if its answer is not trusted."""
    EDGE = "edge"


@dataclass(frozen=True)
class Option:
    """One way to answer; raises `ValueError` for seconds or a chance that are none.

    `finish_s`: seconds until the answer is there, at the worst, for the deadline. `busy_s`: predicted seconds by name
    of draw, and `chance` is the probability that `traffic` happens: both in the mean, for the energy. `p_right` is
    the probability of a right answer, None: not known.
    """

    saving: Saving
    finish_s: float
    busy_s: Mapping[str, float]
    traffic: Traffic | None = None
    chance: float = 1.0
    p_right: float | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be compared."""
        for name, value in {"finish_s": self.finish_s, "chance": self.chance, **self.busy_s}.items():
            _check(name, value)


@dataclass(frozen=True)
class Cost:
    """Joules out of the device's battery and over all, None where a figure is missing; `unknown` names those."""

    battery_joules: float | None
    total_joules: float | None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What to do: None if nothing can be chosen, and `reason` says why.

    `undecided`: options in time that could have cost less, were it not for the figures in `unknown`.
    """

    option: Option | None
    cost: Cost | None
    reason: str
    undecided: tuple[Saving, ...] = ()
    unknown: tuple[str, ...] = ()


def cost(option: Option, figures: Figures) -> Cost:
    """What `option` is predicted to cost."""
    battery, elsewhere, unknown = _known(option, figures)
    missing_here = any(name != EDGE for name in unknown)
    return Cost(
        battery_joules=None if missing_here else battery,
        total_joules=None if unknown else battery + elsewhere,
        unknown=unknown,
    )


def cheapest(options: Iterable[Option], deadline_s: float, figures: Figures, least_p_right: float = 0.0) -> Choice:
    """The option that costs the device's battery least, of those in time and right often enough.

    `deadline_s` is the time left. Equal costs: the earlier answer, then the one named first. An option whose cost is
    not known is never chosen, nor, with a `least_p_right`, one whose `p_right` is not known.
    """
    good = [option for option in options if least_p_right <= 0 or (option.p_right or 0.0) >= least_p_right]
    if not good:
        return Choice(None, None, "no option is known to be right often enough")
    costs = [(option, cost(option, figures)) for option in good if option.finish_s <= deadline_s]
    if not costs:
        return Choice(None, None, "no option is in time")
    priced = [(option, spent) for option, spent in costs if spent.battery_joules is not None]
    chosen, spent = min(priced, key=_by_battery, default=(None, None))
    least = math.inf if spent is None or spent.battery_joules is None else spent.battery_joules
    rivals = [
        (option, spent.unknown)
        for option, spent in costs
        if spent.battery_joules is None and _known(option, figures)[0] < least
    ]
    return Choice(
        chosen,
        spent,
        "least energy" if chosen else "no option's cost is known",
        undecided=tuple(option.saving for option, _ in rivals),
        unknown=tuple(dict.fromkeys(name for _, names in rivals for name in names if name != EDGE)),
    )


@dataclass(frozen=True)
class Shortcut:
    """A smaller piece of the device's work: its `share` of the time, and P(right) if that is known."""

    share: float
    p_right: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What is predicted of the next answer; None: not open.

    Seconds: `device_s` and `edge_s` of the tiers' own work (take a high percentile where the deadline is hard),
    `network_s` to the edge and back. `p_escalate`: how often the device's answer is not trusted.
    `fewer_threads`: how many times longer the device takes with them.
    """

    device_s: float | None = None
    edge_s: float | None = None
    network_s: float = 0.0
    traffic: Traffic = Traffic(0, 0)
    p_escalate: float = 0.0
    device_p_right: float | None = None
    edge_p_right: float | None = None
    early_exit: Shortcut | None = None
    shorter_answer: Shortcut | None = None
    fewer_threads: float | None = None


def options(forecast: Forecast) -> tuple[Option, ...]:
    """The ways to answer that a forecast leaves open."""
    found = _on_device(forecast, forecast.device_s) if forecast.device_s is not None else []
    if forecast.edge_s is not None:
        away_s = forecast.network_s + forecast.edge_s
        away = {IDLE: away_s, EDGE: forecast.edge_s}
        found.append(Option(Saving.EDGE, away_s, away, forecast.traffic, p_right=forecast.edge_p_right))
        if forecast.device_s is not None:
            found.append(_device_then_edge(forecast, forecast.device_s, away))
    return tuple(found)


def _on_device(forecast: Forecast, device_s: float) -> list[Option]:
    found = [Option(Saving.DEVICE_ONLY, device_s, {DEVICE: device_s}, p_right=forecast.device_p_right)]
    for saving, cut in ((Saving.EARLY_EXIT, forecast.early_exit), (Saving.SHORTER_ANSWER, forecast.shorter_answer)):
        if cut is not None:
            taken_s = device_s * cut.share
            found.append(Option(saving, taken_s, {DEVICE: taken_s}, p_right=cut.p_right))
    if forecast.fewer_threads is not None:
        taken_s = device_s * forecast.fewer_threads
        busy_s = {FEWER_THREADS: taken_s}
        found.append(Option(Saving.FEWER_THREADS, taken_s, busy_s, p_right=forecast.device_p_right))
    return found


def _device_then_edge(forecast: Forecast, device_s: float, away: Mapping[str, float]) -> Option:
    """In time only if both are, one after the other; in the mean the edge is asked as often as predicted."""
    chance = forecast.p_escalate
    busy_s = {DEVICE: device_s, **{name: chance * seconds for name, seconds in away.items()}}
    finish_s = device_s + away[IDLE]
    return Option(Saving.NO_HEDGING, finish_s, busy_s, forecast.traffic, chance, forecast.edge_p_right)


def _known(option: Option, figures: Figures) -> tuple[float, float, tuple[str, ...]]:
    """Joules that are known, out of the battery and elsewhere, and the names of the figures that are missing."""
    battery, elsewhere, unknown = 0.0, 0.0, list[str]()
    for name, seconds in option.busy_s.items():
        draw = figures.draws.get(name)
        if draw is None:
            unknown += [name] if seconds else []
        elif draw.on_battery:
            battery += draw.watts * seconds
        else:
            elsewhere += draw.watts * seconds
    if option.traffic is not None and option.chance > 0:
        if figures.radio is None:
            unknown.append(RADIO)
        else:
            battery += option.chance * figures.radio.joules(option.traffic)
    return battery, elsewhere, tuple(unknown)


def _by_battery(priced: tuple[Option, Cost]) -> tuple[float, float]:
    option, spent = priced
    return (math.inf if spent.battery_joules is None else spent.battery_joules), option.finish_s


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a number from 0")


def _check_source(source: str) -> None:
    if not source.strip():
        raise ValueError("source is empty; it must say where the figure comes from")
