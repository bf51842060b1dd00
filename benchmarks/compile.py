"""Compiles every kernel as a user of a GPU would get it, with no GPU at hand, and shows what the compiler made of it.

    python benchmarks/compile.py [--arch sm_90 ...] [--kernel NAME ...] [--skip NAME ...] [--quick] [--json FILE]

The library's own launch code runs on tensors without memory; what it would have launched is compiled with the
specialisation that Triton's runtime would choose (alignment, unit strides, 32- or 64-bit sizes). A row a kernel:
registers, bytes spilled, shared memory, matrix instructions, 16-byte copies, barriers a turn, and for float32 the precision
that the PTX names. Exit status 1 where a kernel spills or touches local memory, needs more shared memory than the chip has,
uses tf32 unasked, or, with 16-bit operands, has no matrix instruction (HGMMA on sm_90, UTCHMMA on sm_100), no 16-byte copy
though all rows start on 16 bytes, more than BARRIERS barriers in the loop that makes most of its products, or products that
the assembler says it serialises. --quick compiles one size in float16 for sm_90.
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

import torch
import triton
from tqdm import tqdm

from crate_fast.kernels import (
    decoder,
    ista,
    layer,
    linear,
    mssa,
    odl,
    runtime,
    stack,
    tuning,
)
from prediction.launches import Launch, compiled, specialise
from prediction.machine_code import Code, Instruction, disassemble, inner_loops, tools
from prediction.pipes import LOCAL, SHARED_MEMORY

MATRIX = {"HMMA": 1, "HGMMA": 32, "UTCHMMA": 512}
"""Matrix instructions, and roughly how much each multiplies for a warp."""
MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
"""What 16-bit products must be made of where that is not HMMA."""

BARRIERS = 5
"""How many barriers a turn of the loop that makes most of a kernel's 16-bit products may have. A pipelined loop needs two,
with tensor descriptors four, attention's backward, which makes five products of each other, five; on sm_100 each product waits
for its result in tensor memory, two or three a product. A sum over rows in it costs nine. Loops over the last few tokens, 16
rows for four warps, need more and do little."""

# parameters, stream, operands
DTYPES = {
    "fp16": (torch.float32, torch.float16, torch.float16),
    "bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32 stream": (torch.float32, torch.float32, torch.float16),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp16 parameters": (torch.float16, torch.float16, torch.float16),
    "bf16 parameters": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
SIZES = {  # batch, tokens, dim, head width; the last two have tiles of their own (the columns of tuning.TABLE)
    "": (16, 208, 256, 64),
    " odd": (16, 197, 100, 20),
    " wide": (16, 208, 384, 64),
    " thirds": (16, 208, 576, 48),
}
ONES = {
    "fp16": {" one image": (1, 208, 256, 64), " one head": (16, 208, 64, 64)},
    "fp32": {" one image": (1, 208, 256, 64), " one token": (1, 1, 32, 32)},
}
"""Arguments that are 1, which Triton makes constants: only the compiler shows what a constant cannot do."""
ODL_SIZES = {"fp16": ("", " odd", " thirds"), "bf16": ("",), "fp32": ("", " odd", " one token")}
"""With which CRATE-α's step is compiled: whose products are the layers' with other ends."""
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128)


def collect(arch: str, quick: bool = False) -> list[Launch]:
    """Every launch of the library on an architecture, over dtypes, head widths, and sizes that Triton specialises on and
    that it does not; if `quick`, of one layer in float16."""
    with tuning.assumed(int(arch.removeprefix("sm_"))):
        return _collect(quick)


def _collect(quick: bool) -> list[Launch]:
    launches: dict[str, Launch] = {}

    def record(label: str, operand: torch.dtype, run) -> None:
        def observer(kernel, programs, arguments, constants):
            launch = specialise(kernel, label, arguments, constants, torch.finfo(operand).bits)
            launches.setdefault(repr(launch._replace(name="")), launch)

        with runtime.observed(observer):
            run()

    if quick:
        record("fp16", torch.float16, lambda: _layer(*DTYPES["fp16"], *SIZES[""]))
        record("fp16 odl", torch.float16, lambda: _odl(torch.float16, *SIZES[""][:3]))
        return list(launches.values())
    for dtypes, (parameter, stream, operand) in DTYPES.items():
        for name, size in (SIZES | ONES.get(dtypes, {})).items():
            record(f"{dtypes}{name}", operand, lambda p=parameter, s=stream, o=operand, n=size: _layer(p, s, o, *n))
            record(f"{dtypes}{name} decoder", operand, lambda p=parameter, s=stream, o=operand, n=size: _decoder(p, s, o, *n))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_width in HEAD_WIDTHS:
            record(f"{_short(dtype)} width {head_width}", dtype, lambda t=dtype, h=head_width: _attention(t, h))
        for stream in {dtype, torch.float32}:
            label = f"{_short(dtype)}{' fp32 stream' if stream != dtype else ''} alone"
            record(label, dtype, lambda s=stream, o=dtype: _ista_alone(s, o))
        for name in ODL_SIZES[_short(dtype)]:
            size = (SIZES | ONES["fp32"])[name][:3]
            record(f"{_short(dtype)} odl{name}", dtype, lambda o=dtype, s=size: _odl(o, *s))
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


def _decoder(parameter, stream, operand, batch: int, tokens: int, dim: int, head_width: int) -> None:
    """The same of a layer of CRATE-MAE's decoder, whose other ends a layer's stack has."""
    vector, matrix = _empty(dim, dtype=parameter), _empty(dim, dim, dtype=parameter)
    weights = decoder.DecoderWeights(vector, vector, matrix, vector, vector, matrix, matrix, vector)
    prepared = list(decoder.prepare_decoder([weights], operand)[0])
    x, heads = _empty(batch, tokens, dim, dtype=stream), dim // head_width
    _, moments = stack.enter_forward.body(_empty(batch, tokens, dim, dtype=parameter), stream)
    *saved, y, _, totals = decoder.decoder_forward.body(x, moments, prepared, heads, head_width**-0.5, 1e-5, 1e-5)
    scale = _empty(1, dtype=torch.float32)
    given = (y, totals, scale, [x, *saved], prepared, list(weights), head_width**-0.5)
    decoder.decoder_backward.body(*given, [True] * 3)


def _attention(dtype: torch.dtype, head_width: int) -> None:
    w = _empty(16, 197, 4 * head_width, dtype=dtype)
    o, lse = mssa.mssa_forward(w, 4, 0.125)
    mssa.attend_backward.body(w, o, w, lse, 4, 0.125)
    vector, delta = _empty(4 * head_width, dtype=torch.float32), _empty(4, 1, 16, 208, dtype=torch.float32)
    row_scale = _empty(16 * 197, dtype=torch.float32)
    mssa.mssa_backward(w, w, lse, delta, 0.125, linear.Folded(vector, vector, vector), row_scale)  # in a layer


def _ista_alone(stream: torch.dtype, operand: torch.dtype) -> None:
    h, matrix = _empty(197, 256, dtype=stream), _empty(256, 256, dtype=operand)
    ista.ista_step_backward.body(h, h, ista.ista_step.body(h, matrix, 0.01), matrix)


def _odl(operand: torch.dtype, batch: int, tokens: int, dim: int) -> None:
    """The overcomplete step forward and backward, as autocast runs it in 16 bit: h in float32, and so its gradient."""
    h, wide = _empty(batch * tokens, dim, dtype=torch.float32), _empty(dim, 4 * dim, dtype=operand)
    rounded = h.to(operand)
    y, *codes = odl.odl_step.body(h, rounded, wide, wide, wide, 0.1)
    for dtype in {operand, torch.float32}:
        odl.odl_step_backward.body(y, [rounded, *codes, wide, wide, wide], 0.1, dtype, [True] * 3)


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


class Row(NamedTuple):
    """A compiled kernel's resources."""

    arch: str
    kernel: str
    configuration: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix_instructions: str = "0"
    wide_loads: int = 0
    barriers: int = 0  # in a turn of the loop that makes most of the products
    precision: str = ""
    problem: str = ""


