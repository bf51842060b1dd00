"""Machine code of a compiled kernel, and the way that one warp takes through it.

`disassemble` reads a cubin with the tools in Triton's own package: instructions, the control field that the compiler puts in
each (stall count, scoreboards), and the source lines that each was made of. `walk` lists the instructions that a warp executes
in a program whose loops turn and whose branches go as control_flow.py says. Nothing is guessed: a loop of the machine code that
no loop of the source explains, and a branch of the source that the walk never comes to, are errors that name it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from .control_flow import Path as Way
from .copies import Copy
from .intermediate import Source, UnknownControlError, named

LONGEST = 3_000_000  # instructions of a walk
COPIES = ("LDGSTS", "UTMALDG")  # from global to shared memory, without a register between


class Instruction(NamedTuple):
    """One machine instruction with its control field."""

    predicate: str  # "", "P0", "!P0" ...
    name: str  # with modifiers
    arguments: str
    stall: int  # clocks until the warp's next instruction
    write: int  # scoreboard set until the result is there, 7 for none
    read: int  # scoreboard set until the operands are read
    wait: int  # mask of scoreboards waited for
    source: Source

    @property
    def op(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]


class Loop(NamedTuple):
    """A loop of the machine code, or one of the copies that unrolling makes of one: first and last instruction."""

    first: int
    last: int
    source: Source


class Code(NamedTuple):
    """A disassembled kernel. Bytes of a multiprocessor's shared memory and of local memory a thread."""

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    shared: int
    warps: int
    local: int

    def target(self, index: int) -> int:
        """Where a branch goes."""
        return self.labels[re.search(r"\(([.$][^)]+)\)", self.instructions[index].arguments)[1]]

    def loops(self) -> list[Loop]:
        """Backward branches, those aside that wait on a barrier in shared memory."""
        found = []
        for index, i in enumerate(self.instructions):
            if i.op == "BRA" and (first := self.target(index)) < index and not self.spins(first, index):
                found.append(Loop(first, index, i.source))
        return found

    def spins(self, first: int, last: int) -> bool:
        """Whether a loop does nothing but wait for a barrier in shared memory, or lies behind the kernel's end."""
        waits = any(i.op == "SYNCS" for i in self.instructions[first : last + 1])
        return last > self.end() or (last - first < 12 and waits)

    def end(self) -> int:
        """The last instruction that ends a program."""
        return max(n for n, i in enumerate(self.instructions) if i.op in ("EXIT", "RET"))


def tools() -> Path:
    """Where Triton has its copies of NVIDIA's assembler and disassemblers."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def resources(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of local memory a thread, the machine code as text with source lines)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "-c", "-hex", "-gi", file.name)
    numbers = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], text


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tools() / tool, *arguments], capture_output=True, text=True, check=True).stdout


_SOURCE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^([.$][\w$.]+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_CONTROL = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def disassemble(cubin: bytes, shared: int, warps: int) -> Code:
    """The machine code of a kernel of sm_80 to sm_90 that takes `shared` bytes of shared memory and has `warps` warps."""
    registers, local, text = resources(cubin)
    instructions, labels, source, fresh, pending = [], {}, [], True, None
    for line in text.splitlines():
        if m := _SOURCE.match(line):  # a chain of calls is a line each, the innermost first
            source, fresh = ([] if fresh else source), False
            source.append((m[1], int(m[2])))
        elif m := _LABEL.match(line):
            labels[m[1]] = len(instructions)
        elif m := _INSTRUCTION.match(line):
            pending, fresh = (m[1] or "", m[2], m[3]), True
        elif pending and (m := _CONTROL.match(line)):
            c = int(m[1], 16) >> 41
            control = (c & 15, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63)
            instructions.append(Instruction(*pending, *control, tuple(source)))
            pending = None
    return Code(instructions, labels, registers, shared, warps, local)


class Step(NamedTuple):
    """An instruction on a warp's way; `on` is false where it is a copy with nothing left to fetch."""

    index: int
    on: bool


def walk(code: Code, way: Way, copies: dict[Source, Copy]) -> list[Step]:
    """The instructions that one warp executes in a program that goes `way`, in order.

    A forward branch is taken where what it skips belongs to parts of the source that the program does not come to; any other
    is not: what only some warps or lanes do counts for all, and of a branch that goes both ways in one program both sides.

    Raises:
        UnknownControlError: a loop has no counterpart in the source, or the walk misses a part of it.
    """
    return _Walker(code, way, copies).steps()


