"""What a launch needs to know beside its tensors, looked up once a process: the host's time is short beside a small kernel's.

tuning.py decides; this keeps its answers once they are settled.
"""

from __future__ import annotations

from functools import cache

import torch

from . import tuning
from .tuning import Config


def attention(kernel: str, dtype: torch.dtype, head_width: int, device: torch.device) -> Config:
    """`tuning.attention`."""
    find = _attention if tuning.is_settled() else tuning.attention
    return find(kernel, dtype, head_width, device)


def matrix(kernel: str, operand: torch.dtype, inputs: int, outputs: int, device: torch.device) -> Config:
    """`tuning.matrix`."""
    find = _matrix if tuning.is_settled() else tuning.matrix
    return find(kernel, operand, inputs, outputs, device)


def architecture(device: torch.device) -> int:
    """`tuning.architecture`."""
    find = _architecture if tuning.is_settled() else tuning.architecture
    return find(device)


_attention, _matrix, _architecture = cache(tuning.attention), cache(tuning.matrix), cache(tuning.architecture)


@cache
def constants(config: Config) -> dict[str, int]:
    """The arguments of a launch with this shape; not to be changed."""
    return config.constants()


def forget() -> None:
    """Has shapes that were stored since looked up again."""
    _attention.cache_clear()
    _matrix.cache_clear()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's own cdiv takes 20 times as long."""
    return -(-size // block)


def part_width(size: int, parts: int) -> int:
    """How wide blocks are, a power of two, of which `parts` cover `size`: no two widths give the same number, but for one."""
    return 1 << (blocks(size, max(parts, 1)) - 1).bit_length()
