"""What moves between global memory and a multiprocessor, as Triton's intermediate code for GPUs (TTGIR) has it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

from .intermediate import Operation, Source, operations, parse

NAMES = re.compile(
    r"ttg\.async_copy_global_to_local|ttng\.async_tma_(copy_global_to_local|copy_local_to_global|reduce|gather|scatter)"
)


class Copy(NamedTuple):
    """Copies made of one line: bytes of all that stand in the code, and by how many turns a pipelined loop fetches ahead."""

    bytes: float
    ahead: int


class Moved(NamedTuple):
    """Asynchronous copies to and from shared memory, and bytes of the tiles that are loaded to registers, by their source."""

    copies: dict[Source, Copy]
    loads: dict[Source, float]


def read(ttgir: str) -> Moved:
    """The copies and loads of a kernel by what they were made of.

    A loop that fetches n turns ahead has the same copy n times before it, so its last n turns have nothing left to fetch.
    """
    body = parse(ttgir)[1]
    loads: Counter[Source] = Counter()
    moved: Counter[Source] = Counter()
    for op in operations(body):
        if NAMES.fullmatch(op.name):
            moved[op.source] += _bytes(op)
        elif m := re.search(r": tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)", op.text) if op.name == "tt.load" else None:
            loads[op.source] += math.prod(int(n) for n in m[1].split("x") if n) * int(m[2]) / 8
    ahead: dict[Source, int] = {}
    _count_ahead(body, ahead)
    return Moved({source: Copy(size, ahead.get(source, 0)) for source, size in moved.items()}, dict(loads))


def _bytes(op: Operation) -> float:
    """Of the tile that is copied: the last shape that the operation names in shared memory."""
    *shape, kind = re.findall(r"<((?:\d+x)+[a-z]+\d+)\w*, #(?:shared|nvmma)", op.text)[-1].split("x")
    return math.prod(map(int, shape)) * int(re.sub(r"\D", "", kind)) / 8


def _count_ahead(body: list[Operation], ahead: dict[Source, int]) -> None:
    before: Counter[Source] = Counter()
    for op in body:
        if NAMES.fullmatch(op.name):
            before[op.source] += 1
        inside = Counter(x.source for x in op.regions[0] if NAMES.fullmatch(x.name)) if op.name == "scf.for" else {}
        ahead |= {source: before[source] // count for source, count in inside.items()}
        for region in op.regions:
            _count_ahead(region, ahead)
