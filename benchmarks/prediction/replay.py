"""How long a program takes of its multiprocessor: a replay of one of the four schedulers with as many programs as fit.

Warps issue in order, held up by the compiler's own stall counts and scoreboards, by the pipes, by asynchronous products and
copies, and by barriers. What pipes.py takes for overlapped is overlapped here only where the code lets it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from .constants import LATENCIES, values
from .machine_code import Instruction
from .pipes import ENGINE, Kernel, costs

LONG = 30_000  # steps of a way that is not replayed whole
SLACK = 64  # clocks of shared memory's work that may queue


class Issue(NamedTuple):
    """What the scheduler must know of an instruction."""

    kind: str
    pipes: tuple[tuple[str, float], ...]  # without issue slots and bytes
    moved: float  # bytes from or to L2
    stall: int
    boards: tuple[int, ...]
    number: int
    latency: int
    write: int
    read: int


class _Warp:
    """One warp of a program on its way."""

    def __init__(self, time: float) -> None:
        self.time, self.at, self.held = time, 0, False
        self.boards = [0.0] * 6
        self.copies, self.products, self.boxes = [], [], []  # when each committed group is done
        self.copy = self.product = 0.0
        self.waited = 0  # boxes waited for


class _Program:
    def __init__(self, way: list[Issue], warps: int, time: float) -> None:
        self.way = way
        self.warps = [_Warp(time + 7 * k) for k in range(warps)]
        self.at_barrier: list[_Warp] = []


def _oldest(groups: list[float], newest: int) -> float:
    """When all groups but the newest ones are done."""
    return max(groups[: len(groups) - newest], default=0.0)


class _Scheduler:
    """One scheduler of a multiprocessor; times in clocks."""

    def __init__(self, ways: list[tuple[float, list[Issue]]], warps: int, programs: int, count: int) -> None:
        self.k = values()
        self.order, self.started, self.warps = _order(ways, count), 0, warps
        self.free: dict[str, float] = defaultdict(float)
        self.memory = 0.0
        self.programs: list[_Program] = []
        self.done: list[float] = []
        for number in range(programs):
            self.begin(number * 200.0)

    def begin(self, time: float) -> None:
        self.programs.append(_Program(self.order[self.started % len(self.order)], self.warps, time))
        self.started += 1

    def ready(self, warp: _Warp, issue: Issue) -> float:
        """The earliest that a warp can issue."""
        time = warp.time
        for board in issue.boards:
            if warp.boards[board] > time:
                time = warp.boards[board]
        kind, free = issue.kind, self.free
        if kind == "HGMMA":
            clocks = dict(issue.pipes)
            return max(time, free["tensor"] - clocks["tensor"], free["shared"] - 2 * clocks["shared"])
        if kind == "wait for products":
            return max(time, _oldest(warp.products, issue.number))
        if kind == "wait for copies":
            return max(time, _oldest(warp.copies, issue.number))
        if kind == "wait for a box":
            return max(time, warp.boxes[warp.waited] + 20) if warp.waited < len(warp.boxes) else time
        for pipe, _ in issue.pipes:
            slack = SLACK if pipe == "shared" else 0
            if free[pipe] - slack > time:
                time = free[pipe] - slack
        return time

    def step(self) -> None:
        """Issues the instruction that can go first."""
        best = None
        for program in self.programs:
            for warp in program.warps:
                if not warp.held:
                    issue = program.way[warp.at]
                    time = self.ready(warp, issue)
                    if best is None or time < best[0]:
                        best = time, program, warp, issue
        time, program, warp, issue = best
        now = max(time, self.free["issue"])
        self.free["issue"] = now + 1
        finish = self._product(warp, issue, now) if issue.kind == "HGMMA" else self._other(warp, issue, now)
        warp.time = now + max(1, issue.stall)
        if issue.write < 7:
            warp.boards[issue.write] = max(warp.boards[issue.write], finish)
        if issue.read < 7:
            operands = now if issue.kind == "HGMMA" else finish - issue.latency
            warp.boards[issue.read] = max(warp.boards[issue.read], operands + 4)
        self._advance(program, warp, issue, now)

    def _product(self, warp: _Warp, issue: Issue, now: float) -> float:
        free, clocks = self.free, dict(issue.pipes)
        start = max(now, free["tensor"], free["shared"] - SLACK)
        free["tensor"] = start + clocks["tensor"]
        free["shared"] = max(free["shared"], start) + clocks["shared"]
        finish = max(free["tensor"], free["shared"] - SLACK) + LATENCIES["hgmma"]
        warp.product = max(warp.product, finish)
        if issue.number:
            warp.products.append(warp.product)
        return finish

    def _other(self, warp: _Warp, issue: Issue, now: float) -> float:
        finish = now
        for pipe, clocks in issue.pipes:
            self.free[pipe] = max(self.free[pipe], now) + clocks
            finish = max(finish, self.free[pipe])
        if issue.moved:
            self.memory = max(self.memory, now) + 4 * issue.moved / self.k["bytes a clock"]
            finish = max(finish, self.memory)
        finish += issue.latency
        if issue.kind == "expect a box":
            warp.boxes.append(now)
        elif issue.kind == "UTMALDG" and warp.boxes:
            warp.boxes[-1] = max(warp.boxes[-1], finish)
        elif issue.kind == "wait for a box":
            warp.waited += 1
        elif issue.kind == "LDGSTS":
            warp.copy = max(warp.copy, finish)
        elif issue.kind == "LDGDEPBAR":
            warp.copies.append(warp.copy)
        return finish

    def _advance(self, program: _Program, warp: _Warp, issue: Issue, now: float) -> None:
        warp.at += 1
        if issue.kind == "BAR":
            warp.held = True
            program.at_barrier.append(warp)
            if len(program.at_barrier) == self.warps:
                for other in program.at_barrier:
                    other.held, other.time = False, now + LATENCIES["barrier"]
                program.at_barrier = []
        if warp.at == len(program.way):
            program.warps.remove(warp)
            if not program.warps:
                self.done.append(now)
                self.programs.remove(program)
                self.begin(now + self.k["program start"])


def clocks_of_program(kernel: Kernel, programs: int) -> float:
    """Clocks that a program takes of its multiprocessor while `programs` are resident, each followed by another."""
    longest = max(len(steps) for _, steps in kernel.ways)
    if longest < LONG:
        return _replay(kernel, kernel.ways, programs)
    few, more = ([(w, _shortened(s, n)) for w, s in kernel.ways] for n in (LONG // 4, LONG // 2))  # of one long loop
    a, b = _replay(kernel, few, programs), _replay(kernel, more, programs)
    lengths = [len(ways[0][1]) for ways in (kernel.ways, few, more)]
    return a + (b - a) * (lengths[0] - lengths[1]) / (lengths[2] - lengths[1])


def _shortened(steps: list, length: int) -> list:
    return steps[:length] + steps[len(steps) - len(steps) // 50 :]


def _replay(kernel: Kernel, ways: list, programs: int) -> float:
    prepared = [(weight, prepare(kernel, steps)) for weight, steps in ways]
    warps = max(1, kernel.code.warps // 4)
    scheduler = _Scheduler(prepared, warps, programs, 3 * programs)
    left = 12 * programs * warps * max(len(way) for _, way in prepared)
    while len(scheduler.done) < 2 * programs:
        scheduler.step()
        left -= 1
        if left < 0:
            raise RuntimeError("the replay does not end")
    done = scheduler.done
    return (done[-1] - done[programs - 1]) / (len(done) - programs)


def _order(ways: list, count: int) -> list[list[Issue]]:
    """`count` ways, each in its proportion, spread evenly."""
    owed, found = [0.0] * len(ways), []
    for _ in range(count):
        owed = [o + weight for o, (weight, _) in zip(owed, ways, strict=True)]
        k = max(range(len(ways)), key=owed.__getitem__)
        owed[k] -= 1
        found.append(ways[k][1])
    return found


def prepare(kernel: Kernel, steps: list) -> list[Issue]:
    """A way as the scheduler reads it."""

    @cache
    def one(step) -> Issue:
        i = kernel.code.instructions[step.index]
        if not step.on:
            return Issue("off", (), 0.0, i.stall, (), 0, 0, 7, 7)
        pipes = costs(i, kernel)
        kind, number = _kind(i)
        boards = tuple(b for b in range(6) if i.wait >> b & 1)
        busy = tuple((pipe, clocks) for pipe, clocks in pipes.items() if pipe not in ("issue", "bytes"))
        latency = LATENCIES[_latency(i, pipes)]
        stall = i.stall + (LATENCIES["descriptor"] if i.op == "UTMACCTL" else 0)
        return Issue(kind, busy, pipes.get("bytes", 0.0), stall, boards, number, latency, i.write, i.read)

    return [one(step) for step in steps]


def _kind(i: Instruction) -> tuple[str, int]:
    """What an instruction is to the scheduler, and the number of groups that it may leave unfinished."""
    if i.op in ("WARPGROUP", "DEPBAR"):
        number = int(m[1], 16) if (m := re.search(r"0x([0-9a-f]+)", i.arguments)) else 0
        return ("wait for copies" if i.op == "DEPBAR" else "wait for products" if "DEPBAR" in i.name else "arrive"), number
    if i.op == "SYNCS":
        if "TRYWAIT" in i.name:
            return "wait for a box", 0
        return ("expect a box" if "ARRIVE" in i.name and "TRANS64" in i.name else "SYNCS"), 0
    return i.op, int(i.op == "HGMMA" and "gsb0" in i.arguments)


_LATENCY = {
    "SHFL": "shuffle", "HMMA": "hmma", "MEMBAR": "fence", "FENCE": "fence", "UTMALDG": "engine", "UTMASTG": "none",
    "HGMMA": "none", **dict.fromkeys(("LDC", "S2R", "S2UR", "R2UR"), "const"),
}  # fmt: skip


def _latency(i: Instruction, pipes: dict[str, float]) -> str:
    """The one of `LATENCIES` that an instruction has."""
    if i.op not in ENGINE and "bytes" in pipes:
        return "global" if pipes["bytes"] == 512 else "vector"
    return _LATENCY.get(i.op) or next((kind for kind in ("shared", "mufu") if kind in pipes), "none")
