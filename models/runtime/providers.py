"""Execution providers of onnxruntime, by short names; which of those wanted can be used."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

CPU = "CPU"
PROVIDERS = {
    "CPU": "CPUExecutionProvider",
    "CUDA": "CUDAExecutionProvider",
    "TensorRT": "TensorrtExecutionProvider",
    "OpenVINO": "OpenVINOExecutionProvider",
    "QNN": "QNNExecutionProvider",
    "ROCm": "ROCMExecutionProvider",
    "MIGraphX": "MIGraphXExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "XNNPACK": "XnnpackExecutionProvider",
}
"""Names as in the setting EXECUTION_PROVIDERS, and as onnxruntime has them. CPU is tested, the card of a tier says
which is in use."""


def usable(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    """Those of the providers `wanted` that this onnxruntime has, by its own names; CPU comes last in any case.

    Raises `KeyError` for a name that is not in `PROVIDERS`.
    """
    names = [PROVIDERS[name] for name in (*wanted, CPU)]
    return list(dict.fromkeys(name for name in names if name in available))


@cache
def int8_products_are_exact() -> bool:
    """Whether onnxruntime multiplies unsigned by signed bytes without saturating sums, and fast.

    On x86 it needs VNNI: AVX2's own instruction adds pairs in 16 bits, which large codes overflow.
    """
    if platform.machine() in {"aarch64", "arm64"}:
        return True
    try:
        return any(flag in Path("/proc/cpuinfo").read_text("ascii", "replace") for flag in ("avx512_vnni", "avx_vnni"))
    except OSError:
        return False


def short_name(provider: str) -> str:
    """The short name of one of onnxruntime's."""
    return next((short for short, name in PROVIDERS.items() if name == provider), provider)
