"""How fast CRATE is here: crate_fast beside the published code and the best of PyTorch, judged for correctness first.

    python benchmarks/run.py                       all that fits this machine (a CPU: under 3 minutes)
    python benchmarks/run.py --suite train --model tiny --batch 1024 --dtype bfloat16 --against published,sdpa
    python benchmarks/run.py --published CHECKOUT  the published repository itself as one more peer
    python benchmarks/run.py --suite traffic       kernels launched and bytes moved a layer, counted without a GPU; of a
                                                   CRATE-MAE's encoder and decoder with --model mae-tiny
    python benchmarks/run.py --suite host          the host's time to launch a layer, without a GPU as far as the driver's call
    python benchmarks/run.py --suite predicted     what a GPU should take, by the machine code of every kernel, without a GPU
    python benchmarks/run.py --report              the README's table and the pictures again, from the results
    python benchmarks/run.py --compare OLD NEW     what became slower between two results, outside the noise

Results go to benchmarks/results/<device>.json (docs/benchmarks.md has its schema and the method); a run replaces the rows it
measures and keeps the others, so a suite can be run in parts. Exit status: 0; 1 where a comparison finds something slower or
crate_fast itself failed; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import floors
from crate_fast.backend import BACKENDS
from crate_fast.files import write_atomically
from crate_fast.model import SIZES as OF_CRATE
from judge import Judge, make_ready
from peers import MODES, Peer, Unavailable, all_peers, load_published, with_cpu_kernels
from pictures import plot
from report import SCHEMA, compare, print_rows, update_readme
from timing import Timing, ceilings, conditions, current, interleave, machine, steady_allocator
from workloads import DTYPES, SIZES, Workload, largest_batch, optimizer_name

RESULTS = Path(__file__).parent / "results"
SUITES = ("ops", "layer", "inference", "train")
ALONE = ("traffic", "host", "predicted")
PARTS = ("forward", "backward", "both")
WHATS = (*(f"{operation} {part}" for operation in ("mssa", "ista", "layer") for part in PARTS), "inference", "train")


def plan(options: argparse.Namespace, device: torch.device) -> list[Workload]:
    """The workloads that are asked for, or that fit the device."""
    gpu = device.type == "cuda"
    suites = options.suite or SUITES
    sizes = options.model or (tuple(OF_CRATE) if gpu and not options.quick else ("tiny",))
    dtypes = options.dtype or (("bfloat16", "float16") if gpu and not options.quick else ("bfloat16",) if gpu else ("float32",))
    found = []
    for size in sizes:
        for dtype in dtypes:
            found += [w for suite in suites for w in _workloads(suite, size, dtype, options.batch, gpu)]
    return [workload for workload in found if not options.what or workload.what in options.what]


def _workloads(suite: str, size: str, dtype: str, batches: list[int] | None, gpu: bool) -> list[Workload]:
    large = largest_batch(size) if gpu else 8
    if size.startswith("mae-"):  # of twice as many layers
        return [Workload(suite, suite, size, b, dtype) for b in batches or [max(1, large // 2)]] if suite == "train" else []
    if suite == "inference":
        return [Workload(suite, suite, size, b, dtype) for b in batches or ([1, 8, 64, 256, 1024] if gpu else [1, 8])]
    if suite == "train":
        return [Workload(suite, suite, size, b, dtype) for b in batches or [large]]
    alone = ("mssa",) if size.startswith("alpha-") else ("mssa", "ista")  # CRATE-α's step is a part of its layer
    operations = alone if suite == "ops" else ("layer",)
    return [Workload(suite, f"{o} {p}", size, b, dtype) for o in operations for p in PARTS for b in batches or [large]]


def modes(peer: Peer, workload: Workload, device: torch.device) -> tuple[str, ...]:
    """The modes in which a workload measures a peer.

    On a CPU whole models are compiled layer by layer: compiling three models whole, for inference and training, takes longer
    than all else.
    """
    if device.type == "cpu":
        whole = (
            workload.suite in ("inference", "train") and workload.batch > 1 and "compiled" in peer.modes and peer.same_function
        )
        return ("eager", "compiled layers") if whole else ("eager",)
    if workload.is_mae:
        return tuple(mode for mode in peer.modes if mode in ("eager", "compiled"))
    return tuple(mode for mode in peer.modes if workload.suite != "ops" or mode != "max-autotune")


def measure(
    workload: Workload, peers: list[Peer], device: torch.device, ceiling: dict, seconds: float, wanted: list[str] | None = None
) -> list[dict]:
    """A row for every peer and mode (of those `wanted`): timed together, those that are right; with the reason, those that are
    not. `ceiling` is raised to what the device reaches afterwards, if that is more."""
    published = next(peer for peer in peers if peer.name == "published")
    judge = Judge(workload, published, device)
    ready, rows = {}, []
    for peer in filter(workload.concerns, peers):
        for mode in (m for m in modes(peer, workload, device) if wanted is None or m in wanted):
            row = workload._asdict() | {"peer": peer.name, "mode": mode}
            try:
                ready[peer.name, mode] = make_ready(workload, peer, mode, device, judge)
            except torch.OutOfMemoryError:
                row["reason"] = "out of memory"
            except Exception as error:  # whatever keeps a peer from running is a row of the table, not the end of it
                text = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
                row["reason"] = " ".join(text.split())[:300]
            rows.append(row)
    before = conditions(device)
    steps = {key: made.step for key, made in ready.items()}
    times = interleave(steps, device, seconds * len(steps)) if steps else {}
    flops, size = floors.totals(workload.kernels())
    for name, reached in ceilings(device, DTYPES[workload.dtype]).items():  # again: others may have had the cores before
        ceiling[name] = max(ceiling[name], reached)
    least = floors.milliseconds(workload.kernels(), ceiling)
    for row in rows:
        key = row["peer"], row["mode"]
        if key in times:
            row |= result(workload, ready[key], times[key], least)
            row |= {"flops": flops, "bytes": size, "floor_ms": least, "conditions": [before, conditions(device)]}
    return rows


def result(workload: Workload, made, time: Timing, least: float) -> dict:
    """What a row says of a peer that was timed, beside `least`, the floor in milliseconds."""
    return ({"optimizer": optimizer_name()} if workload.suite == "train" else {}) | {
        "ms": time.median,
        "ms_q1": time.q1,
        "ms_q3": time.q3,
        "samples": time.samples,
        "images_per_second": workload.batch / time.median * 1e3,
        "fraction_of_floor": least / time.median,
        "errors": made.errors,
        "compile_seconds": made.compile_seconds,
        "peak_bytes": made.peak,
        "kept_bytes": made.kept,
    }


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("suite", "what", "size", "batch", "dtype", "peer", "mode"))


def merge(old: dict | None, new: dict) -> dict:
    """`new`, with the rows of `old` that it does not measure again; each row says with what it was measured."""
    rows = {key_of(row): row for row in (old or {}).get("rows", [])}
    rows |= {key_of(row): row for row in new["rows"]}
    return new | {"rows": list(rows.values())}


def run(options: argparse.Namespace, device: torch.device) -> tuple[dict, Path]:
    """Measures and writes the results after every workload, so that what is cut off keeps what it had."""
    steady_allocator()
    peers = all_peers(device, options.backend)
    if options.published:
        peers.insert(1, load_published(options.published))
    if options.cpu_kernels:
        peers = with_cpu_kernels(peers)
    if options.against:
        known = {peer.name for peer in peers}
        unknown = [name for name in options.against if name not in known]
        if unknown:
            raise SystemExit(f"run.py: error: --against names {unknown[0]!r}; here there are {', '.join(sorted(known))}")
        peers = [peer for peer in peers if peer.name in (*options.against, "published") or peer.name.startswith("crate_fast")]
    facts = machine(device)
    path = options.out or RESULTS / f"{file_name(facts['device'])}.json"
    seconds = 0.5 if options.quick else 3.0 if device.type == "cuda" else 0.6
    workloads = plan(options, device)
    limits = {dtype: ceilings(device, DTYPES[dtype]) for dtype in {w.dtype for w in workloads}}
    rows = []
    for workload in tqdm(workloads, desc="measuring", disable=None):
        fresh = measure(workload, peers, device, limits[workload.dtype], seconds, options.mode)
        rows += [row | {"versions": facts} for row in fresh]
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        merged = merge(old, {"schema": SCHEMA, "machine": facts, "ceilings": limits, "rows": rows})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file, merged=merged: file.write((json.dumps(merged, indent=1) + "\n").encode()))
    return {"machine": facts, "ceilings": limits, "rows": rows}, path


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--suite", type=names, metavar="NAMES", help=f"of {', '.join((*SUITES, *ALONE))}; with commas")
    parser.add_argument("--what", type=names, metavar="NAMES", help=f"only these of the suites: of {', '.join(WHATS)}")
    parser.add_argument("--model", type=names, metavar="NAMES", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--batch", type=lambda t: [int(n) for n in t.split(",")], metavar="N,...", help="images of a step")
    parser.add_argument(
        "--dtype", type=names, metavar="NAMES", help=f"of {', '.join(DTYPES)}; 16 bit means autocast, unless pure"
    )
    parser.add_argument("--mode", type=names, metavar="NAMES", help=f"only these modes: of {', '.join(MODES)}")
    parser.add_argument("--against", type=names, metavar="NAMES", help="peers to measure beside published and crate_fast")
    parser.add_argument("--published", type=Path, metavar="DIR", help="a checkout of the published repository")
    parser.add_argument(
        "--cpu-kernels", action="store_true", help="crate_fast with its kernels for CPUs, compiled here, as one more peer"
    )
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of crate_fast (default: auto)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file (default: benchmarks/results/<device>.json)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and on a GPU only CRATE-tiny in bfloat16")
    parser.add_argument("--report", action="store_true", help="measure nothing: README table and pictures from the results")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="measure nothing: two results files")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="of --suite predicted: constants from a GPU's results")
    options = parser.parse_args(argv)
    for flag, values, known in (
        ("--suite", options.suite, (*SUITES, *ALONE)), ("--what", options.what, WHATS),
        ("--model", options.model, SIZES), ("--dtype", options.dtype, DTYPES), ("--mode", options.mode, MODES),
    ):  # fmt: skip
        for value in values or ():
            if value not in known:
                parser.error(f"{flag} names {value!r}; allowed are {', '.join(known)}")
    if options.out and options.out.suffix != ".json":
        parser.error(f"--out is {options.out}; its name must end in .json (pictures go to the folder of that name without it)")
    if options.out and options.suite == ["traffic"]:
        parser.error("--out is for what is measured; --suite traffic counts")
    if options.suite == ["traffic"] and options.model and (len(options.model) > 1 or options.model[0].startswith("alpha-")):
        parser.error(f"--model is {','.join(options.model)}; --suite traffic counts the layers of one CRATE or CRATE-MAE")
    if options.calibrate and options.suite != ["predicted"]:
        parser.error("--calibrate is for --suite predicted")
    if any(batch < 1 for batch in options.batch or ()):
        parser.error(f"--batch is {min(options.batch)}; it must be at least 1")
    if options.cpu_kernels and options.device != "cpu":
        parser.error(f"--cpu-kernels is for --device cpu; --device is {options.device}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {options.device}; PyTorch finds no CUDA GPU here")
    return options


def predicted(options: argparse.Namespace) -> int:
    """The suite "predicted", in a process of its own, which compiles and so cannot interpret."""
    flags = ["--model", ",".join(options.model)] if options.model else []
    for name in ("out", "calibrate", "compare"):
        value = getattr(options, name)
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])] if value else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("predicted.py"), *map(str, flags)]
    return subprocess.run(command, env=environment, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.suite == ["predicted"]:
        return predicted(options)
    if options.compare:
        return compare(*options.compare)
    if options.report:
        return update_readme(RESULTS)
    if options.suite == ["traffic"]:
        model = "CRATE-MAE" if options.model and options.model[0].startswith("mae-") else "CRATE"
        command = [sys.executable, Path(__file__).with_name("traffic.py"), model]  # triton is imported here, not to interpret
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    if options.suite == ["host"]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        command = [sys.executable, Path(__file__).with_name("host.py"), *([options.out] if options.out else [])]
        return subprocess.run(command, env=environment, check=False).returncode
    for alone in set(ALONE) & set(options.suite or ()):
        raise SystemExit(f"run.py: error: --suite {alone} goes alone: it times no peer")
    torch.manual_seed(0)
    try:
        with current(torch.device(options.device)):
            found, path = run(options, torch.device(options.device))
    except Unavailable as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    print_rows(found)
    pictures = plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(""))
    print(f"results: {os.path.relpath(path)}; pictures: {', '.join(os.path.relpath(p) for p in pictures)}")
    first = options.mode[0] if options.mode else "eager"
    ours = [row for row in found["rows"] if row["peer"] == "crate_fast" and row["mode"] == first]
    return 1 if not ours or any("reason" in row for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
