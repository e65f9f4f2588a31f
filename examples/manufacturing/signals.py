"""Half a second of a machine's vibration with its temperature, as a sensor sends it; made up, sound or with a fault.

A motor of about 1,480 turns a minute: vibration at turning speed and its harmonics, a gear, and noise, all growing
with the load, as the temperature does. Faults as they show in practice (ISO 13373-1; Randall 2011, "Vibration-based
Condition Monitoring"): imbalance at turning speed, misalignment at twice that, a bearing as impacts that ring at high
frequency.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 2048
SAMPLES = 1024
FEATURES = ("turning speed", "twice turning speed", "high frequency", "impacts", "temperature", "load")
"""The first four are natural logarithms of mm/s (impacts: of the crest factor), then degrees Celsius, and a share."""
HIGH_FREQUENCY_HZ = 400.0

Fault = Literal["", "imbalance", "misalignment", "bearing", "overheating"]
FAULTS: tuple[Fault, ...] = ("imbalance", "misalignment", "bearing", "overheating")
Floats = NDArray[np.float64]


def reading(rng: np.random.Generator, fault: Fault = "") -> dict[str, object]:
    """One reading, JSON-ready: vibration in mm/s (SAMPLES), temperature, turns a minute, load as a share."""
    load = rng.uniform(0.5, 1.0)
    speed_hz = rng.normal(24.7, 0.1) - 0.4 * load
    time_s = np.arange(SAMPLES) / SAMPLE_RATE_HZ
    levels = {1: load * rng.normal(1.0, 0.06), 2: load * rng.normal(0.3, 0.02), 12: load * rng.normal(0.2, 0.02)}
    if fault == "imbalance":
        levels[1] *= rng.uniform(2.0, 4.0)
    if fault == "misalignment":
        levels[2] *= rng.uniform(3.0, 6.0)
    vibration = rng.normal(0, 0.15 + 0.1 * load, SAMPLES)
    for order, level in levels.items():
        vibration += level * np.sin(2 * np.pi * (order * speed_hz * time_s + rng.uniform()))
    if fault == "bearing":
        vibration += _impacts(time_s, 4.28 * speed_hz, rng.uniform(2.0, 4.0), rng)
    temperature_c = 28 + 26 * load + rng.normal(0, 0.8) + (rng.uniform(8, 20) if fault == "overheating" else 0)
    return {
        "vibration_mm_s": np.round(vibration, 4).tolist(),
        "temperature_c": round(float(temperature_c), 2),
        "speed_rpm": round(60 * float(speed_hz), 1),
        "load": round(float(load), 3),
    }


def features(vibration_mm_s: Floats, temperature_c: float, speed_rpm: float, load: float) -> Floats:
    """The FEATURES (6,) of a reading."""
    speed_hz = speed_rpm / 60
    spectrum = np.abs(np.fft.rfft(vibration_mm_s)) / len(vibration_mm_s)
    is_high = np.fft.rfftfreq(len(vibration_mm_s), 1 / SAMPLE_RATE_HZ) >= HIGH_FREQUENCY_HZ
    rms = float(np.sqrt(np.mean(vibration_mm_s**2)))
    levels = (
        _level(vibration_mm_s, speed_hz),
        _level(vibration_mm_s, 2 * speed_hz),
        float(np.sqrt(2 * np.sum(spectrum[is_high] ** 2))),
        float(np.max(np.abs(vibration_mm_s))) / max(rms, 1e-9),
    )
    return np.array([*np.log(np.maximum(levels, 1e-6)), temperature_c, load])


def _level(vibration_mm_s: Floats, frequency_hz: float) -> float:
    """The amplitude at one frequency, by projection on it; a window keeps neighbours out."""
    window = np.hanning(len(vibration_mm_s))
    turns = np.exp(-2j * np.pi * frequency_hz * np.arange(len(vibration_mm_s)) / SAMPLE_RATE_HZ)
    return float(2 * np.abs(np.sum(window * vibration_mm_s * turns)) / np.sum(window))


def _impacts(time_s: Floats, rate_hz: float, level: float, rng: np.random.Generator) -> Floats:
    """A decaying ring at 700 Hz for each impact."""
    since_s = np.mod(time_s + rng.uniform() / rate_hz, 1 / rate_hz)
    return np.asarray(level * np.exp(-since_s / 0.0015) * np.sin(2 * np.pi * 700 * since_s))
