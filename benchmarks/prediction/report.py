"""Predicted results that people can read, what changed between two of them, and what a GPU's results say of the constants."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from .constants import CALIBRATION, values

NOISE = 1.01
"""Predictions within 1% are the same: the assembler schedules alike code differently."""


def print_tables(result: dict) -> None:
    """A table a size and pass, and the sums of the step."""
    steps = {(step["size"], step["pass"]): step for step in result["steps"]}
    for size, what in dict.fromkeys((row["size"], row["pass"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["size"], row["pass"]) == (size, what)]
        _print_rows(f"{size}, {what}, batch {rows[0]['batch']}", rows)
        if (size, what) in steps:
            _print_sums(steps[size, what])
    for row in result["resources"]:
        if row["local_bytes"]:
            print(
                f"{row['arch']}: {row['kernel']} {row['configuration']} of {row['size']} has {row['local_bytes']} bytes local"
            )


def _print_rows(title: str, rows: list[dict]) -> None:
    print(f"\n{title}: microseconds a launch, sm_90")
    head = f"{'floor':>7} {'bound':>7} {'estimate':>8} {'/floor':>6}  {'limit':7} {'regs':>4} {'programs':>8}"
    print(f"  {'kernel':17} {'configuration':40} {'times':>5} {head}")
    for r in rows:
        print(
            f"  {r['kernel']:17} {r['configuration']:40} {r['count']:5} {r['floor_us']:7.1f} {r['bound_us']:7.1f} "
            f"{r['estimate_us']:8.1f} {r['estimate_us'] / r['floor_us']:6.2f}  {r['limit']:7} {r['registers']:4} "
            f"{r['resident']:8}{'  local memory' if r['local_bytes'] else ''}"
        )


def _print_sums(step: dict) -> None:
    print(
        f"  layers {step['layers_ms']:.1f} ms (floor {step['layers_floor_ms']:.1f}, bound {step['layers_bound_ms']:.1f}), "
        f"around them {step['around_ms']:.1f}, PyTorch's operations {step['pytorch_ms']:.1f}; host {step['host_ms']:.1f}: "
        f"a step of {step['step_ms']:.1f} ms (floor {step['step_floor_ms']:.1f}), {step['images_per_second']:,.0f} images/s"
    )


def _keyed(rows: list[dict], *names: str) -> dict[tuple, dict]:
    """Rows by what names them; of like ones (a kernel at the bottom of the stack) in order."""
    found, seen = {}, defaultdict(int)
    for row in rows:
        key = tuple(row[name] for name in names)
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def compare(old: Path, new: Path) -> int:
    """Prints what is predicted otherwise; exit status 1 if anything got slower, 2 if a file cannot be read."""
    try:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    except (OSError, ValueError) as error:
        print(f"predicted.py: error: {error}")
        return 2
    slower = False
    for kind, names, time in (("rows", ("size", "pass", "kernel"), "estimate_us"), ("steps", ("size", "pass"), "step_ms")):
        a, b = _keyed(before[kind], *names), _keyed(after[kind], *names)
        for key in [*a, *(k for k in b if k not in a)]:
            times = [table[key][time] if key in table else None for table in (a, b)]
            label = " ".join(map(str, key[:-1]))
            if None in times:
                print(f"{label:44} only in {old if times[1] is None else new}")
            elif max(times) > NOISE * min(times):
                slower |= times[1] > times[0]
                print(f"{label:44} {times[0]:9.1f} → {times[1]:9.1f} {time.partition('_')[2]}  {times[1] / times[0]:.2f}×")
    return int(slower)


_MEASURED = {"mssa forward": ("attention forward", "mssa_forward"), "mssa backward": ("attention backward", "mssa_backward"),
             "ista forward": ("product", "ista")}  # fmt: skip
"""Which measured operation sets which factor, and the predicted kernel it is held against."""


def calibrate(measured: Path, predicted: Path) -> int:
    """Sets constants from a GPU's results file, writes calibration.json, and prints measured beside predicted.

    DRAM and the product rate come from the run's ceilings, the clock from what the GPU ran at; a factor a kind of kernel is the
    geometric mean of measured over predicted, made after those are set: predict again, then calibrate again.
    """
    try:
        result, model = (json.loads(path.read_text(encoding="utf-8")) for path in (measured, predicted))
        ceilings = result["ceilings"]["bfloat16"]
    except (OSError, ValueError, KeyError) as error:
        print(f"predicted.py: error: {measured}: {type(error).__name__}: {error}")
        return 2
    found = {"DRAM": ceilings["bytes_per_second"], "product rate": ceilings["flops_per_second"]}
    rows = [r for r in result["rows"] if r["peer"] == "crate_fast" and r["mode"] == "eager" and "ms" in r]
    clocks = [c for row in rows for c in map(_clock, row["conditions"]) if c]
    if clocks:
        found["clock"] = statistics.median(clocks)
    ratios = defaultdict(list)
    for row in rows:
        for ms, kind in _predicted(row, model):
            print(f"{row['what']:14} {row['size']:6} batch {row['batch']:5}: measured {row['ms']:8.3f} ms, predicted {ms:8.3f}")
            ratios[kind].append(row["ms"] / ms)
    for kind, each in ratios.items():
        if kind:
            name = f"factor, {kind}"
            found[name] = values()[name] * math.exp(statistics.fmean(map(math.log, each)))
    CALIBRATION.write_text(json.dumps({"machine": result["machine"], "values": found}, indent=1) + "\n", encoding="utf-8")
    print(f"constants: {CALIBRATION}")
    return 0


def _clock(conditions: dict) -> float | None:
    """Hz of the multiprocessors, from what nvidia-smi printed."""
    text = next((value for name, value in conditions.items() if name.startswith("clocks.sm")), None)
    m = re.match(r"(\d+) MHz", text or "")
    return 1e6 * int(m[1]) if m else None


def _predicted(row: dict, model: dict) -> list[tuple[float, str | None]]:
    """(milliseconds, kind of kernel that they tell of) of a measured row; empty where nothing like it was predicted."""
    step = {"train": "training", "inference": "inference"}.get(row["what"])
    same = [s for s in model["steps"] if s["size"] == row["size"] and s["batch"] == row["batch"]]
    if step:
        return [(s["step_ms"], None) for s in same if s["pass"] == step]
    kind, kernel = _MEASURED.get(row["what"], (None, None))
    if not same or kernel is None:
        return []
    rows = [r for r in model["rows"] if r["size"] == row["size"] and r["pass"] == "training" and r["kernel"] == kernel]
    return [(1e-3 * rows[0]["estimate_us"], kind)] if rows else []
