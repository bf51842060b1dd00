"""What a training step and an inference should take on an H100, by the machine code of every kernel: no GPU needed.

    python benchmarks/run.py --suite predicted [--model tiny,base] [--out FILE]
    python benchmarks/run.py --suite predicted --compare OLD.json NEW.json
    python benchmarks/run.py --suite predicted --calibrate benchmarks/results/DEVICE.json

Every launch of a step (step.py) is compiled for sm_90, walked and replayed. A row a kernel: its floor (floors.py), its bound
(the busiest pipe), the estimate (a replay of what can overlap), the pipe that limits, registers, programs a multiprocessor;
for sm_80 and sm_100 registers, local memory and programs alone. A step is the sum of its launches and of PyTorch's operations,
or the host's time to launch it where that is longer. docs/performance.md says how far to trust it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tqdm import tqdm

import floors
from crate_fast.model import SIZES
from prediction.constants import described, values
from prediction.control_flow import paths
from prediction.copies import read
from prediction.intermediate import UnknownControlError
from prediction.launches import Launch, code_of, compiled, integers
from prediction.machine_code import walk
from prediction.pipes import Kernel, kernel_of, least_times, resident, work
from prediction.replay import clocks_of_program
from prediction.step import (
    PASSES,
    TOKENS,
    WIDTHS,
    Call,
    Operation,
    Recorded,
    inner_of,
    record,
    record_attention,
    record_mae,
    record_odl,
)
from workloads import SIZES as ALL_SIZES
from workloads import Workload, largest_batch

RESULTS = Path(__file__).parent / "results"
MAE = tuple(size for size in ALL_SIZES if size.startswith("mae-"))  # in training alone
BATCH = {size: largest_batch(size) for size in SIZES} | {size: max(1, largest_batch(size) // 2) for size in MAE}
ATTENTION, ODL = "attention", "odl"  # alone: for every width of heads; CRATE-α's step, for its sizes
TIMED, OTHERS = "sm_90", ("sm_80", "sm_100")
FLOORS = {
    "project": 0, "mssa_forward": 1, "out_project": 2, "ista": 3, "ista_gradient": 4, "weight_gradient": 5, "out_gradient": 6,
    "mssa_backward": 8, "project_gradient": 9, "odl z1": 0, "odl r": 1, "odl z2": 2, "odl out": 3, "odl g2": 4, "odl dr": 5,
    "odl g1": 6, "odl dh": 7, "odl dD": 8,
}  # fmt: skip
"""Where the unavoidable work of a kernel stands in `floors.layer`, by the name under which tuning.py has its shape; in
`floors.odl`, by what it writes."""


class Job(NamedTuple):
    """What must be known of a launch to predict it, without its tensors."""

    launch: Launch
    integers: tuple[int | None, ...]
    programs: int
    bytes: int
    arch: str
    timed: bool


class Prediction(NamedTuple):
    """Of one launch; times in seconds, None where they are not predicted."""

    registers: int
    local_bytes: int
    shared_bytes: int
    resident: int
    pipes: dict[str, float] | None = None
    flops: float | None = None
    bound: float | None = None
    limit: str | None = None
    estimate: float | None = None


def predict(job: Job) -> Prediction:
    """Compiles one launch and, where its time is wanted, walks and replays it."""
    result = compiled(job.launch, job.arch)
    code = code_of(result, job.launch)
    facts = Prediction(code.registers, code.local, code.shared, resident(code, job.arch))
    if not job.timed:
        return facts
    try:
        moved = read(result.asm["ttgir"])
        ways = paths(result.asm["ttir"], job.integers, job.programs)
        kernel = kernel_of(code, [(way.weight, walk(code, way, moved.copies)) for way in ways], moved)
    except UnknownControlError as error:
        raise UnknownControlError(f"{job.launch.kernel}: {error}") from error
    return _timed(facts, kernel, job)


def _timed(facts: Prediction, kernel: Kernel, job: Job) -> Prediction:
    k, done = values(), work(kernel, job.programs)
    times = least_times(done, job.bytes)
    limit = max(times, key=times.get)
    held = min(facts.resident, -(-job.programs // int(k["multiprocessors"])))
    at_once = held * k["multiprocessors"]
    waves = job.programs / at_once
    if waves < 8:  # whole waves
        waves = -(-job.programs // at_once)
    replayed = clocks_of_program(kernel, held) * held * waves / k["clock"]
    estimate = max(replayed, times["DRAM"], times["L2"], k["least launch"])
    return facts._replace(pipes=times, flops=done.flops, bound=times[limit], limit=limit, estimate=estimate)


def predict_all(jobs: list[Job], processes: int) -> dict[str, Prediction]:
    """By `repr` of the job; equal ones once."""
    fresh = list({repr(job): job for job in jobs}.values())
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(tqdm(pool.map(predict, fresh), total=len(fresh), desc="predicting", disable=None))
    return dict(zip(map(repr, fresh), found, strict=True))


def job_of(call: Call, arch: str, timed: bool) -> Job:
    numbers = tuple(integers(call.launch, call.arguments))
    return Job(call.launch._replace(name=""), numbers, call.programs, call.bytes, arch, timed)


def floor_of(call: Call, prediction: Prediction, shape: floors.Shape) -> float:
    """The least time of a launch in seconds.

    Raises:
        ValueError: it multiplies matrices, and FLOORS has no entry for it.
    """
    k = values()
    if call.role in FLOORS:
        unavoidable = (floors.odl if shape.step == ODL else floors.layer)(shape, "both")[FLOORS[call.role]]
        return max(unavoidable.flops / k["product rate"], unavoidable.bytes / k["DRAM"])
    if prediction.flops:
        raise ValueError(f"{call.launch.kernel} multiplies matrices, and predicted.FLOORS has nothing for {call.role!r}")
    return call.bytes / k["DRAM"]


def seconds_of(operation: Operation) -> float:
    """The time of one of PyTorch's operations."""
    k = values()
    rate = k["float32 rate"] if operation.bits == 32 else k["PyTorch's product"] * k["product rate"]
    return max(k["least operation"], operation.bytes / (k["PyTorch's copy"] * k["DRAM"]), operation.flops / rate)


