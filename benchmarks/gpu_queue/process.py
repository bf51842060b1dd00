"""A step in a process of its own, forked: PyTorch is imported once, no step sees another's GPU memory or its errors.

The process that forks never touches the GPU, which no child could use then.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import torch

from crate_fast.files import write_atomically
from crate_fast.optional import MissingPackageError
from peers import Unavailable
from timing import machine

from . import kinds
from .queue import Step

FORK = get_context("fork")
GPU = torch.device("cuda", 0)
LAST_LINES = 20
OUTCOMES = {torch.OutOfMemoryError: "out of memory", MissingPackageError: "unavailable", Unavailable: "unavailable"}
"""How a step has ended, by what it raised; anything else is "failed"."""


def machine_facts(rehearse: bool) -> dict | None:
    """What identifies the machine, found out by a process that ends; None without a GPU."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send_facts, args=(theirs, rehearse))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:  # it ended before it had an answer, and has printed why
        return None
    finally:
        process.join()


def _send_facts(answer, rehearse: bool) -> None:
    if rehearse:
        answer.send(machine(torch.device("cpu")) | {"device": "rehearsal", "architecture": "none"})
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(GPU)
        answer.send(machine(GPU) | {"architecture": f"sm_{major}{minor}"})
    else:
        answer.send(None)


def run_step(step: Step, place: dict, seconds: float) -> dict:
    """Runs a step for at most so long; its record, without what names it."""
    rows, log = place["scratch"] / "rows.json", place["scratch"] / "step.log"
    rows.unlink(missing_ok=True)
    started = time.monotonic()
    process = FORK.Process(target=_child, args=(step, place, rows, log))
    process.start()
    process.join(seconds)
    ended = process.exitcode
    if ended is None:
        _kill_group(process.pid)
        process.join()
    found = json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else {"rows": []}
    outcome = "cut off" if ended is None else found.get("outcome", f"ended with {ended}")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    record = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), "rows": found["rows"]}
    return record | {"last_lines": [line[:300] for line in lines[-LAST_LINES:]]}


def _kill_group(pid: int) -> None:
    """Ends a step's process with those that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to be the first of a group yet
        os.kill(pid, signal.SIGKILL)


def _child(step: Step, place: dict, path: Path, log: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever kills the queue means its step as well
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  as long as the process
    found: dict = {"rows": []}

    def save(rows: list[dict]) -> None:
        found["rows"] += rows
        write_atomically(path, lambda file: file.write(json.dumps(found).encode()))

    found["outcome"] = _outcome(step, place, save)
    save([])


def _outcome(step: Step, place: dict, save) -> str:
    device = torch.device("cpu") if place["rehearse"] else GPU
    where = kinds.Place(device, place["name"], place["scratch"], place["workers"], place["rehearse"], save)
    try:
        if place["rehearse"]:
            from .rehearsal import rehearsed
        with rehearsed() if place["rehearse"] else nullcontext():
            kinds.KINDS[step.kind](step.options, where)
    except Exception as error:
        traceback.print_exc()
        return next((outcome for kind, outcome in OUTCOMES.items() if isinstance(error, kind)), "failed")
    return "passed"
