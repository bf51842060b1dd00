"""Block shapes, warps and pipeline stages of every kernel: one table, and what the user's own GPU was measured to prefer.

The table's shapes were compared by compiled resources (`python benchmarks/compile.py` prints them; docs/performance.md has
what was seen), not yet by the clock of a GPU. `crate-fast tune` measures `candidates` on a GPU and writes the winners to
`results_path()`; they are looked up there, by the GPU's name, before the table. Nothing is ever measured unasked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from crate_fast.cache import cache_folder

ATTENTION = ("mssa_forward", "mssa_backward")
PRODUCTS = (
    "project",
    "out_project",
    "ista",
    "ista_gradient",
    "out_gradient",
    "project_gradient",
    "mixed_product",
    "mixed_ista_gradient",
    "weight_gradient",
    "mixed_gradient",
)
"""Of a CRATE's layer."""
ODL = ("odl", "odl_back", "odl_gradient")
"""Of CRATE-α's step: into a dictionary's width, back from it, and a dictionary's gradient."""
MATRIX = (*PRODUCTS, *ODL)


class TuningError(OSError):
    """The file of measured configurations cannot be read; the message names it and says how to get rid of it."""


class Config(NamedTuple):
    """A kernel's shape. Attention: M rows against N columns. Products: M × N of the result, K of the depth at a time."""

    block_m: int
    block_n: int
    block_k: int  # 0 in the attention
    warps: int
    stages: int
    registers: int = 0  # at most so many a thread; 0: as many as the compiler likes

    def constants(self) -> dict[str, int]:
        """The arguments of a launch."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n} | ({"BLOCK_K": self.block_k} if self.block_k else {})
        limit = {"maxnreg": self.registers} if self.registers else {}
        return blocks | limit | {"num_warps": self.warps, "num_stages": self.stages}


class Line(NamedTuple):
    """One line of the table: the first that fits is taken."""

    kernels: tuple[str, ...]
    bits: int
    widest: int | None  # head width of an attention; None for products
    aligned: bool  # whether all rows of the operands start on 16 bytes
    config: Config
    reason: str
    architecture: int | None = None  # one of `ARCHITECTURES`, None for all of them
    columns: int = 1  # a product's number of columns is a multiple of it


_PRODUCTS = ("project", "out_project", "ista", *ODL[:2])
_WEIGHTS = ("weight_gradient", "mixed_gradient", "odl_gradient")
_ISTA = ("ista_gradient", "mixed_ista_gradient")
_GRADIENTS = (*_ISTA, "out_gradient", "project_gradient")

TABLE = (
    Line(("mssa_forward",), 16, 128, True, Config(64, 64, 0, 4, 3), "80 to 201 registers, 2 to 6 programs", 80),
    Line(("mssa_forward",), 16, 32, True, Config(64, 32, 0, 4, 3), "64 columns spill 40 bytes on sm_100 at width 32"),
    Line(("mssa_forward",), 16, 64, True, Config(64, 64, 0, 4, 3), "4 programs; held to 96, products are serialised"),
    Line(("mssa_forward",), 16, 80, True, Config(64, 64, 0, 4, 3), "167 registers, 3 programs; at 128 it spills", 90),
    Line(("mssa_forward",), 16, 96, True, Config(64, 64, 0, 4, 3, 128), "4 programs a multiprocessor", 90),
    Line(("mssa_forward",), 16, 128, True, Config(64, 64, 0, 4, 3), "147 registers, 3 programs", 90),
    Line(("mssa_forward",), 16, 80, True, Config(64, 32, 0, 4, 3), "64 columns spill 16 bytes at width 80", 100),
    Line(("mssa_forward",), 16, 128, True, Config(64, 64, 0, 4, 2), "162 registers, 3 programs; a third stage takes 16 KB"),
    Line(("mssa_backward",), 16, 64, True, Config(64, 32, 0, 4, 3), "128 to 229 registers, 2 to 4 programs", 80),
    Line(("mssa_backward",), 16, 128, True, Config(64, 16, 0, 4, 3), "160 to 255 registers; 32 columns spill", 80),
    Line(("mssa_backward",), 16, 48, True, Config(64, 32, 0, 4, 3), "132 registers, 3 programs; at 128 triton 3.6 spills"),
    Line(("mssa_backward",), 16, 64, True, Config(64, 32, 0, 4, 3, 128), "4 programs a multiprocessor", 90),
    Line(("mssa_backward",), 16, 64, True, Config(64, 32, 0, 4, 3), "141 registers"),
    Line(("mssa_backward",), 16, 80, True, Config(64, 32, 0, 4, 2, 168), "3 programs a multiprocessor"),
    Line(("mssa_backward",), 16, 96, True, Config(64, 16, 0, 4, 2, 168), "145 registers; triton 3.6 spills 8 bytes at 32"),
    Line(("mssa_backward",), 16, 128, True, Config(64, 32, 0, 4, 2), "199 registers, 2 programs"),
    Line(("mssa_forward",), 32, 64, True, Config(32, 32, 0, 4, 1, 128), "free, triton 3.6 spills 24 bytes in 96 registers", 80),
    Line(("mssa_forward",), 32, 96, True, Config(32, 32, 0, 4, 2, 128), "one stage spills 8 to 24 bytes", 80),
    Line(("mssa_forward",), 32, 128, True, Config(32, 32, 0, 4, 1), "200 registers; two stages held to 128 spill 120", 80),
    Line(
        ("mssa_forward",), 32, 64, True, Config(32, 32, 0, 8, 2, 168), "free, triton 3.6 spills 8 to 16 bytes in 64 registers"
    ),
    Line(("mssa_forward",), 32, 128, True, Config(32, 32, 0, 8, 2, 168), "4 warps spill 8 bytes at width 80 and 96", 90),
    Line(("mssa_forward",), 32, 128, True, Config(32, 32, 0, 4, 2, 128), "8 warps spill 16 to 24 bytes on sm_100 at width 80"),
    Line(("mssa_backward",), 32, 64, True, Config(32, 32, 0, 8, 2, 168), "free, triton 3.6 spills 8 to 16 bytes in 80", 80),
    Line(("mssa_backward",), 32, 16, True, Config(32, 32, 0, 8, 2), "one stage held to 168 spills 8 bytes", 100),
    Line(("mssa_backward",), 32, 48, True, Config(32, 32, 0, 8, 1, 168), "16 columns spill 32 bytes at width 48"),
    Line(("mssa_backward",), 32, 64, True, Config(32, 16, 0, 8, 2, 128), "32 columns spill 16 to 40 bytes"),
    Line(("mssa_backward",), 32, 128, True, Config(32, 16, 0, 8, 2), "32 columns spill 8 to 24 bytes at width 80 and 128"),
    Line(("project", "ista"), 16, None, True, Config(128, 128, 32, 4, 3), "180 to 206 registers: 2 programs", 90),
    Line(("odl_back",), 16, None, True, Config(128, 256, 64, 8, 3), "deep products: a quarter less of L2", 90, 256),
    Line(("out_project", *ODL[:2]), 16, None, True, Config(128, 128, 32, 8, 4), "110 to 114 registers: 2 programs", 90),
    Line(("project",), 16, None, True, Config(128, 128, 32, 8, 4), "64 deep, triton 3.6 spills 8 bytes: fp32 stream", 100),
    Line(_PRODUCTS, 16, None, True, Config(128, 128, 64, 8, 3), "128 registers, 96 KB: 2 programs a multiprocessor"),
    Line(("project_gradient",), 16, None, True, Config(128, 128, 64, 8, 2), "4 stages of 32 spill 16 bytes: fp32 stream", 100),
    Line(("ista_gradient",), 16, None, True, Config(128, 128, 32, 4, 4), "213 registers: 2 programs", 90, 128),
    Line(("ista_gradient",), 16, None, True, Config(128, 192, 32, 4, 3), "width 576: 3 × 64 without padding", 90, 192),
    Line(_ISTA, 16, None, True, Config(128, 128, 32, 4, 4), "208 registers: 2 programs; 192 columns spill: fp32 stream", 90),
    Line(("out_gradient",), 16, None, True, Config(128, 128, 32, 4, 3), "234 registers: 2 programs", 90),
    Line(("project_gradient",), 16, None, True, Config(128, 128, 32, 8, 3, 128), "2 programs; free, it takes 160: one", 90),
    Line(_GRADIENTS, 16, None, True, Config(128, 128, 32, 8, 4), "128 registers but for a rectified end (165), 64 KB"),
    Line(("weight_gradient",), 16, None, True, Config(128, 384, 32, 8, 4), "3 accumulators, 128 KB", 90, 384),
    Line(("weight_gradient", "odl_gradient"), 16, None, True, Config(128, 256, 64, 8, 3), "144 KB", 90, 256),
    Line(("weight_gradient",), 16, None, True, Config(128, 192, 32, 8, 4), "width 576: 3 × 64 without padding", 90, 192),
    Line(("weight_gradient", "odl_gradient"), 16, None, True, Config(128, 128, 64, 8, 3), "126 registers, 96 KB: 2 programs"),
    Line(("mixed_gradient",), 16, None, True, Config(128, 128, 32, 8, 2), "3 barriers a turn; of one stage 6", 80),
    Line(("mixed_gradient",), 16, None, True, Config(128, 128, 32, 8, 1), "161 registers; products of more are serialised"),
    Line(("mixed_product",), 16, None, True, Config(128, 128, 32, 8, 2), "4 barriers a turn; of one stage 9", 100),
    Line(("mixed_product",), 16, None, True, Config(128, 128, 32, 8, 1), "two stages and more are serialised"),
    Line(_ISTA, 32, None, True, Config(64, 64, 16, 4, 3), "of two stages triton 3.6 spills 8 bytes for one token", 80),
    Line(ODL[:2], 32, None, True, Config(64, 64, 16, 4, 2, 128), "free, it takes 96 registers and spills 8 bytes on sm_100"),
    Line((*_GRADIENTS, "ista"), 32, None, True, Config(64, 64, 16, 4, 2), "163 registers; 32 take 255 and spill on sm_80"),
    Line(_WEIGHTS, 32, None, True, Config(64, 64, 16, 4, 2, 128), "32 take 255 registers and spill 8 bytes", 80),
    Line(MATRIX, 32, None, True, Config(64, 64, 32, 4, 2), "the largest FMA tile that spills nowhere"),
    Line(_WEIGHTS, 16, None, False, Config(32, 64, 32, 4, 2, 128), "64 wide spills 8 to 24 bytes", 80),
    Line(MATRIX, 16, None, False, Config(64, 64, 32, 8, 2), "loads element by element, an address each: larger ones spill"),
    Line((*_ISTA, "project"), 32, None, False, Config(32, 64, 16, 8, 2), "32 deep spills 8 bytes", 100),
    Line(MATRIX, 32, None, False, Config(32, 64, 32, 8, 2), "the same"),
)

CANDIDATES = {
    ("mssa_forward", 16): [(64, 64, 0, 4, 2), (64, 64, 0, 4, 3), (64, 32, 0, 4, 3), (128, 64, 0, 8, 3), (64, 128, 0, 4, 2)],
    ("mssa_backward", 16): [
        (64, 32, 0, 4, 2),
        (64, 32, 0, 4, 3),
        (64, 32, 0, 4, 3, 128),
        (64, 32, 0, 4, 4, 128),
        (64, 16, 0, 4, 2),
    ],
    ("product", 16): [
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 32, 8, 3),
    ],
    ("odl_back", 16): [
        (128, 256, 64, 8, 3),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
    ],
    ("weight_gradient", 16): [(128, 384, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3)],
    ("mixed_gradient", 16): [(128, 128, 32, 8, 1), (128, 128, 32, 8, 2), (64, 128, 32, 4, 3)],
    ("mssa_forward", 32): [(32, 32, 0, 4, 2), (32, 32, 0, 8, 2), (64, 32, 0, 8, 2)],
    ("mssa_backward", 32): [(32, 16, 0, 4, 2), (32, 16, 0, 8, 2), (32, 32, 0, 8, 1), (32, 32, 0, 8, 2)],
    ("product", 32): [(64, 64, 32, 4, 2), (64, 64, 16, 4, 2), (32, 64, 32, 8, 2)],
    ("weight_gradient", 32): [(64, 64, 32, 4, 2), (32, 64, 32, 8, 2)],
    ("mixed_gradient", 32): [(64, 64, 32, 4, 2)],  # never launched: float32 operands do not mix
}
"""What `crate-fast tune` measures, by kernel and bits; "product" and "weight_gradient" stand for all of their kind that have no
entry of their own."""

ARCHITECTURES = (80, 90, 100)
"""What the table tells apart: Ampere, Ada and consumer Blackwell (HMMA), Hopper (HGMMA), Blackwell (UTCHMMA)."""

_forced: dict[str, Config] = {}
_assumed = [90]  # the architecture where there is no GPU to ask: in the interpreter and for compilation
_measured: dict[Path, dict[str, Config]] = {}


def attention(kernel: str, dtype: torch.dtype, head_width: int, device: torch.device) -> Config:
    """The shape of one of `ATTENTION` for tokens of `dtype` and heads of a width; ValueError if there is none so wide."""
    return _lookup(kernel, dtype, head_width, True, 0, key(kernel, dtype, head_width), device)


def matrix(kernel: str, operand: torch.dtype, inputs: int, outputs: int, device: torch.device) -> Config:
    """The shape of one of `MATRIX` for operands of a dtype and a weight (in, out)."""
    aligned = inputs % 16 == 0 and outputs % 16 == 0
    return _lookup(kernel, operand, None, aligned, outputs, key(kernel, operand, inputs, outputs), device)


def architecture(device: torch.device) -> int:
    """The one of `ARCHITECTURES` that a device is like; where it is no GPU, the one `assumed`."""
    return _family(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else _assumed[-1]


def candidates(kernel: str, dtype: torch.dtype) -> list[Config]:
    """The shapes worth measuring for a kernel and the dtype of its operands."""
    own, kind = (kernel, _bits(dtype)), "weight_gradient" if kernel in _WEIGHTS else "product"
    return [Config(*shape) for shape in CANDIDATES.get(own) or CANDIDATES[kind, own[1]]]


def splits(tiles: int, rows: int, config: Config, even: bool = False) -> int:
    """Into how many parts the rows of a weight gradient of `tiles` tiles are cut: as many programs as run at once, two a
    multiprocessor of tiles of 128 × 128, one of larger ones.

    132 multiprocessors (H100, H200) are assumed on every device, so that results do not depend on it. even: of more tiles than
    fill a quarter of it, the fewest parts, 12 at most, with which the last programs to run fill it to 95% on average, or best.
    """
    at_once = 132 if config.block_m * config.block_n > 128 * 128 else 2 * 132
    most = max(1, rows // (4 * config.block_k))
    if not even or 4 * tiles <= at_once:
        return max(1, min(at_once // tiles, most))
    filled = {n: n * tiles / (-(-n * tiles // at_once) * at_once) for n in range(1, min(12, most) + 1)}
    return max(filled, key=lambda n: (min(filled[n], 0.95), -n))


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """While open, `kernel` has this shape whatever the sizes."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def assumed(architecture: int) -> Iterator[None]:
    """While open, launches that are not on a GPU have the shapes of this compute capability (80, 90, 120 ...)."""
    _assumed.append(_family(architecture // 10))
    try:
        yield
    finally:
        _assumed.pop()


def is_settled() -> bool:
    """Whether no shape is `forced` and no architecture `assumed` just now, so that answers hold for the rest of the process."""
    return not _forced and len(_assumed) == 1


def key(kernel: str, dtype: torch.dtype, *sizes: int) -> str:
    """Under what a measured shape is stored, for one GPU."""
    return f"{kernel} {_bits(dtype)} {'x'.join(map(str, sizes))}"


def results_path() -> Path:
    """Where measured shapes are: tuning.json in $CRATE_FAST_CACHE, else in crate_fast under the user's cache directory."""
    return cache_folder() / "tuning.json"


def store(device_name: str, winners: dict[str, Config]) -> Path:
    """Adds measured shapes of a GPU to the file, in one step, and returns its path."""
    path = results_path()
    contents = _read(path)
    contents.setdefault(device_name, {}).update({name: list(config) for name, config in winners.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    _measured.clear()
    return path


def measured(device_name: str) -> dict[str, Config]:
    """The measured shapes of a GPU, by `key`; read once a process. Raises TuningError for a damaged file."""
    path = results_path()
    if path not in _measured:
        _measured[path] = {
            f"{device} {name}": Config(*shape) for device, shapes in _read(path).items() for name, shape in shapes.items()
        }
    prefix = f"{device_name} "
    return {name.removeprefix(prefix): config for name, config in _measured[path].items() if name.startswith(prefix)}


def _read(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        for shapes in contents.values():
            for shape in shapes.values():
                if len(shape) not in (5, 6) or not all(isinstance(n, int) and 0 <= n <= 1024 for n in shape):
                    raise ValueError(f"{shape} is no shape")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise TuningError(f"{path} is damaged ({error}); delete it, and measure again with crate-fast tune") from error
    return contents


def _lookup(
    kernel: str, dtype: torch.dtype, width: int | None, aligned: bool, columns: int, name: str, device: torch.device
) -> Config:
    """What is `forced`, else what was measured on this GPU as `name`, else the table's first line that fits."""
    if kernel in _forced:
        return _forced[kernel]
    if device.type == "cuda":
        found = measured(torch.cuda.get_device_name(device)).get(name)
        if found:
            return found
    family = architecture(device)
    for line in TABLE:
        fits = line.widest is None if width is None else line.widest is not None and width <= line.widest
        fits = fits and line.architecture in (None, family) and columns % line.columns == 0
        if kernel in line.kernels and line.bits == _bits(dtype) and line.aligned == aligned and fits:
            return line.config
    raise ValueError(f"head width is {width}; the kernels take 16 to 128")


def _family(major: int) -> int:
    """The one of `ARCHITECTURES` that a compute capability is like: 8.x and 12.x multiply by HMMA, 10.x and 11.x by UTCHMMA."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
