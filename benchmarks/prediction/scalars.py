"""The integers of a kernel's intermediate code, computed for all programs of a launch at once: a vector over program ids.

What is not an integer known from the launch's arguments is None, and so is everything made of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .intermediate import Operation, UnknownControlError, named


def _divide(a, b):
    """Rounded towards zero; by 0 only where the program does not come, then anything."""
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _remainder(a, b):
    return a - _divide(a, b) * b


BINARY = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "divsi": _divide, "divui": _divide, "remsi": _remainder,
    "remui": _remainder, "floordivsi": lambda a, b: a // np.where(b == 0, 1, b),
    "ceildivsi": lambda a, b: -(-a // np.where(b == 0, 1, b)), "minsi": np.minimum, "minui": np.minimum,
    "maxsi": np.maximum, "maxui": np.maximum, "andi": np.bitwise_and, "ori": np.bitwise_or, "xori": np.bitwise_xor,
    "shli": np.left_shift, "shrsi": np.right_shift, "shrui": np.right_shift,
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater, "sge": np.greater_equal,
    "ult": np.less, "ule": np.less_equal, "ugt": np.greater, "uge": np.greater_equal,
}  # fmt: skip
SAME = ("extsi", "extui", "trunci", "index_cast", "bitcast")


class Record(NamedTuple):
    """What a loop (its turns) or a branch (1 for its first side, 0 for the other) does each time that programs come to it;
    -1 for programs that do not."""

    operation: Operation
    values: np.ndarray


class Scalars:
    """The run of a kernel's integers for `programs` programs."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.records: list[Record] = []
        self.known: dict[str, np.ndarray | None] = {}

    def all_programs(self, value) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.int64), (self.programs,))

    def run(self, body: list[Operation], arguments: dict) -> None:
        self.known.update({n: None if v is None else np.asarray(int(v)) for n, v in arguments.items()})
        self._body(body, np.ones(self.programs, bool))

    def _value(self, name: str):
        return self.known.get(name)

    def _body(self, body: list[Operation], active: np.ndarray) -> list:
        """Runs operations for the programs that are active; what the region yields."""
        for op in body:
            if op.name == "scf.yield":
                return [self._value(name) for name in op.operands()[: _values(op.text)]]
            if op.name == "scf.for":
                self._loop(op, active)
            elif op.name == "scf.if":
                self._branch(op, active)
            elif op.name in ("scf.while", "tt.call"):
                raise UnknownControlError(f"{op.name} at {named(op.source)} cannot be followed")
            elif len(op.results) == 1:
                self.known[op.results[0]] = self._compute(op)
        return []

    def _compute(self, op: Operation):
        """The value of one operation, None if it is no known integer."""
        kind, _, name = op.name.partition(".")
        if kind == "tt":
            return self._program(op) if name in ("get_program_id", "get_num_programs") else None
        if kind != "arith" or "tensor<" in op.text:
            return None
        if name == "constant":
            m = re.match(r"\s*(-?\d+|true|false)(?: : (?:i\d+|index))?\s*$", op.text)
            return None if m is None else np.asarray({"true": 1, "false": 0}.get(m[1]) if m[1][0] in "tf" else int(m[1]))
        inputs = [self._value(operand) for operand in op.operands()]
        if name == "select" and inputs and inputs[0] is not None:
            return None if inputs[1] is None or inputs[2] is None else np.where(inputs[0] != 0, inputs[1], inputs[2])
        if not inputs or any(value is None for value in inputs):
            return None
        if name == "cmpi":
            return COMPARE[op.text.split(",")[0].strip()](*inputs).astype(np.int64)
        return BINARY[name](*inputs) if name in BINARY else inputs[0] if name in SAME else None

    def _program(self, op: Operation) -> np.ndarray:
        first = op.text.split()[0] == "x"  # launches have one dimension
        if op.name == "tt.get_num_programs":
            return np.asarray(self.programs if first else 1)
        return np.arange(self.programs) if first else np.asarray(0)

    def _loop(self, op: Operation, active: np.ndarray) -> None:
        variable, *bounds = re.match(r"\s*(?:unsigned )?%(\S+) = %(\S+) to %(\S+) step %(\S+)", op.text).groups()
        low, high, step = (self._value(name) for name in bounds)
        if low is None or high is None or step is None:
            raise UnknownControlError(f"the bounds of the loop at {named(op.source)} depend on what is not an argument")
        turns = np.maximum(0, -((low - high) // np.maximum(step, 1)))
        self.records.append(Record(op, np.where(active, self.all_programs(turns), -1)))
        pairs = re.findall(r"%([\w.$-]+) = %([\w.$#-]+)", op.text.partition("iter_args(")[2].partition(")")[0])
        carried = [self._value(initial) for _, initial in pairs]
        controls = _has_control(op.regions[0])
        for turn in range(int(turns.max()) if controls else 0):
            inside = active & self.all_programs(turn < turns)
            self.known[variable] = low + turn * step
            self.known.update({name: value for (name, _), value in zip(pairs, carried, strict=True)})
            fresh = self._body(op.regions[0], inside)
            carried = [_merge(turn < turns, new, old) for new, old in zip(fresh, carried, strict=True)]
        self._name_results(op, carried if controls else [None] * len(carried))

    def _branch(self, op: Operation, active: np.ndarray) -> None:
        condition = self._value(op.operands()[0])
        if condition is None:
            raise UnknownControlError(f"the branch at {named(op.source)} depends on what is not an argument")
        taken = self.all_programs(condition) != 0
        self.records.append(Record(op, np.where(active, taken.astype(np.int64), -1)))
        sides = [self._body(region, active & side) for region, side in zip(op.regions, (taken, ~taken), strict=False)]
        if op.count:
            self._name_results(op, [_merge(taken, a, b) for a, b in zip(*sides, strict=True)])

    def _name_results(self, op: Operation, values: list) -> None:
        for name in op.results:
            self.known[name] = values[0] if len(values) == 1 else None
            self.known.update({f"{name}#{n}": value for n, value in enumerate(values)})


def _values(text: str) -> int:
    return len(re.findall(r"%[\w.$#-]+", text.partition(" : ")[0]))


def _merge(condition, a, b):
    return None if a is None or b is None else np.where(condition, a, b)


def _has_control(body: list[Operation]) -> bool:
    return any((op.name.startswith("scf.") and op.name != "scf.yield") or any(map(_has_control, op.regions)) for op in body)
