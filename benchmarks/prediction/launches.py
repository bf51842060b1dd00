"""A launch as Triton's runtime would specialise it, and its compilation for a GPU that need not be there."""

from __future__ import annotations

import importlib
import os
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what is default up to Triton 3.9, which warns when it is not said

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .machine_code import Code, disassemble


class Launch(NamedTuple):
    """One kernel as it would be launched: what Triton needs to compile it."""

    module: str
    kernel: str
    name: str
    signature: dict[str, object]  # types by argument; of a tuple a tuple
    constants: dict  # by an argument's name, within a tuple by its path
    aligned: tuple[tuple[int, ...], ...]  # paths of what is a multiple of 16
    options: dict[str, int]
    operand_bits: int
    wide: bool  # 16-bit operands in rows of a multiple of 16, which Triton knows to start on 16 bytes


def specialise(kernel, label: str, arguments: tuple, constants: dict, operand_bits: int) -> Launch:
    """What Triton's runtime would make of these arguments: types, constants, alignment."""
    options = {k: v for k, v in constants.items() if k in ("num_warps", "num_stages", "maxnreg")}
    constexprs = {k: v for k, v in constants.items() if k not in options}
    signature, inner, aligned = {}, {}, []
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        signature[name] = _type(value, (index,), inner, aligned)
    inner = {kernel.arg_names[path[0]] if len(path) == 1 else path: value for path, value in inner.items()}
    signature |= dict.fromkeys(constexprs, "constexpr")
    name = f"{label},{_ends(constexprs | inner)} {options['num_warps']}w {options['num_stages']}s"
    matrices = [x for x in flat(arguments) if isinstance(x, torch.Tensor) and x.dim() > 1 and x.itemsize == 2]
    wide = operand_bits == 16 and bool(matrices) and all(x.shape[-1] % 16 == 0 for x in matrices)
    function, constants = kernel.fn, constexprs | inner
    return Launch(
        function.__module__, function.__name__, name, signature, constants, tuple(aligned), options, operand_bits, wide
    )


def _type(value, path: tuple[int, ...], constants: dict, aligned: list):
    """The type of an argument; constants and aligned paths are added."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_SHORT[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, tuple):
        types = [_type(x, (*path, n), constants, aligned) for n, x in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, torch.Tensor):
        aligned += [path] if value.storage_offset() * value.element_size() % 16 == 0 else []
        return f"*{_SHORT[value.dtype]}"
    if value is None or isinstance(value, triton.language.constexpr) or (type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        aligned += [path] if value % 16 == 0 else []
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}
_NAMED_ENDS = ("NORM", "SHRINK", "RESIDUAL", "RECTIFY", "MASKED", "RECTIFIED", "HEAD_WIDTH", "SUMS")


def _ends(constants: dict) -> str:
    """What tells a launch from others of its kernel, and its tile."""
    ends = "".join(
        f" {v if isinstance(v, str) else k}".lower()
        for k, v in constants.items()
        if k in _NAMED_ENDS and v not in (False, 0, "none")
    )
    return f"{ends} {'×'.join(str(constants[k]) for k in ('BLOCK_M', 'BLOCK_N', 'BLOCK_K') if k in constants)}"


def flat(arguments) -> list:
    """Arguments without the tuples around some of them; a tensor descriptor as its base."""
    found = []
    for x in arguments:
        found += flat(x) if isinstance(x, tuple) else [x.base if isinstance(x, TensorDescriptor) else x]
    return found


def integers(launch: Launch, arguments: tuple) -> list[int | None]:
    """What the kernel's intermediate code takes, flat and in order: integers as they are, all else as None."""
    found: list[int | None] = []
    for value, kind in zip(arguments, launch.signature.values(), strict=False):
        _flatten(value, kind, found)
    return found


def _flatten(value, kind, found: list) -> None:
    if isinstance(kind, tuple):
        for x, k in zip(value, kind, strict=True):
            _flatten(x, k, found)
    elif isinstance(value, TensorDescriptor):
        found += [None, *value.shape, *value.strides]
    elif kind != "constexpr":
        found.append(value if isinstance(value, int) else None)


def compiled(launch: Launch, arch: str):
    """Triton's compiled kernel for an architecture such as "sm_90"."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    source = ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=launch.options)


def code_of(result, launch: Launch) -> Code:
    """The machine code of what `compiled` gave."""
    return disassemble(result.asm["cubin"], result.metadata.shared, launch.options["num_warps"])
