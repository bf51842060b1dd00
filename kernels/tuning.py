"""Block shapes, warps and pipeline stages of every kernel: one table, chosen by dtype, head width and alignment.

The shapes were compared by compiled resources (`python benchmarks/compile.py` prints them for the table below), not yet by
the clock of a GPU.
"""

from __future__ import annotations

import torch

# (largest head width, BLOCK_M, BLOCK_N, num_warps, num_stages)
_ATTENTION = {
    ("mssa_forward", 16): [(64, 64, 64, 4, 3), (128, 64, 64, 4, 2)],
    # float32 products are FMAs with both operands in registers, so blocks shrink as heads widen.
    ("mssa_forward", 32): [(64, 32, 32, 4, 2), (128, 32, 32, 8, 2)],
    ("mssa_backward", 16): [(64, 64, 32, 4, 2), (128, 64, 32, 8, 1)],
    ("mssa_backward", 32): [(16, 32, 32, 4, 1), (32, 32, 32, 8, 1), (64, 32, 16, 8, 1), (128, 16, 16, 8, 1)],
}

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
_MATRIX = {
    ("linear", 16): (128, 128, 64, 8, 3),
    ("data_gradient", 16): (64, 128, 32, 8, 3),  # 128 registers, two programs a multiprocessor; 128 × 128 takes 254
    ("weight_gradient", 16): (128, 128, 32, 8, 2),
    ("linear", 32): (64, 64, 32, 4, 2),
    ("data_gradient", 32): (64, 64, 32, 4, 2),
    ("weight_gradient", 32): (64, 64, 32, 4, 2),
}

# Rows that do not start on 16 bytes are loaded element by element, with an address each: larger blocks spill.
_UNALIGNED = {16: (64, 64, 32, 8, 2), 32: (32, 64, 32, 8, 2)}


def attention(kernel: str, dtype: torch.dtype, head_width: int) -> dict[str, int]:
    """Constants of "mssa_forward" or "mssa_backward" for tokens of `dtype` and heads of a width."""
    for widest, block_m, block_n, warps, stages in _ATTENTION[kernel, _bits(dtype)]:
        if head_width <= widest:
            return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    raise ValueError(f"head width is {head_width}; the kernels take 16 to 128")


def matrix(kernel: str, operand: torch.dtype, inputs: int, outputs: int) -> dict[str, int]:
    """Constants of "linear", "data_gradient" or "weight_gradient" for operands of a dtype and a weight's sizes."""
    aligned = inputs % 16 == 0 and outputs % 16 == 0
    bits = _bits(operand)
    block_m, block_n, block_k, warps, stages = _MATRIX[kernel, bits] if aligned else _UNALIGNED[bits]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def splits(tiles: int, rows: int, block: int) -> int:
    """Into how many parts the rows of a weight gradient of `tiles` tiles are cut: about two programs a multiprocessor.

    132 multiprocessors (H100, H200) are assumed on every device, so that results do not depend on it.
    """
    return max(1, min(2 * 132 // tiles, rows // (4 * block)))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
