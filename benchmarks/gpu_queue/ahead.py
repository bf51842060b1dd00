"""Compiling for a GPU that is not here: what the queue launches for models of the published sizes, into the state's cache.

The models run on the CPU with kernels that do nothing, so Triton's own launch code says which kernels it would compile, with
which types, alignments and constants; they are compiled for sm_90 as it would, under keys that hold no path. What is launched
by the tests, whose compilations are shared by many processes on the GPU's machine, is not among them.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from crate_fast.commands.tune import find_winners, workloads
from crate_fast.kernels import tuning
from crate_fast.model import SIZES, build
from host import launched_to_nowhere

from .cache import kernels, pack, unpack
from .kinds import INFERENCE, TUNED_BATCH
from .speed import BATCHES

TARGET = GPUTarget("cuda", 90, 32)
TRAINED = (16, *BATCHES)
"""Images of a training step. How a weight gradient is cut in parts follows from them, and so do a few kernels."""


class Compilation(NamedTuple):
    """What Triton would compile: a kernel by module and name, and the arguments of its compiler."""

    module: str
    name: str
    signature: dict
    constants: dict
    options: dict
    attributes: dict


def launched(run) -> list[Compilation]:
    """What `run`, a function without arguments, would have compiled."""
    found: dict[str, Compilation] = {}

    def record(function, signature, constants, options, attributes) -> None:
        made = Compilation(function.__module__, function.__name__, signature, constants, dict(options.__dict__), attributes)
        found[repr(made)] = made

    with launched_to_nowhere(record):
        run()
    return list(found.values())


def run_models() -> None:
    """Training steps and inference in bfloat16 of every size, and every candidate shape."""
    for size in SIZES:
        model = build(size, backend="triton")
        for batch in INFERENCE[:-1]:
            with torch.inference_mode():
                _autocast(model.eval(), torch.zeros(batch, 3, 224, 224))
        layers = model.train().transformer
        layers.layers = layers.layers[:3]  # the first, the last, and one like all others
        for batch in TRAINED:
            tokens = torch.empty(batch, 197, SIZES[size]["dim"])  # never read, so it takes next to no memory
            with torch.inference_mode():
                _autocast(partial(layers.eval().run, pool="cls"), tokens)
            out = _autocast(partial(layers.train().run, pool="cls"), tokens)
            out.backward(torch.empty_like(out))
        jobs = workloads(torch.zeros(TUNED_BATCH, 197, SIZES[size]["dim"], dtype=torch.float16), *_heads(size))
        find_winners(jobs, torch.float16, _launch)


def _heads(size: str) -> tuple[int, int]:
    return SIZES[size]["heads"], SIZES[size]["dim_head"]


def _launch(run) -> float:
    run()
    return 0.0


def _autocast(run, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(x)


def compile_one(made: Compilation) -> str:
    """Compiles a kernel, and its launcher where this Triton has a C compiler make one; its key."""
    function = getattr(importlib.import_module(made.module), made.name)
    source = triton.compiler.ASTSource(function, made.signature, made.constants, made.attributes)
    compiled = triton.compile(source, target=TARGET, options=made.options)
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with mock.patch("triton.runtime.build._load_module_from_path", lambda *_: SimpleNamespace(launch=None)):
            driver.CudaLauncher(source, compiled.metadata)
    return compiled.hash


def stand_in_driver(folder: Path) -> None:
    """A library that launchers can be linked against where NVIDIA's driver is not; it has nothing in it."""
    folder.mkdir(exist_ok=True)
    path = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-Wl,-soname,libcuda.so.1", "-o", path, "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def compile_ahead(state: Path, scratch: Path, run=run_models) -> int:
    """Adds to the cache of the folder `state`; the exit status. Needs `cache.environment` for a cache in `scratch`."""
    state.mkdir(parents=True, exist_ok=True)
    archive, cache = state / "kernels.tar.xz", scratch / "triton"
    unpack(archive, cache)
    before = len(kernels(cache))
    stand_in_driver(scratch / "driver")
    with tuning.assumed(90):
        made = launched(run)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        keys = set(tqdm(pool.map(compile_one, made), total=len(made), desc="compiling", disable=None))
    pack(cache, archive)
    new, size = len(kernels(cache)) - before, archive.stat().st_size / 2**20
    print(f"{len(keys)} kernels for sm_90, triton {triton.__version__}: {new} entries new in {archive}, {size:.1f} MiB")
    return 0