class _Walker:
    def __init__(self, code: Code, way: Way, copies: dict[Source, Copy]) -> None:
        self.code, self.way, self.copies = code, way, copies
        self.loops = [loop._replace(source=self._resolved(loop)) for loop in code.loops()]
        self.at_end = {loop.last: loop for loop in self.loops}
        self.versions = defaultdict(list)  # of a loop that the compiler unrolled: by 4, say, then the rest one by one
        for loop in self.loops:
            self.versions[loop.source].append(loop)
        self.left: dict[Source, int] = {}  # turns that a loop has left
        self.entered: set[Source] = set()

    def _resolved(self, loop: Loop) -> Source:
        return self.way.loop_of(loop.source, [i.source for i in self.code.instructions[loop.first : loop.last]])

    def _left(self, source: Source) -> int:
        self.entered.add(source)
        return self.left.setdefault(source, self.way.turns[source])

    def _amount(self, source: Source, first: int, last: int) -> int:
        """How many turns of a loop a stretch of the machine code makes at once, by its loads or else its length."""
        rest = self.versions[source][-1]
        return round(self._work(first, last) / self._work(rest.first, rest.last))

    def _work(self, first: int, last: int) -> int:
        inside = self.code.instructions[first : last + 1]
        return sum(i.op == "LDG" for i in inside) or len(inside)

    def _factor(self, loop: Loop) -> int:
        return max(1, self._amount(loop.source, loop.first, loop.last))

    def steps(self) -> list[Step]:
        at, found = 0, []
        plain = [Step(index, True) for index in range(len(self.code.instructions))]
        turns = [n for n, i in enumerate(self.code.instructions) if i.op in ("BRA", "EXIT", "RET", *COPIES)]
        while at is not None:
            stop = turns[bisect_left(turns, at)]
            found += plain[at:stop]
            self._leave(stop)
            found.append(Step(stop, not self._is_spent(stop)))
            if len(found) > LONGEST:
                raise UnknownControlError("the walk through the machine code does not end")
            at = self._next(stop)
        self._check({step.index for step in found})
        return found

    def _leave(self, at: int) -> None:
        """Forgets the turns of loops that lie behind, so that a loop around them comes to them anew."""
        for source in [s for s in self.left if at > self.versions[s][-1].last]:
            left = self.left.pop(source)
            if left:
                raise UnknownControlError(f"the walk leaves the loop at {named(source)} with {left} turns to go")

    def _is_spent(self, at: int) -> bool:
        """Whether this copy of a pipelined loop has nothing left to fetch."""
        i = self.code.instructions[at]
        if i.op not in COPIES or i.source not in self.copies:
            return False
        around = [loop for loop in self.loops if loop.first <= at <= loop.last]
        inner = min(around, key=lambda loop: loop.last - loop.first, default=None)
        return inner is not None and self._left(inner.source) <= self.copies[i.source].ahead

    def _next(self, at: int) -> int | None:
        i = self.code.instructions[at]
        if i.op in ("RET", "EXIT"):
            return at + 1 if i.predicate and not self._is_dead(at + 1, at + 40) else None
        if i.op != "BRA":
            return at + 1
        target = self.code.target(at)
        if target <= at:
            return self._turn(at, target)
        always = not i.predicate and "," not in i.arguments
        return target if always or self._skips(at, target) else at + 1

    def _turn(self, at: int, target: int) -> int:
        if at not in self.at_end:  # a wait
            i = self.code.instructions[at]
            return at + 1 if i.predicate or "," in i.arguments else target
        loop = self.at_end[at]
        factor = self._factor(loop)
        self.left[loop.source] = self._left(loop.source) - factor
        return target if self.left[loop.source] >= factor else at + 1

    def _skips(self, at: int, target: int) -> bool:
        """Whether a conditional forward branch is taken."""
        over = [loop for loop in self.loops if at < loop.first and loop.last < target]
        if over and all(loop.source == over[0].source for loop in over):
            return all(self._left(loop.source) < self._factor(loop) for loop in over)
        if target > self.code.end():  # what waits, or is rare; were it a branch of the source, `_check` would miss it
            return False
        source = self._between_versions(at, target)
        if source is not None:
            return not self._take(source, self._amount(source, at + 1, target - 1))
        return self._is_dead(at + 1, target)

    def _between_versions(self, at: int, target: int) -> Source | None:
        """The unrolled loop of which a branch skips a few turns that stand outside all its versions; None if there is none."""
        line = self.code.instructions[at].source
        for source, versions in self.versions.items():
            outside = not any(x.first <= at <= x.last for x in versions)
            if len(versions) > 1 and outside and line == source[: len(line)] and at < versions[-1].last >= target:
                return source
        return None

    def _take(self, source: Source, turns: int) -> bool:
        """Whether so many turns are left, which are then made, between the versions of an unrolled loop."""
        if self._left(source) < turns:
            return False
        self.left[source] -= turns
        return True

    def _is_dead(self, first: int, last: int) -> bool:
        """Whether more of these instructions belong to what the program does not come to than to what it alone comes to."""
        sources = [i.source for i in self.code.instructions[first:last]]
        return sum(self.way.is_dead(s) for s in sources) > sum(self.way.is_live(s) for s in sources)

    def _check(self, seen: set[int]) -> None:
        """Every part of the source that the program comes to, and that left instructions of its own, was walked."""
        walked = {self.code.instructions[index].source for index in seen}
        there = {i.source for i in self.code.instructions}
        for region, sources in self.way.regions:
            if there & sources and not walked & sources:
                raise UnknownControlError(f"the walk never comes to the branch at {named(region)}")
        for source in self.versions:
            if self.way.turns[source] and source not in self.entered:
                raise UnknownControlError(f"the walk never comes to the loop at {named(source)}")


def inner_loops(code: Code) -> Sequence[Loop]:
    """Loops that hold no other."""
    loops = code.loops()
    return [x for x in loops if not any(y != x and x.first <= y.first and y.last <= x.last for y in loops)]
