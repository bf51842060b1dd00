"""All that needs a GPU, in one command: are the kernels right, which shapes are fastest here, how fast are they.

    python benchmarks/gpu.py                       all four stages; at most 25 minutes
    python benchmarks/gpu.py --stages parity,run   some of them; none takes more than 8 minutes
    python benchmarks/gpu.py --out DIR             everything it writes goes there, measured shapes too
    python benchmarks/gpu.py --dry-run             the commands and their limits; needs no GPU

`parity` runs the tests marked "gpu" (every kernel, dtype, head width, candidate shape; whole models of every size and stream)
and the errors against float64; `tune` measures the kernels' shapes for the four sizes; `run` times training, inference,
layers and operations beside the published code and SDPA, as they come and as CUDA graphs; `compiled` times training under
torch.compile. A stage that fails ends the command, and nothing is timed where these very sources have not passed `parity` on
this kind of GPU: no speed without parity. A stage is cut off at its limit; what it has measured by then is written, and a
later call can go on with the next.

Exit status: 0; 1 where a stage failed or was cut off; 2 for wrong arguments, or without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from crate_fast.model import SIZES
from run import file_name
from timing import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("crate_fast", "kernels", "tests", "benchmarks")
TIMED = ("run", "compiled")
TESTS = ("test_gpu", "test_kernels", "test_layer", "test_tuning")


class Stage(NamedTuple):
    """What is run one after the other, in `seconds` together; commands are argument lists of this Python."""

    seconds: int
    commands: list[list[str]]


def stages(out: Path, device: str) -> dict[str, Stage]:
    """The stages in order, for a GPU whose results files have the name `device`."""
    tests = [f"tests/{name}.py" for name in TESTS]
    processes = str(min(8, os.cpu_count() or 1))
    pytest = ["-m", "pytest", "-q", "-m", "gpu", "--maxfail=10", f"--numprocesses={processes}", "--dist=worksteal", *tests]
    precision = ["benchmarks/precision.py", "--json", str(out / f"{device}-precision.json")]
    tune = [["-m", "crate_fast", "tune", "--size", size] for size in SIZES]
    file = ["--dtype", "bfloat16", "--against", "sdpa", "--out", str(out / f"{device}.json")]

    def timed(*commands: str) -> list[list[str]]:
        """The most important first: what is cut off is the last."""
        return [["benchmarks/run.py", *shlex.split(flags), *file] for flags in commands]

    run = timed(
        "--suite train --model tiny,base --mode 'eager,cuda graph'",
        "--suite inference --model tiny --batch 1,8,64 --mode 'eager,cuda graph'",
        "--suite layer,ops --model tiny --mode eager",
        "--suite train --model small,large --mode eager",
    )
    compiled = timed(*(f"--suite train --model {size} --mode compiled" for size in ("tiny", "base")))
    limits = {"parity": (480, [pytest, precision]), "tune": (300, tune), "run": (300, run), "compiled": (420, compiled)}
    return {name: Stage(*stage) for name, stage in limits.items()}


def run_stage(stage: Stage, environment: dict[str, str]) -> str | None:
    """Runs the commands of a stage; what went wrong, or None."""
    end = time.monotonic() + stage.seconds
    for command in stage.commands:
        left = end - time.monotonic()
        if left < 1:
            return f"no time left for: {shlex.join(command)}"
        print(f"\n$ python {shlex.join(command)}    (at most {left:.0f} s)", flush=True)
        with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True) as process:
            try:
                status = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                return f"cut off after {stage.seconds} s for the stage: {shlex.join(command)}"
        if status:
            return f"exit status {status}: {shlex.join(command)}"
    return None


def digest() -> str:
    """Of the sources that parity is about."""
    found = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def passed(receipt: Path) -> bool:
    """Whether `receipt` says that these sources have passed parity here."""
    try:
        return json.loads(receipt.read_text(encoding="utf-8"))["sources"] == digest()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = tuple(stages(RESULTS, "device"))
    parser.add_argument("--stages", default=",".join(names), metavar="NAMES", help=f"of {', '.join(names)}; with commas")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results and measured shapes go (default: results to "
                        "benchmarks/results, shapes to where the library looks for them)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their limits, and run none")
    options = parser.parse_args(argv)
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in names:
            parser.error(f"--stages names {name!r}; allowed are {', '.join(names)}")
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out is {options.out}, which is no directory")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = (options.out or RESULTS).resolve()
    if options.dry_run:
        for name, stage in stages(out, "DEVICE").items():
            if name in options.stages:
                print(f"{name}, at most {stage.seconds} s:", *(shlex.join(["python", *c]) for c in stage.commands), sep="\n  ")
        return 0
    if not torch.cuda.is_available():
        print("gpu.py: error: this command needs a CUDA GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    return run_stages(options, out)


def run_stages(options: argparse.Namespace, out: Path) -> int:
    """Runs the stages that are asked for, in their order; the exit status."""
    facts = machine(torch.device("cuda"))
    name = file_name(facts["device"])
    environment = os.environ | {"TRITON_INTERPRET": "0"} | ({"CRATE_FAST_CACHE": str(out)} if options.out else {})
    out.mkdir(parents=True, exist_ok=True)
    receipt = out / f"{name}-parity.json"
    print(f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}")
    for stage, what in stages(out, name).items():
        if stage not in options.stages:
            continue
        if stage in TIMED and not passed(receipt):
            print("gpu.py: error: no speed without parity: these sources have not passed --stages parity here", file=sys.stderr)
            return 2
        started = time.monotonic()
        wrong = run_stage(what, environment)
        seconds = round(time.monotonic() - started)
        print(f"\n{stage}: {wrong or 'passed'}, {seconds} s", flush=True)
        if wrong:
            return 1
        if stage == "parity":
            record = {"sources": digest(), "seconds": seconds, "machine": facts}
            receipt.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