def host_seconds(depth: int, launches: int, what: str) -> float:
    """The host's time to launch a step: as measured for the layers, the slowest of the committed files, and the driver's
    part of every launch."""
    slowest = 0.0
    for path in RESULTS.glob("host-*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))["rows"][f"crate_fast, {_HOST[what]}"]
        slowest = max(slowest, row["step"] + (depth - 12) * (row["layer forward"] + row["layer backward"]))
    return 1e-6 * slowest + launches * values()["driver"]


_HOST = {"training": "training", "inference": "evaluation"}


def table(size: str, what: str, recorded: Recorded, found: dict[str, Prediction]) -> dict:
    """One step of one size: {"step": its sums, "rows": its kernels, "operations": PyTorch's}."""
    rows = rows_of(size, what, shape_of(size, 1), recorded.calls, found)
    by_name: dict[str, list[float]] = {}
    for operation in recorded.operations:
        by_name.setdefault(operation.name, []).append(seconds_of(operation))
    others = [{"name": n, "count": len(t), "us": 1e6 * sum(t)} for n, t in sorted(by_name.items(), key=lambda x: -sum(x[1]))]
    return {"step": _sums(size, what, rows, others), "rows": rows, "operations": others}


def alone(sizes: list[str]) -> dict[tuple[str, str], tuple[floors.Shape, Callable[[int], Recorded]]]:
    """What is predicted by itself, by (size, pass): its shape, and what records it for an architecture."""
    found, batch = {}, BATCH["tiny"]
    for width in WIDTHS if ATTENTION in sizes else ():
        shape = floors.Shape(batch, TOKENS, inner_of(width), inner_of(width), 1, 2)
        found[f"heads of {width}", ATTENTION] = shape, partial(record_attention, width, batch)
    for size in (s for s in ALL_SIZES if s.startswith("alpha-") and ODL in sizes):
        of, dim = Workload("layer", "layer both", size, largest_batch(size), "bfloat16"), ALL_SIZES[size]["dim"]
        shape = floors.Shape(of.batch, of.tokens, dim, dim, 1, 2, step=ODL)
        found[size, ODL] = shape, partial(record_odl, of.batch * of.tokens, dim)
    return found


def shape_of(size: str, depth: int) -> floors.Shape:
    s = ALL_SIZES[size]
    return floors.Shape(BATCH[size], TOKENS, s["dim"], s["heads"] * s["dim_head"], depth, 2)


def rows_of(size: str, what: str, shape: floors.Shape, calls: list[Call], found: dict[str, Prediction]) -> list[dict]:
    """The kernels among launches, with how often each is launched."""
    counts = Counter(call.key for call in calls)
    first = {call.key: call for call in reversed(calls)}
    rows = []
    for key in dict.fromkeys(call.key for call in calls):
        p = found[repr(job_of(first[key], TIMED, True))]
        rows.append(_row(size, what, shape.batch, first[key], p, counts[key], floor_of(first[key], p, shape)))
    return rows


def _row(size: str, what: str, batch: int, call: Call, p: Prediction, count: int, floor: float) -> dict:
    kind = {"mssa_forward": "attention forward", "mssa_backward": "attention backward"}.get(call.role, "product")
    factor = values()[f"factor, {kind}"] if call.role else 1.0
    return {
        "size": size, "pass": what, "batch": batch, "kernel": name_of(call),
        "configuration": call.launch.name.strip(", "), "count": count, "programs": call.programs,
        "floor_us": 1e6 * floor, "bound_us": 1e6 * p.bound, "limit": p.limit, "estimate_us": 1e6 * factor * p.estimate,
        "registers": p.registers, "resident": p.resident, "local_bytes": p.local_bytes, "shared_bytes": p.shared_bytes,
        "flops": p.flops, "pipes_us": {pipe: 1e6 * t for pipe, t in sorted(p.pipes.items(), key=lambda x: -x[1])},
    }  # fmt: skip


def _sums(size: str, what: str, rows: list[dict], others: list[dict]) -> dict:
    """A step's milliseconds. "layers" are all kernels but those that run once a step and have no shape of their own."""
    k = values()
    layers = [row for row in rows if row["count"] > 1 or row["kernel"] in FLOORS]
    sums = {name: 1e-3 * sum(row["count"] * row[f"{name}_us"] for row in layers) for name in ("floor", "bound", "estimate")}
    ours = 1e-3 * sum(row["count"] * row["estimate_us"] for row in rows)
    pytorch = 1e-3 * sum(other["us"] for other in others)
    launches = sum(x["count"] for x in (*rows, *others))
    depth, whole = ALL_SIZES[size]["depth"], floors.mae if size in MAE else partial(floors.model, training=what == "training")
    host, shape = 1e3 * host_seconds(depth * (1 + (size in MAE)), launches, what), shape_of(size, depth)
    ceilings = {"flops_per_second": k["product rate"], "bytes_per_second": k["DRAM"]}
    step = max(ours + pytorch, host)
    return {
        "size": size, "pass": what, "batch": BATCH[size], "layers_floor_ms": sums["floor"], "layers_bound_ms": sums["bound"],
        "layers_ms": sums["estimate"], "around_ms": ours - sums["estimate"], "pytorch_ms": pytorch, "host_ms": host,
        "step_ms": step, "step_floor_ms": floors.milliseconds(whole(shape), ceilings),
        "launches": launches, "images_per_second": 1e3 * BATCH[size] / step,
    }  # fmt: skip


PARTS = {
    "all": ((TIMED, True), *((arch, False) for arch in OTHERS)),
    "times": ((TIMED, True),),
    "resources": tuple((arch, False) for arch in (TIMED, *OTHERS)),
}
"""(architecture, whether times are predicted for it) of what can be asked for."""


def take(sizes: list[str], parts: str) -> dict[tuple, Recorded]:
    """What is launched, by (architecture, whether it is timed, size, pass)."""
    taken = {}
    for arch, timed in PARTS[parts]:
        number = int(arch.removeprefix("sm_"))
        for size in (s for s in sizes if s in SIZES):
            taken |= {(arch, timed, size, what): record(size, BATCH[size], what, number) for what in PASSES}
        for size in (s for s in sizes if s in MAE):
            taken[arch, timed, size, "training"] = record_mae(size.removeprefix("mae-"), BATCH[size], number)
        for (size, what), (_, run) in alone(sizes).items():
            taken[arch, timed, size, what] = run(number)
    return taken


def measure(sizes: list[str], parts: str, processes: int) -> dict:
    """The whole result: versions, constants with their standing, steps, rows, PyTorch's operations, resources."""
    taken = take(sizes, parts)
    jobs = [job_of(call, arch, timed) for (arch, timed, _, _), recorded in taken.items() for call in recorded.calls]
    found = predict_all(jobs, processes)
    tables = [table(s, what, x, found) for (_, timed, s, what), x in taken.items() if timed and what in PASSES]
    rows = [row for t in tables for row in t["rows"]]
    for (size, what), (shape, _) in alone(sizes).items() if PARTS[parts][0][1] else ():
        rows += rows_of(size, what, shape, taken[TIMED, True, size, what].calls, found)
    return {
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "constants": described(),
        "steps": [t["step"] for t in tables],
        "rows": rows,
        "operations": [{"size": t["step"]["size"], "pass": t["step"]["pass"]} | o for t in tables for o in t["operations"]],
        "resources": resources(taken, found),
    }


def resources(taken: dict[tuple, Recorded], found: dict[str, Prediction]) -> list[dict]:
    """What the kernels take where no times are predicted, each once."""
    rows = {}
    for (arch, timed, size, _), recorded in taken.items():
        for call in () if timed else recorded.calls:
            p = found[repr(job_of(call, arch, timed))]
            row = {"arch": arch, "size": size, "kernel": name_of(call), "configuration": call.launch.name.strip(", ")}
            rows[repr(row)] = row | {x: getattr(p, x) for x in ("registers", "local_bytes", "shared_bytes", "resident")}
    return list(rows.values())


def name_of(call: Call) -> str:
    return call.role or call.launch.kernel.strip("_").removesuffix("_kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=lambda text: text.split(","), default=[*SIZES, *MAE, ATTENTION, ODL], metavar="NAMES")
    parser.add_argument("--parts", choices=PARTS, default="all", help=f"times are for {TIMED} alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted.json", metavar="FILE")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="predict nothing: two results")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="predict nothing: set constants from a GPU's results")
    options = parser.parse_args()
    from prediction.report import calibrate, compare, print_tables

    if options.compare:
        return compare(*options.compare)
    if options.calibrate:
        return calibrate(options.calibrate, RESULTS / "predicted.json")
    try:
        result = measure(options.model, options.parts, options.jobs)
    except UnknownControlError as error:
        print(f"predicted.py: error: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_tables(result)
    print(f"results: {os.path.relpath(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
