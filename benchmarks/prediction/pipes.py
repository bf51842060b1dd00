"""What a kernel takes of a Hopper multiprocessor: clocks of every pipe, bytes, and the least time that follows.

The bound of a launch is the busiest pipe: all instructions of all programs over each pipe's throughput; DRAM and L2 bytes are
pipes too. replay.py says how much of it can overlap. Throughputs are warp-instructions a clock of one of a multiprocessor's
four schedulers, as the CUDA programming guide has them for column 9.0: 32 lanes for FP32; 16 for integer, logic, comparison,
conversion; 4 for special functions; 8 for shuffles. A wgmma m64nNk16 takes N/2 clocks and reads shared memory at 128 bytes a
clock. It is a model: no bank conflicts, no instruction cache, no power limit, one latency for all loads.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from .constants import values
from .copies import Moved
from .intermediate import Source, UnknownControlError, named
from .machine_code import Code, Instruction, Step

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB of shared memory that one program can have."""

FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
MULTIPLY = {"IMAD"}  # half as many lanes
UNIFORM = re.compile(r"^(U[A-Z]|R2UR|S2UR|VOTEU|CS2UR)")
CONVERT = {"MUFU", "I2F", "F2I", "F2F", "POPC"}
LOCAL = {"LDL", "STL"}
FREE = {
    "BRA", "EXIT", "NOP", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "BSSY", "BSYNC", "WARPSYNC", "CALL",
    "RET", "S2R", "CS2R", "LDC", "SYNCS", "ERRBAR", "CCTL",
}  # fmt: skip
ENGINE = {"UTMALDG", "UTMASTG"}  # copies of whole boxes by the tensor memory accelerator


class Kernel(NamedTuple):
    """A kernel as the model sees it."""

    code: Code
    ways: list[tuple[float, list[Step]]]  # (share of the programs, what one of their warps executes)
    boxes: dict[Source, float]  # bytes that an engine's copy moves, by its source
    loads: dict[Source, float]  # bytes that a warp's load to registers moves at least


def kernel_of(code: Code, ways: list[tuple[float, list[Step]]], moved: Moved) -> Kernel:
    """A kernel with the bytes of its loads and copies, of which an instruction has its part.

    Raises:
        UnknownControlError: the intermediate code lacks a copy by the engine.
    """
    copies = Counter(i.source for i in code.instructions if i.op in ENGINE)
    for source in copies:
        if source not in moved.copies:
            raise UnknownControlError(f"a copy by the engine at {named(source)} is not in the intermediate code")
    loads = Counter(i.source for i in code.instructions if i.op == "LDG" and i.source in moved.loads)
    return Kernel(
        code, ways, {source: moved.copies[source].bytes / count for source, count in copies.items()},
        {source: moved.loads[source] / count / code.warps for source, count in loads.items()},
    )  # fmt: skip


def costs(i: Instruction, kernel: Kernel) -> dict[str, float]:
    """Clocks of each pipe of one scheduler that an instruction takes; "bytes" are bytes out of or into L2, of the warp.

    "shared" is the multiprocessor's 128 bytes a clock as one scheduler sees them while the other three do the same.
    """
    if i.predicate == "!PT":
        return {"issue": 1}
    if i.op == "HGMMA":
        return {"issue": 1} | _wgmma(i)
    if i.op in ENGINE:  # a box is copied once for all warps of the program
        return {"issue": 1, "bytes": kernel.boxes[i.source] / kernel.code.warps}
    width = next((int(w) for w in re.findall(r"\.(64|128)(?=\.|$)", i.name)), 32) // 8
    if i.op in ("LDG", "LDGSTS", "STG", "ATOMG", "RED", "REDG"):
        size = 32.0 * width
        if i.op == "LDG" and width < 16:  # eight lanes with an address of their own, or as many as a tile needs
            size = max(8.0 * width, min(size, kernel.loads.get(i.source, 0.0)))
        return {"issue": 1, "bytes": size, "shared": width}
    return {"issue": 1} | _inside(i, width)


def _wgmma(i: Instruction) -> dict[str, float]:
    columns = int(re.search(r"64x(\d+)x", i.name)[1])
    from_shared = "gdesc" in i.arguments and not re.match(r"R\d+, R\d+", i.arguments)  # the first operand too
    return {"tensor": columns / 2, "shared": (2048 * from_shared + 32 * columns) / 128}


def _inside(i: Instruction, width: int) -> dict[str, float]:
    """Instructions that stay in the multiprocessor."""
    if i.op == "HMMA":
        rate = values()["HMMA of HGMMA"] * 512
        return {"tensor": (1024 if ".1688" in i.name else 2048) / rate}
    if i.op in ("LDS", "STS") or i.op in LOCAL:
        return {"shared": width}
    if i.op in ("LDSM", "STSM"):
        return {"shared": 4.0 * int(i.name[-1]) if i.name[-1] in "24" else 4.0}
    if i.op in ("SHFL", "ATOMS", "REDUX"):
        return {"shared": 4}
    if i.op in CONVERT:
        return {"mufu": 8}
    if i.op in FMA:
        return {"fma": 1}
    if i.op in MULTIPLY:
        return {"fma": 1, "imad": 2}
    if UNIFORM.match(i.op):
        return {"uniform": 2}
    return {} if i.op in FREE else {"alu": 2}


def resident(code: Code, arch: str = "sm_90") -> int:
    """Programs that a multiprocessor holds at a time."""
    k = values()
    registers = -(-code.registers // 8) * 8 * 32 * code.warps
    limits = (k["registers"] // registers, SHARED_MEMORY[arch] * 1024 // (code.shared + 1024), k["warps"] // code.warps)
    return int(max(1, min(*limits, k["programs"])))


class Work(NamedTuple):
    """All of a launch: clocks of every pipe of all schedulers together by pipe, bytes to and from L2, flops executed."""

    clocks: dict[str, float]
    l2_bytes: float
    flops: float


def work(kernel: Kernel, programs: int) -> Work:
    """What `programs` programs execute."""
    clocks: Counter[str] = Counter()
    flops = 0.0
    for weight, steps in kernel.ways:
        for step, count in Counter(steps).items():
            i = kernel.code.instructions[step.index]
            for pipe, each in (costs(i, kernel) if step.on else {"issue": 1}).items():
                clocks[pipe] += weight * count * each * kernel.code.warps * programs
            flops += weight * count * flops_of(i) * kernel.code.warps * programs
    clocks["fma"] = max(clocks["fma"], clocks.pop("imad", 0))
    l2_bytes = clocks.pop("bytes", 0.0)
    return Work(dict(clocks), l2_bytes, flops)


def flops_of(i: Instruction) -> float:
    """Of one warp's matrix instruction."""
    if i.op == "HGMMA":
        return 2.0 * 64 * int(re.search(r"64x(\d+)x", i.name)[1]) * 16 / 4
    if i.op == "HMMA":
        return 2048.0 if ".1688" in i.name else 4096.0
    return 0.0


def least_times(done: Work, dram_bytes: float) -> dict[str, float]:
    """Seconds of every pipe."""
    k = values()
    schedulers = 4 * k["multiprocessors"]
    times = {pipe: clocks / schedulers / k["clock"] for pipe, clocks in done.clocks.items()}
    return times | {"DRAM": dram_bytes / k["DRAM"], "L2": done.l2_bytes / k["L2"]}