def compile_one(launch: Launch, arch: str) -> Row:
    """Compiles one launch for one architecture and reads the machine code."""
    result = compiled(launch, arch)
    code = disassemble(result.asm["cubin"], result.metadata.shared, launch.options["num_warps"])
    matrix = Counter(i.op for i in code.instructions if i.op in MATRIX)
    copies = sum((i.op in ("LDG", "LDGSTS") and ".128" in i.name) or i.op == "UTMALDG" for i in code.instructions)
    precision = "" if launch.operand_bits == 16 else ("tf32" if "tf32" in result.asm["ptx"] else "ieee")
    row = Row(
        arch, launch.kernel, launch.name, code.registers, code.local, code.shared,
        " + ".join(f"{count} {name}" for name, count in sorted(matrix.items())) or "0", copies, barriers(code), precision,
    )  # fmt: skip
    return row._replace(problem="; ".join(_problems(row, code, result.asm, launch)))


def _main_loop(code: Code) -> list[Instruction]:
    """The innermost loop that makes most of the products; empty if none makes any."""
    bodies = [code.instructions[loop.first : loop.last + 1] for loop in inner_loops(code)]
    most = max(bodies, key=lambda body: sum(MATRIX.get(i.op, 0) for i in body), default=[])
    return most if any(i.op in MATRIX for i in most) else []


