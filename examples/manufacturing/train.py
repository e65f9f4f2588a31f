"""Train the detector: a linear autoencoder, written as ONNX.

It learns from sound readings how the features hang together (principal components; Jackson and Mudholkar 1979, "Control
procedures for residuals associated with principal component analysis"); a reading that does not is an anomaly. Output
`missed` (n, 6) is what it could not rebuild of each feature, in standard deviations, `residual` the same in the
feature's own unit, and `score` (n,) the mean square of `missed`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples.manufacturing.signals import FAULTS, FEATURES, Fault, Floats, features, reading

SEED = 7
READINGS = 1500
"""Sound ones to train on, and as many others to set the threshold on."""
KEPT_COMPONENTS = 2
FALSE_ALARMS = 0.002
"""Share of sound readings over the threshold; two in a row make an alarm."""
DETECTOR = Path("var/manufacturing/detector.onnx")
_MANY = 500


def sample(rng: np.random.Generator, count: int, fault: Fault = "") -> Floats:
    """Features (count, 6) of readings made up."""
    return np.array([_features(rng, fault) for _ in range(count)])


def _features(rng: np.random.Generator, fault: Fault) -> Floats:
    made = reading(rng, fault)
    numbers = [float(str(made[name])) for name in ("temperature_c", "speed_rpm", "load")]
    return features(np.array(made["vibration_mm_s"]), *numbers)


def scores(x: Floats, mean: Floats, scale: Floats, basis: Floats) -> Floats:
    """What the ONNX graph computes, in numpy: (n, 6) → (n,)."""
    standard = (x - mean) / scale
    return np.asarray(np.mean((standard - standard @ basis @ basis.T) ** 2, axis=1))


def train(path: Path, seed: int = SEED, readings: int = READINGS) -> float:
    """Train on sound readings, set the threshold on others, write the model; gives the threshold."""
    rng = np.random.default_rng(seed)
    x, held = sample(rng, readings), sample(rng, readings)
    mean, scale = x.mean(0), x.std(0)
    _, _, components = np.linalg.svd((x - mean) / scale, full_matrices=False)
    basis = components[:KEPT_COMPONENTS].T
    threshold = float(np.quantile(scores(held, mean, scale, basis), 1 - FALSE_ALARMS))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    onnx.save(_model(mean, scale, basis, threshold), whole)
    whole.replace(path)
    return threshold


def _model(mean: Floats, scale: Floats, basis: Floats, threshold: float) -> onnx.ModelProto:
    """Standardise, project on the kept components and back, subtract, square, mean."""
    values = {"mean": mean, "scale": scale, "down": basis, "up": basis.T}
    weights = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [
        helper.make_node("Sub", ["features", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "scale"], ["standard"]),
        helper.make_node("MatMul", ["standard", "down"], ["code"]),
        helper.make_node("MatMul", ["code", "up"], ["rebuilt"]),
        helper.make_node("Sub", ["standard", "rebuilt"], ["missed"]),
        helper.make_node("Mul", ["missed", "scale"], ["residual"]),
        helper.make_node("Mul", ["missed", "missed"], ["squared"]),
        helper.make_node("ReduceMean", ["squared", "axes"], ["score"], keepdims=0),
    ]
    width = len(FEATURES)
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width])]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("missed", TensorProto.FLOAT, ["n", width]),
        helper.make_tensor_value_info("residual", TensorProto.FLOAT, ["n", width]),
    ]
    graph = helper.make_graph(nodes, "detector", inputs, outputs, [*weights, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"threshold": repr(threshold), "features": ",".join(FEATURES)})
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """Train, and print what the detector finds in readings that it has not seen."""
    from examples.manufacturing.monitor import Detector

    parser = argparse.ArgumentParser(description="Train the anomaly detector.")
    parser.add_argument("--out", type=Path, default=DETECTOR)
    given = parser.parse_args()
    threshold = train(given.out)
    print(f"{given.out}: {given.out.stat().st_size} bytes, threshold {threshold:.3f}, seed {SEED}")
    detector, rng = Detector.open(given.out), np.random.default_rng(SEED + 1)
    for fault in ("", *FAULTS):
        found = [detector.judge(x) for x in sample(rng, _MANY, fault)]
        over = sum(judged.is_anomaly for judged in found)
        print(f"{fault or 'sound'}: {over} of {len(found)} readings over the threshold")


if __name__ == "__main__":
    main()
