"""Kernels whose instructions, bytes and flops are known by counting, for test_predicted.py; compiled, never run.

As a script, with the benchmarks on the path, it prints what the model counts of each, as JSON.
"""

import json
from collections import Counter

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(x, weight, out, sizes, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A tile of x Wᵀ a program; arguments in tuples: `x` is (pointer, stride), `sizes` (rows, inputs)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    b_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, sizes[1], STEP):
        k = start + tl.arange(0, STEP)
        b_x = tl.load(x[0] + row[:, None] * x[1] + k[None, :])
        b_w = tl.load(weight + column[:, None] * sizes[1] + k[None, :])
        b_out = tl.dot(b_x, tl.trans(b_w), b_out)
    tl.store(out + row[:, None] * BLOCK + column[None, :], b_out.to(tl.float16))


@triton.jit
def described_kernel(d_x, d_weight, d_out, inputs, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The same by tensor descriptors made on the host."""
    first = tl.program_id(0) * BLOCK
    b_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, inputs, STEP):
        b_out = tl.dot(d_x.load([first, start]), d_weight.load([0, start]).T, b_out)
    d_out.store([first, 0], b_out.to(tl.float16))


@triton.jit
def self_described_kernel(p_x, p_weight, p_out, rows, inputs, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The same by tensor descriptors made in the kernel."""
    d_x = tl.make_tensor_descriptor(p_x, [rows, inputs], [inputs, 1], [BLOCK, STEP])
    d_weight = tl.make_tensor_descriptor(p_weight, [BLOCK, inputs], [inputs, 1], [BLOCK, STEP])
    d_out = tl.make_tensor_descriptor(p_out, [rows, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    first = tl.program_id(0) * BLOCK
    b_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, inputs, STEP):
        b_out = tl.dot(d_x.load([first, start]), d_weight.load([0, start]).T, b_out)
    d_out.store([first, 0], b_out.to(tl.float16))


@triton.jit
def branched_kernel(p_x, p_out, tokens, BLOCK: tl.constexpr):
    """Sums; a program in four takes the short way, 2 turns of a loop in place of 5. Running sums need barriers, so that no
    loop is unrolled."""
    first = tl.program_id(0) % 4 * BLOCK
    column = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if tokens - first <= BLOCK:
        for turn in range(0, tokens // (2 * BLOCK)):
            b_sum += tl.exp2(tl.cumsum(tl.load(p_x + turn * BLOCK + column), 0))
        tl.store(p_out + first + column, b_sum)
    else:
        for turn in range(0, tokens // BLOCK + 1):
            b_sum += tl.cumsum(tl.load(p_x + turn * BLOCK + column), 0)
        tl.store(p_out + first + column, b_sum * b_sum)


@triton.jit
def blind_kernel(p_x, p_count, BLOCK: tl.constexpr):
    """Turns a loop as often as memory says."""
    column = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for turn in range(0, tl.load(p_count)):
        b_sum += tl.load(p_x + turn * BLOCK + column)
    tl.store(p_x + column, b_sum)


@triton.jit
def sum_in_loop_kernel(p_x, p_w, p_out, p_sum, inputs, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A product with sums over its rows in the loop, which cost barriers and may make the assembler serialise products."""
    row = tl.arange(0, BLOCK)
    b_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, STEP):
        k = start + tl.arange(0, STEP)
        b_x = tl.load(p_x + k[:, None] * BLOCK + row[None, :])
        b_w = tl.load(p_w + k[:, None] * BLOCK + row[None, :])
        b_sum += tl.sum(b_w.to(tl.float32), 0)
        b_sum += tl.sum((b_x * b_x).to(tl.float32), 0)
        b_out = tl.dot(tl.trans(b_x), b_w, b_out)
    tl.store(p_out + row[:, None] * BLOCK + row[None, :], b_out.to(tl.float16))
    tl.store(p_sum + row, b_sum)


BLOCK, STEP, INPUTS, PROGRAMS = 128, 64, 320, 264


def launches() -> dict[str, tuple]:
    """(kernel, arguments, constants, programs) by name."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def empty(*shape: int, dtype=torch.float16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def described(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block)

    rows = BLOCK * PROGRAMS
    x, weight, out, vector = empty(rows, INPUTS), empty(BLOCK, INPUTS), empty(rows, BLOCK), empty(4096, dtype=torch.float32)
    descriptors = described(x, [BLOCK, STEP]), described(weight, [BLOCK, STEP]), described(out, [BLOCK, BLOCK])
    tile = {"BLOCK": BLOCK, "STEP": STEP, "num_warps": 4, "num_stages": 3}
    line = {"BLOCK": 128, "num_warps": 4, "num_stages": 1}
    return {
        "product": (product_kernel, ((x, INPUTS), weight, out, (rows, INPUTS)), tile, PROGRAMS),
        "described": (described_kernel, (*descriptors, INPUTS), tile, PROGRAMS),
        "self described": (self_described_kernel, (x, weight, out, rows, INPUTS), tile, PROGRAMS),
        "branched": (branched_kernel, (vector, vector, 512), line, 400),
        "blind": (blind_kernel, (vector, empty(1, dtype=torch.int32)), line, 400),
        "sum in the loop": (sum_in_loop_kernel, (x, x, out, vector, 8192), tile | {"STEP": 32, "num_warps": 8}, 1),
    }


def count(kernel, arguments: tuple, constants: dict, programs: int) -> dict:
    """What the model makes of one launch."""
    import compile
    from prediction import control_flow, copies, pipes
    from prediction.intermediate import UnknownControlError
    from prediction.launches import code_of, compiled, integers, specialise
    from prediction.machine_code import walk

    launch = specialise(kernel, "", arguments, constants, 16)
    result = compiled(launch, "sm_90")
    code, moved = code_of(result, launch), copies.read(result.asm["ttgir"])
    try:
        paths = control_flow.paths(result.asm["ttir"], integers(launch, arguments), programs)
    except UnknownControlError as error:
        return {"error": str(error)}
    walks = [walk(code, path, moved.copies) for path in paths]
    ways = [(path.weight, steps) for path, steps in zip(paths, walks, strict=True)]
    done = pipes.work(pipes.kernel_of(code, ways, moved), programs)
    return {
        "weights": [path.weight for path in paths],
        "turns": [sorted(path.turns.values()) for path in paths],
        "executed": [Counter(code.instructions[step.index].op for step in steps if step.on) for steps in walks],
        "bytes": done.l2_bytes / programs,
        "flops": done.flops / programs,
        "barriers": compile.barriers(code),
        "serialised": compile.serialised(result.asm["ptx"]),
    }


if __name__ == "__main__":
    import compile

    quick = sorted({launch.kernel for launch in compile.collect("sm_90", quick=True)})
    print(json.dumps({name: count(*launch) for name, launch in launches().items()} | {"quick": quick}))