def barriers(code: Code) -> int:
    """Barriers in a turn of the loop that makes most of the products."""
    return sum(i.op == "BAR" for i in _main_loop(code))


def allowed_barriers(code: Code) -> int:
    """How many that loop may have: BARRIERS, and where results lie in tensor memory (UTCHMMA) so many for each product."""
    made_at = {i.source for i in _main_loop(code) if i.op == "UTCHMMA"}
    return BARRIERS * max(1, len(made_at))


def _problems(row: Row, code: Code, asm: dict[str, str], launch: Launch) -> list[str]:
    """All that is wrong with a compiled kernel."""
    halves, wgmma = launch.operand_bits == 16, serialised(asm["ptx"])
    products = halves and "tt.dot" in asm["ttir"]
    return [
        problem
        for problem, found in {
            "spills": row.spilled_bytes,
            "local memory": any(i.op in LOCAL for i in code.instructions),
            "shared memory": row.shared_bytes > SHARED_MEMORY[row.arch] * 1024,
            "no matrix instructions": products and MATRIX_INSTRUCTION.get(row.arch, "HMMA") not in row.matrix_instructions,
            "no 16-byte loads": products and launch.wide and not row.wide_loads,
            f"{row.barriers} barriers in the loop": halves and row.barriers > allowed_barriers(code),
            f"products serialised ({', '.join(wgmma)})": wgmma,
            "tf32 unasked": row.precision == "tf32" and runtime.float32_precision() != "tf32",
        }.items()
        if found
    ]


def serialised(ptx: str) -> list[str]:
    """The assembler's warnings that it makes asynchronous products (wgmma) wait for each other: C7510, C7514, C7515 and kin."""
    if "wgmma" not in ptx:
        return []
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tools() / "ptxas", "-v", f"--gpu-name={arch}", source, "-o", source.with_suffix(".cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"\bC75\d\d\b", result.stdout + result.stderr)))


def _compile_or_explain(job: tuple[Launch, str]) -> Row:
    launch, arch = job
    try:
        return compile_one(launch, arch)
    except Exception as error:  # whatever the compiler raises is a row of the table, not the end of it
        reason = f"does not compile: {type(error).__name__}: {error}".splitlines()[0]
        return Row(arch, launch.kernel, launch.name, problem=reason[:200])


def _has(launch: Launch, parts: list[str]) -> bool:
    return any(part in f"{launch.kernel} {launch.name}" for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--arch", nargs="+", choices=SHARED_MEMORY, help="default: sm_80 sm_90 sm_100; with --quick sm_90")
    parser.add_argument("--quick", action="store_true", help="one layer in float16: what is wrong with all sizes shows there")
    parser.add_argument("--kernel", nargs="+", help="only kernels and configurations whose name contains one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="none whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    archs = arguments.arch or (["sm_90"] if arguments.quick else ["sm_80", "sm_90", "sm_100"])
    jobs = [(launch, arch) for arch in archs for launch in collect(arch, arguments.quick)]
    if arguments.kernel:
        jobs = [job for job in jobs if _has(job[0], arguments.kernel)]
    jobs = [job for job in jobs if not _has(job[0], arguments.skip)]
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
        f"{'arch':6} {'kernel':24} {'configuration':58} {'regs':>4} {'spill':>5} {'shared':>7} {'matrix':>21} {'16 B':>4} "
        f"{'bars':>4}  fp32"
    )
    for r in rows:
        kernel = r.kernel.strip("_").removesuffix("_kernel")
        print(
            f"{r.arch:6} {kernel:24} {r.configuration:58} {r.registers:4} {r.spilled_bytes:5} "
            f"{r.shared_bytes:7} {r.matrix_instructions:>21} {r.wide_loads:4} {r.barriers:4}  {r.precision} {r.problem}"
        )


if __name__ == "__main__":
    sys.exit(main())
