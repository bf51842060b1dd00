"""Compiles every kernel as a user of a GPU would get it, with no GPU at hand, and shows what the compiler made of it.

    python benchmarks/compile.py [--arch sm_90 ...] [--kernel NAME ...] [--json FILE]

The library's own launch code runs on tensors without memory; what it would have launched is compiled with the
specialisation that Triton's runtime would choose (alignment, unit strides, 32- or 64-bit sizes). A row a kernel:
registers, bytes spilled, shared memory, matrix instructions, 16-byte global loads, and for float32 the precision that the
PTX names. Exit status 1 where a kernel spills, needs more shared memory than the chip has, uses tf32 unasked, or, with
16-bit operands, has no matrix instruction (HGMMA on sm_90, UTCHMMA on sm_100) or no 16-byte load though all rows start on
16 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what is default up to Triton 3.9, which warns when it is not said

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crate_fast.kernels import (
    attention,
    attention_gradient,
    gradients,
    ista,
    layer,
    linear,
    mssa,
    runtime,
    stack,
    tuning,
    weight_gradients,
    weights,
)

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB of shared memory that one program can have."""

MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
"""What 16-bit products must be made of where that is not HMMA."""

MODULES = (attention, attention_gradient, gradients, linear, stack, weight_gradients, weights)
"""Where kernels are."""

NOT_MATRIX = {"_prepare_kernel", "_finish_kernel", "_delta_kernel", "_leave_kernel", "_enter_kernel"}

# parameters, stream, operands
DTYPES = {
    "fp16": (torch.float32, torch.float16, torch.float16),
    "bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32 stream": (torch.float32, torch.float32, torch.float16),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp16 parameters": (torch.float16, torch.float16, torch.float16),
    "bf16 parameters": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
SIZES = {"": (16, 208, 256, 64), " odd": (16, 197, 100, 20)}  # batch, tokens, dim, head width
ONES = {
    "fp16": {" one image": (1, 208, 256, 64), " one head": (16, 208, 64, 64)},
    "fp32": {" one image": (1, 208, 256, 64), " one token": (1, 1, 32, 32)},
}
"""Arguments that are 1, which Triton makes constants: only the compiler shows what a constant cannot do."""
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128)


class Launch(NamedTuple):
    """One kernel as it would be launched: what Triton needs to compile it."""

    kernel: str
    name: str
    signature: dict[str, str]
    constants: dict
    aligned: tuple[int, ...]
    options: dict[str, int]
    operand_bits: int
    wide: bool  # 16-bit operands in rows of a multiple of 16, which Triton knows to start on 16 bytes


def collect(arch: str) -> list[Launch]:
    """Every launch of the library on an architecture, over dtypes, head widths, and sizes that Triton specialises on and
    that it does not."""
    with tuning.assumed(int(arch.removeprefix("sm_"))):
        return _collect()


def _collect() -> list[Launch]:
    launches: dict[str, Launch] = {}

    def record(label: str, operand: torch.dtype, run) -> None:
        def observer(kernel, programs, arguments, constants):
            launch = _specialise(kernel, label, arguments, constants, torch.finfo(operand).bits)
            launches.setdefault(repr(launch._replace(name="")), launch)

        with runtime.observed(observer):
            run()

    for dtypes, (parameter, stream, operand) in DTYPES.items():
        for name, size in (SIZES | ONES.get(dtypes, {})).items():
            record(f"{dtypes}{name}", operand, lambda p=parameter, s=stream, o=operand, n=size: _layer(p, s, o, *n))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_width in HEAD_WIDTHS:
            record(f"{_short(dtype)} width {head_width}", dtype, lambda t=dtype, h=head_width: _attention(t, h))
        for stream in {dtype, torch.float32}:
            label = f"{_short(dtype)}{' fp32 stream' if stream != dtype else ''} alone"
            record(label, dtype, lambda s=stream, o=dtype: _ista_alone(s, o))
    return list(launches.values())


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _layer(parameter, stream, operand, batch: int, tokens: int, dim: int, head_width: int) -> None:
    """A layer forward and backward, on tensors without memory."""
    vector, matrix = _empty(dim, dtype=parameter), _empty(dim, dim, dtype=parameter)
    weights = layer.LayerWeights(vector, vector, matrix, matrix, vector, vector, vector, _empty(dim, dim, dtype=torch.float32))
    heads = dim // head_width
    settings = layer.LayerSettings(heads, head_width**-0.5, 1e-5, 1e-5, 0.01)
    prepared = list(layer.prepare_layers(layer.stack_weights([weights]), 0.01, operand)[0])
    x = _empty(batch, tokens, dim, dtype=stream)
    _, moments = stack.enter_forward.body(_empty(batch, tokens, dim, dtype=parameter), stream)
    saved = layer.layer_forward.body(x, moments, prepared, vector, vector, heads, settings.scale, 1e-5, 1e-5)
    *saved, sums, totals = saved
    scale, vector, rstd = _empty(1, dtype=torch.float32), _empty(dim, dtype=torch.float32), saved[-1][3]
    for first in (False, True):
        stack.leave_backward.body(x, scale, x, vector, vector, rstd, 1.0, first)
    for below in ([], [vector, vector, rstd]):  # at the bottom of a stack, and on a layer
        given = (x, sums, totals, scale, [x, *saved], prepared, list(weights), below)
        layer.layer_backward.body(*given, settings.scale, [True] * 3)


