"""How often the loops of a kernel turn and which branches its programs take, by the intermediate code that Triton makes of it.

Functions are inlined there and loops have bounds, so the scalars of a kernel are computed for all programs of a launch
at once, from the launch's own arguments: no names, no guesses. A bound or a branch that depends on what is read from memory is
an error that names its line. Programs that go the same way are one `Path` with their share of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .intermediate import Operation, Source, UnknownControlError, named, operations, parse
from .scalars import Scalars


class Path(NamedTuple):
    """The way of some of a launch's programs: their share of all, turns by the loop's source, and where they come to."""

    weight: float
    turns: dict[Source, int]
    held: dict[Source, frozenset[Source]]  # what every loop holds
    live: frozenset[Source]  # everything that these programs execute
    known: frozenset[Source]  # everything in the kernel
    shared: frozenset[Source]  # what stands outside all branches and loops
    regions: tuple[tuple[Source, frozenset[Source]], ...]  # (a branch that is taken, what stands there alone)

    def loop_of(self, source: Source, inside: Sequence[Source]) -> Source:
        """The loop that machine code of this source, holding code `inside`, was made of. Where the compiler lost part of a
        branch's chain of calls, what the loop holds tells which it is.

        Raises:
            UnknownControlError: the kernel has no such loop, or several.
        """
        if source in self.turns:
            return source
        alike = {loop: sum(x in held for x in inside) for loop, held in self.held.items() if loop[: len(source)] == source}
        best = [loop for loop, count in alike.items() if count == max(alike.values()) > 0]
        if len(best) != 1:
            found = f"where the kernel has {len(best)} such loops"
            raise UnknownControlError(f"machine code loops at {named(source)}, {found}; Triton 3.6 drops the callers of a line")
        return best[0]

    def is_dead(self, source: Source) -> bool:
        """Whether something belongs to what these programs do not come to."""
        return source in self.known and source not in self.live

    def is_live(self, source: Source) -> bool:
        """Whether something belongs to a branch or a loop that these programs come to."""
        return source in self.live and source not in self.shared


def paths(ttir: str, values: Sequence, programs: int) -> list[Path]:
    """The ways that the programs of a launch take, with their shares.

    Args:
        ttir: Triton's intermediate code of the kernel.
        values: of the kernel's arguments, flat, as far as they are integers; others are None.
        programs: how many there are.

    Raises:
        UnknownControlError: a loop or branch depends on what is not known; the arguments are not those of the kernel.
    """
    arguments, body = parse(ttir)
    if len(arguments) != len(values):
        raise UnknownControlError(f"the kernel has {len(arguments)} arguments ({', '.join(arguments)}), not {len(values)}")
    scalars = Scalars(programs)
    scalars.run(body, dict(zip(arguments, values, strict=True)))
    table = np.stack([scalars.all_programs(record.values) for record in scalars.records] or [np.zeros(programs, int)])
    kinds, counts = np.unique(table, axis=1, return_counts=True)
    return [_path(body, scalars.records, kinds[:, n], count / programs) for n, count in enumerate(counts)]


def _path(body: list[Operation], records: list, column: np.ndarray, weight: float) -> Path:
    """The path of programs with the values `column` of all records."""
    entries: dict[int, set[int]] = {}
    for record, value in zip(records, column, strict=False):
        if value >= 0:  # negative where the program does not come there
            entries.setdefault(id(record.operation), set()).add(int(value))
    loops = [op for op in operations(body) if op.name == "scf.for"]
    turns: dict[Source, int] = {}
    for operation in loops:
        here = entries.get(id(operation), set())
        before = {turns[operation.source]} if turns.get(operation.source) else set()
        if len(here | before) > 1:
            raise UnknownControlError(
                f"the loop at {named(operation.source)} turns {sorted(here | before)} times in one program"
            )
        turns[operation.source] = max(here | before, default=0)
    live, known, regions = set(), set(), []
    _spread(body, entries, True, live, known, regions)
    shared = frozenset(op.source for op in body if not op.regions or op.name.startswith("tt."))
    alone = tuple((source, frozenset(own - shared)) for source, own in regions)
    held = {op.source: frozenset(x.source for x in operations(op.regions[0])) for op in loops}
    return Path(weight, turns, held, frozenset(live), frozenset(known), shared, alone)


def _spread(body, entries, alive: bool, live: set, known: set, regions: list) -> None:
    """Fills what is executed, what there is, and the branches that are taken with what stands in each."""
    for op in body:
        known.add(op.source)
        if alive:
            live.add(op.source)
        for number, region in enumerate(op.regions):
            inside = alive
            if op.name == "scf.for":
                inside = alive and any(entries.get(id(op), ()))
            elif op.name == "scf.if":
                inside = alive and (1 - number) in entries.get(id(op), ())
                own: set[Source] = set()
                _spread(region, entries, inside, own, set(), [])
                if inside:
                    regions.append((op.source, own))
            _spread(region, entries, inside, live, known, regions)
