"""Triton's intermediate code (TTIR) read as a tree of operations: every function is inlined there and loops have bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

Source = tuple[tuple[str, int], ...]
"""Lines (file, line) that something was made of: the innermost first, then where each was called."""


class UnknownControlError(ValueError):
    """A loop or a branch that cannot be followed; the message names its line."""


def named(source: Source) -> str:
    """A source in words."""
    return " called at ".join(f"{file}:{line}" for file, line in source) or "an unknown line"


class Operation(NamedTuple):
    """One operation of the intermediate code with the regions inside it."""

    name: str
    results: tuple[str, ...]  # without the "%"; of several results, "x" stands for x#0, x#1 ...
    count: int  # of results
    text: str  # what follows the name
    source: Source
    regions: tuple[list[Operation], ...]

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.$#-]+)", self.text)


_HEAD = re.compile(r'\s*(?:(%[\w.$:-]+(?:, %[\w.$:-]+)*) = )?"?([a-z_]+\.[\w.]+)"?(.*)$')


def parse(ttir: str) -> tuple[list[str], list[Operation]]:
    """(names of the arguments, the kernel's body).

    Raises:
        UnknownControlError: the kernel jumps, which a `return` inside a branch makes it do.
    """
    lines = ttir.splitlines()
    locations = _locations(lines)
    kernel = next(n for n, line in enumerate(lines) if "tt.func public" in line)
    header = lines[kernel].split("attributes")[0]
    arguments = re.findall(r"[(,] ?%([\w.$-]+): ", header)
    body, _, _ = _region(lines, kernel + 1, locations)
    return arguments, body


def operations(body: list[Operation]) -> Iterator[Operation]:
    """All operations of a body, those in regions too."""
    for op in body:
        yield op
        for region in op.regions:
            yield from operations(region)


def _locations(lines: list[str]) -> dict[str, str]:
    return dict(m.groups() for line in lines if (m := re.match(r"#(loc\d*) = loc\((.*)\)$", line)))


def _region(lines: list[str], at: int, locations: dict[str, str]) -> tuple[list[Operation], int, str]:
    """(operations, the line that closes the region, its text)."""
    found = []
    while not lines[at].lstrip().startswith("}"):
        line = lines[at]
        if line.lstrip().startswith("^"):  # the arguments of a block, of a reduction
            at += 1
            continue
        m = _HEAD.match(line)
        if m is None:
            raise UnknownControlError(f"intermediate code that is not known: {line.strip()[:80]}")
        regions = []
        while line.rstrip().endswith("{") or (line.rstrip().endswith(")") and re.search(r"\{ loc\([^()]*\)$", line.rstrip())):
            inside, at, line = _region(lines, at + 1, locations)
            regions.append(inside)
        location = line.rpartition(" loc(")[2]
        results = [name.partition(":") for name in re.findall(r"%([\w.$:-]+)", m[1] or "")]
        count = sum(int(number or 1) for _, _, number in results)
        tail = m[3] if regions else m[3].rpartition(" loc(")[0]
        source = _resolve(location.rstrip().removesuffix(")"), locations)
        if m[2].startswith("cf."):
            raise UnknownControlError(f"the kernel jumps at {named(source)}; only loops and branches can be followed")
        found.append(Operation(m[2], tuple(name for name, _, _ in results), count, tail, source, tuple(regions)))
        at += 1
    return found, at, lines[at].strip()


def _resolve(text: str, locations: dict[str, str]) -> Source:
    """The lines that a location stands for."""
    if m := re.fullmatch(r"#(loc\d*)", text):
        return _resolve(locations.get(m[1], "unknown"), locations)
    if m := re.fullmatch(r"callsite\((.+) at (.+)\)", text):
        return _resolve(m[1], locations) + _resolve(m[2], locations)
    if m := re.match(r'"([^"]*)":(\d+):\d+', text):
        return ((m[1], int(m[2])),)
    if m := re.fullmatch(r'"[^"]*"\((.+)\)', text):  # a variable's name around its line
        return _resolve(m[1], locations)
    return ()
