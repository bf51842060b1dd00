"""What one call of `gpu.py` leaves for the next, on whatever machine: three files in one folder.

`results.json` has a record of every step that was run, with its rows and its last lines; `shapes.json` the measured shapes;
`kernels.tar.xz` Triton's cache. Each is written in one step, so that what is killed leaves what it had.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from crate_fast.files import write_atomically
from report import SCHEMA
from run import file_name, merge

from .cache import kernels, pack, unpack
from .queue import Step

ROOT = Path(__file__).parents[2]
LAUNCHERS = (
    "backend.py", "cpu_attention.py", "cpu_kernels.py", "cpu_products.py", "functional.py", "operators.py", "ranges.py",
    "reference.py", "reference_alpha.py", "model/*.py", "modules/*.py",
)  # fmt: skip
"""The files of crate_fast that decide which kernels are launched, and how, and the mathematics they are held to."""
DONE = ("passed", "unavailable")
"""Outcomes that are not tried again: measured, or it needs something that is not there."""
SHAPES = "tuning.json"
VERSIONS = ("device", "driver", "python", "torch", "triton", "commit", "changed_files")


def digest() -> str:
    """Of the kernels and what launches them: parity, and every time, is about these and not about the benchmarks."""
    found = hashlib.sha256()
    launchers = (file for pattern in LAUNCHERS for file in (ROOT / "crate_fast").glob(pattern))
    for file in sorted((*(ROOT / "kernels").glob("*.py"), *launchers)):
        found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


class State:
    """Results and caches, read from a folder and kept there.

    Parity holds for all GPUs of one architecture, since they run the same machine code; times are a device's own.
    """

    def __init__(self, folder: Path, scratch: Path, facts: dict) -> None:
        """facts: of the machine, with "device", "architecture", "torch", "triton"; scratch: a folder that may be lost."""
        self.folder, self.cache, self.shapes = folder, scratch / "triton", scratch / "shapes"
        folder.mkdir(parents=True, exist_ok=True)
        self.shapes.mkdir(parents=True, exist_ok=True)
        self.facts, self.sources = facts, digest()
        path = folder / "results.json"
        self.records = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
        unpack(folder / "kernels.tar.xz", self.cache)
        if (folder / "shapes.json").exists():
            shutil.copy(folder / "shapes.json", self.shapes / SHAPES)
        self._packed = kernels(self.cache) if (folder / "kernels.tar.xz").exists() else set()

    def record_of(self, name: str) -> dict | None:
        """The newest record of a step that is about these kernels and this machine."""
        for record in reversed(self.records):
            same = record["sources"] == self.sources and record["step"] == name
            if same and all(record[key] == self.facts[key] for key in self._identity(record["kind"])):
                return record
        return None

    @staticmethod
    def _identity(kind: str) -> tuple[str, ...]:
        where = "architecture" if kind in ("parity", "tests", "precision") else "device"
        return where, "torch", "triton"

    def outcome(self, name: str) -> str:
        """ "" for a step that is yet to be run."""
        return (self.record_of(name) or {"outcome": ""})["outcome"]

    def waits_for(self, step: Step) -> list[str]:
        """What has not passed of that without which the step is not run."""
        return [name for name in step.needs if self.outcome(name) != "passed"]

    def add(self, step: Step, record: dict) -> None:
        """Writes a step's record, what it has compiled and the shapes it has measured."""
        same = {"step": step.name, "kind": step.kind, "sources": self.sources, **self.facts}
        replaced = self.record_of(step.name)
        self.records = [old for old in self.records if old is not replaced] + [same | record]
        if (self.shapes / SHAPES).exists():
            _write(self.folder / "shapes.json", (self.shapes / SHAPES).read_bytes())
        compiled = kernels(self.cache)
        if compiled - self._packed:
            pack(self.cache, self.folder / "kernels.tar.xz")
            self._packed = compiled
        _write(self.folder / "results.json", (json.dumps({"schema": 1, "records": self.records}, indent=1) + "\n").encode())


def publish(state: Path, results: Path) -> list[Path]:
    """Adds the rows of a state to the results file of each device, as `run.py` does; the files."""
    records = json.loads((state / "results.json").read_text(encoding="utf-8"))["records"]
    files = []
    for device in sorted({record["device"] for record in records}):
        own = [record for record in records if record["device"] == device]
        rows = [row | {"versions": {key: r.get(key) for key in VERSIONS}} for r in own for row in r["rows"] if "batch" in row]
        limits = {row["dtype"]: row["ceiling"] for row in rows}
        path = results / f"{file_name(device)}.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        new = {"schema": SCHEMA, "machine": {key: own[-1].get(key) for key in VERSIONS}, "ceilings": limits, "rows": rows}
        _write(path, (json.dumps(merge(old, merge(None, new)), indent=1) + "\n").encode())
        files.append(path)
    return files


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