def _attention(dtype: torch.dtype, head_width: int) -> None:
    w = _empty(16, 197, 4 * head_width, dtype=dtype)
    o, lse = mssa.mssa_forward(w, 4, 0.125)
    mssa.attend_backward.body(w, o, w, lse, 4, 0.125)
    vector, delta = _empty(4 * head_width, dtype=torch.float32), _empty(4, 1, 16 * 197, dtype=torch.float32)
    row_scale = _empty(16 * 197, dtype=torch.float32)
    mssa.mssa_backward(w, w, lse, delta, 0.125, linear.Folded(vector, vector, vector), row_scale)  # in a layer


def _ista_alone(stream: torch.dtype, operand: torch.dtype) -> None:
    h, matrix = _empty(197, 256, dtype=stream), _empty(256, 256, dtype=operand)
    ista.ista_step_backward.body(h, h, ista.ista_step.body(h, matrix, 0.01), matrix)


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _specialise(kernel, label: str, arguments: tuple, constants: dict, operand_bits: int) -> Launch:
    """What Triton's runtime would make of these arguments: types, constants, alignment."""
    options = {k: v for k, v in constants.items() if k in ("num_warps", "num_stages")}
    constexprs = {k: v for k, v in constants.items() if k not in options}
    signature, aligned = {}, []
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_pointer_type(value.dtype)}"
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name], divisible = "constexpr", value, False
        elif isinstance(value, int):
            signature[name], divisible = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        else:
            signature[name], divisible = "fp32", False
        aligned += [index] if divisible else []
    signature |= dict.fromkeys(constexprs, "constexpr")
    ends = "".join(
        f" {v if isinstance(v, str) else k}".lower()
        for k, v in constexprs.items()
        if k in _ENDS and v not in (False, 0, "none")
    )
    blocks = "×".join(str(v) for k, v in constexprs.items() if k in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    name = f"{label},{ends} {blocks} {options['num_warps']}w {options['num_stages']}s"
    matrices = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim() > 1 and x.itemsize == 2]
    wide = operand_bits == 16 and bool(matrices) and all(x.shape[-1] % 16 == 0 for x in matrices)
    return Launch(kernel.fn.__name__, name, signature, constexprs, tuple(aligned), options, operand_bits, wide)


_ENDS = ("NORM", "SHRINK", "RESIDUAL", "RECTIFIED", "HEAD_WIDTH", "SUMS")


def _pointer_type(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


class Row(NamedTuple):
    """A compiled kernel's resources."""

    arch: str
    kernel: str
    configuration: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: str
    wide_loads: int
    precision: str
    problem: str


def compile_one(launch: Launch, arch: str) -> Row:
    """Compiles one launch for one architecture and reads the machine code."""
    kernel = next(getattr(module, launch.kernel) for module in MODULES if hasattr(module, launch.kernel))
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=launch.options)
    usage, code = _disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spilled = int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))
    matrix = Counter(re.findall(r"\b(HGMMA|UTCHMMA|HMMA)\b", code))
    precision = "" if launch.operand_bits == 16 else ("tf32" if "tf32" in compiled.asm["ptx"] else "ieee")
    row = Row(
        arch, launch.kernel, launch.name, registers, spilled, compiled.metadata.shared,
        " + ".join(f"{count} {name}" for name, count in sorted(matrix.items())) or "0",
        len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.128", code)), precision, "",
    )  # fmt: skip
    return row._replace(problem=_problem(row, launch))


def _problem(row: Row, launch: Launch) -> str:
    if row.spilled_bytes:
        return "spills"
    if row.shared_bytes > SHARED_MEMORY[row.arch] * 1024:
        return "shared memory"
    if launch.operand_bits == 16 and row.kernel not in NOT_MATRIX:
        if MATRIX_INSTRUCTION.get(row.arch, "HMMA") not in row.matrix_instructions:
            return "no matrix instructions"
        if launch.wide and not row.wide_loads:
            return "no 16-byte loads"
    if row.precision == "tf32" and runtime.float32_precision() != "tf32":
        return "tf32 unasked"
    return ""


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as Triton's own copies of NVIDIA's tools print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True)
    return usage.stdout, code.stdout


def _compile_or_explain(job: tuple[Launch, str]) -> Row:
    launch, arch = job
    try:
        return compile_one(launch, arch)
    except Exception as error:  # whatever the compiler raises is a row of the table, not the end of it
        reason = f"does not compile: {type(error).__name__}: {error}".splitlines()[0]
        return Row(arch, launch.kernel, launch.name, 0, 0, 0, "0", 0, "", reason[:200])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=SHARED_MEMORY)
    parser.add_argument("--kernel", nargs="+", help="only kernels and configurations whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    jobs = [(launch, arch) for arch in arguments.arch for launch in collect(arch)]
    if arguments.kernel:
        jobs = [(x, arch) for x, arch in jobs if any(part in f"{x.kernel} {x.name}" for part in arguments.kernel)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        progress = tqdm(pool.map(_compile_or_explain, jobs), total=len(jobs), desc="compiling", disable=None)
        rows = sorted(progress)
    _print(rows)
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    problems = [row for row in rows if row.problem]
    print(f"{len(rows)} kernels compiled, {len(problems)} with a problem (triton {triton.__version__})")
    return 1 if problems or not rows else 0


def _print(rows: list[Row]) -> None:
    print(
        f"{'arch':6} {'kernel':24} {'configuration':58} {'regs':>4} {'spill':>5} {'shared':>7} {'matrix':>21} {'16 B':>4}  fp32"
    )
    for r in rows:
        kernel = r.kernel.strip("_").removesuffix("_kernel")
        print(
            f"{r.arch:6} {kernel:24} {r.configuration:58} {r.registers:4} {r.spilled_bytes:5} "
            f"{r.shared_bytes:7} {r.matrix_instructions:>21} {r.wide_loads:4}  {r.precision} {r.problem}"
        )


if __name__ == "__main__":
    sys.exit(main())
