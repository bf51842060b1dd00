"""What the model of pipes.py is told of a GPU, each number with its standing: one table.

Nothing here was measured by this project on a GPU. `python benchmarks/run.py --suite predicted --calibrate FILE` sets what a
GPU's results file tells, and keeps it in results/calibration.json, which goes before this table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

CALIBRATION = Path(__file__).parents[1] / "results" / "calibration.json"


class Constant(NamedTuple):
    """A number and how it is known: "published", "measured" (elsewhere, once), "fitted" to published speeds, "assumed"."""

    value: float
    unit: str
    standing: str
    why: str


_KINDS = ("attention forward", "attention backward", "product")
CONSTANTS = {
    "multiprocessors": Constant(132, "", "published", "H100 SXM5, H200"),
    "clock": Constant(1.755e9, "Hz", "assumed", "H100 SXM5 under load without a power limit; boost is 1.98e9"),
    "DRAM": Constant(4.3e12, "bytes/s", "measured", "a large copy on one H200"),
    "L2": Constant(8.0e12, "bytes/s", "fitted", "Triton products at 689 TFLOP/s on an H100, if their tiles are 128 × 256"),
    "bytes a clock": Constant(64, "bytes", "fitted", "into a multiprocessor, to the same figures"),
    "product rate": Constant(
        7.9e14, "flop/s", "measured", "a large 16-bit product on one H200: the floors, PyTorch's products"
    ),
    "float32 rate": Constant(5.0e13, "flop/s", "assumed", "PyTorch's float32 products without tf32; 6.7e13 is published"),
    "PyTorch's product": Constant(0.7, "", "assumed", "the part of the product rate that its 16-bit products reach"),
    "PyTorch's copy": Constant(0.85, "", "assumed", "the part of the DRAM rate that its elementwise operations reach"),
    "least operation": Constant(2.5e-6, "s", "assumed", "an operation of PyTorch on the device, however small"),
    "least launch": Constant(2.0e-6, "s", "assumed", "a launch on the device, however small"),
    "driver": Constant(3.0e-6, "s", "assumed", "the driver's part of a launch, which the host's time lacks"),
    "registers": Constant(65536, "", "published", "a multiprocessor's"),
    "warps": Constant(64, "", "published", "that a multiprocessor holds"),
    "programs": Constant(32, "", "published", "that a multiprocessor holds"),
    "HMMA of HGMMA": Constant(0.62, "", "assumed", "the rate of mma.sync beside wgmma's 4,096 flop a clock"),
    "program start": Constant(300, "clocks", "assumed", "from the end of a program to its successor's first instruction"),
    **{f"factor, {kind}": Constant(1.0, "", "assumed", "measured time over predicted, once measured") for kind in _KINDS},
}

LATENCIES = {
    "none": 0, "global": 500, "vector": 250, "shared": 30, "shuffle": 24, "mufu": 22, "hgmma": 30, "hmma": 33, "barrier": 24,
    "fence": 30, "const": 30, "engine": 700, "descriptor": 500,
}  # fmt: skip
"""Clocks until a result is there, all assumed: "global" of 16-byte loads, "vector" of narrower ones, "engine" of a copy by
the tensor memory accelerator, "descriptor" until the accelerator sees a descriptor that a program has made."""


def values() -> dict[str, float]:
    """The numbers, calibrated where there is a calibration."""
    table = {name: constant.value for name, constant in CONSTANTS.items()}
    if CALIBRATION.exists():
        table |= json.loads(CALIBRATION.read_text(encoding="utf-8"))["values"]
    return table


def described() -> dict[str, dict]:
    """The table as it is stored beside results."""
    now = values()
    return {
        name: constant._asdict()
        | {"value": now[name]}
        | ({"standing": "measured", "why": "calibration.json"} if now[name] != constant.value else {})
        for name, constant in CONSTANTS.items()
    }
