"""All that needs a GPU, in one command and as many calls as it takes: are the kernels right, and how fast are they.

    python benchmarks/gpu.py --budget 540          runs the queue for at most 540 seconds and writes what it has
    python benchmarks/gpu.py --budget 540          goes on from there; with --state DIR on another machine too
    python benchmarks/gpu.py --publish             what was measured, to benchmarks/results/DEVICE.json
    python benchmarks/gpu.py --list                the queue: estimates, memory, what waits for what; needs no GPU
    python benchmarks/gpu.py --only "tune tiny"    these steps; with --again whatever is recorded of them
    python benchmarks/gpu.py --rehearse            the whole queue on a CPU, at toy sizes, with kernels that do nothing
    python benchmarks/gpu.py --precompile          compiles for sm_90 here what the queue launches; needs no GPU

The first GPU that is seen is measured (CUDA_VISIBLE_DEVICES chooses). It needs PyTorch, Triton, pytest with pytest-xdist and
tqdm; nothing is installed, the package neither. Wheels in wheels/ beside the checkout (`make wheels` fetches lion-pytorch and
simplejpeg) are unpacked and used where the machine lacks them.

The queue (gpu_queue/queue.py) is made of small steps, the most valuable first, each in a process of its own: what fails,
hangs or runs out of memory is recorded with its last lines, and the queue goes on. Nothing is timed whose own kernels have
not passed parity on this architecture, and every peer is judged again before it is timed. Steps that failed are tried again
once all others are done. The state, three files of at most 16 MiB, is all that has to be carried (gpu_queue/state.py).

Exit status: 0; 1 where a step failed; 2 for wrong arguments, or without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # behind this folder
os.environ.setdefault("TRITON_INTERPRET", "0")  # read when Triton is imported

from gpu_queue import cache
from gpu_queue.process import machine_facts, run_step
from gpu_queue.queue import SHARDS, Step, queue
from gpu_queue.state import DONE, State, publish

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "runs" / "gpu"
MARGIN = 5.0
"""Seconds of a budget that are kept for writing."""
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))


def use_wheels(folder: Path, target: Path) -> None:
    """Puts packages of the wheels in `folder` that are missing here on the path, of this process and those it starts."""
    for wheel in sorted(folder.glob("*.whl")):
        if find_spec(wheel.name.partition("-")[0]) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    sys.path.append(str(target))


def run_queue(steps: list[Step], state: State, place: dict, end: float, again: bool) -> bool:
    """Runs what is not done, until `end` by the monotonic clock; whether no step failed. again: what is done too."""
    first = [step for step in steps if again or not state.outcome(step.name)]
    failed = [step for step in steps if step not in first and state.outcome(step.name) not in DONE]
    good = True
    for step in first + failed:
        left = end - time.monotonic() - MARGIN
        waiting = state.waits_for(step)
        if waiting:
            print(f"{step.name}: not run, since this has not passed: {', '.join(waiting)}", flush=True)
            good &= not any(map(state.outcome, waiting))  # what has not been run yet is no failure
        elif step.estimate(place["workers"]) > left:
            print(f"{step.name}: left for the next call, {left:.0f} s are left", flush=True)
        else:
            good &= _run_one(step, state, place, left)
    return good


def _run_one(step: Step, state: State, place: dict, left: float) -> bool:
    before = cache.kernels(state.cache)
    record = run_step(step, place, min(step.seconds, left))
    if record["outcome"] == "cut off" and left < step.seconds:
        print(f"{step.name}: cut off by the budget; the next call starts it again", flush=True)
        return True
    record["compiled"] = len(cache.kernels(state.cache) - before)
    state.add(step, record)
    print(f"{step.name}: {record['outcome']}, {record['seconds']:.0f} s, {record['compiled']} compiled", flush=True)
    for row in record["rows"]:
        print(f"    {describe(row)}", flush=True)
    if record["outcome"] not in DONE:
        print(*(f"    | {line}" for line in record["last_lines"][-8:]), sep="\n", flush=True)
    return record["outcome"] in DONE


def describe(row: dict) -> str:
    """A row of results in a line."""
    name = " ".join(str(row[key]) for key in ("what", "size", "batch", "mode", "peer") if row.get(key) is not None)
    if "reason" in row:
        return f"{name}: {row['reason']}"
    if "ms" not in row:
        return name + ": " + ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
    return f"{name}: {row['ms']:.3f} ms, {row['images_per_second']:,.0f} images/s, {row['fraction_of_floor']:.0%} of the floor"


def list_steps(steps: list[Step], workers: int) -> None:
    """The table of the queue, and what a call of 540 s is estimated to bring home."""
    print(f"{'step':28}{'kernels':>8}{'estimate':>10}{'limit':>7}{'sum':>6}  {'GiB kept':>12}  waits for   ({workers} workers)")
    total = 0.0
    for step in steps:
        total += step.estimate(workers)
        needs = f"{len(step.needs)} steps" if len(step.needs) > 2 else ", ".join(step.needs)
        row = f"{step.name:28}{step.kernels:8}{step.estimate(workers):8.0f} s{step.seconds:5.0f} s{total:6.0f}"
        print(f"{row}  {step.memory():>12}  {needs}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="end before so many seconds (no limit)")
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help="what is carried from call to call (runs/gpu)")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAMES", help="these steps, with commas")
    parser.add_argument("--again", action="store_true", help="what is done too")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"processes of tests (here: {WORKERS})")
    parser.add_argument("--list", action="store_true", help="print the queue and run nothing")
    parser.add_argument("--publish", action="store_true", help="write the state's rows to benchmarks/results/, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="run it on a CPU with kernels that do nothing")
    parser.add_argument("--precompile", action="store_true", help="compile for sm_90 what the queue launches, and run nothing")
    options = parser.parse_args(argv)
    names = {step.name for step in (*queue(), *queue(1))}
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only names {name!r}; allowed are {', '.join(sorted(names))}")
    if options.state.exists() and not options.state.is_dir():
        parser.error(f"--state is {options.state}, which is no directory")
    return options


def main(argv: list[str] | None = None) -> int:
    end = time.monotonic()
    options = parse(argv)
    end += options.budget
    steps = [step for step in queue(1 if options.rehearse else SHARDS) if not options.only or step.name in options.only]
    if options.list:
        list_steps(steps, options.workers)
        return 0
    if options.publish:
        print(*publish(options.state, ROOT / "benchmarks" / "results"), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="crate-fast-gpu-") as scratch:
        use_wheels(ROOT / "wheels", Path(scratch) / "packages")
        paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"), *sys.path[-1:]))}
        os.environ |= cache.environment(Path(scratch) / "triton") | paths
        if options.precompile:
            from gpu_queue.ahead import compile_ahead

            return compile_ahead(options.state, Path(scratch))
        facts = machine_facts(options.rehearse)
        if facts is None:
            print("gpu.py: error: this command needs a CUDA GPU, and PyTorch finds none here", file=sys.stderr)
            return 2
        print(f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}", flush=True)
        state = State(options.state, Path(scratch), facts)
        os.environ["CRATE_FAST_CACHE"] = str(state.shapes)
        place = {"scratch": Path(scratch), "workers": options.workers, "rehearse": options.rehearse, "name": facts["device"]}
        return 0 if run_queue(steps, state, place, end, options.again) else 1


if __name__ == "__main__":
    sys.exit(main())
