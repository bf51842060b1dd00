"""Results that people can read: a table in the terminal, pictures, the README's table, and what changed between two runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from crate_fast.files import write_atomically
from pictures import CHECKOUT, groups, plot, title

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- results: made by `python benchmarks/run.py --report` -->", "<!-- end of results -->"
SCHEMA = 1
_NAMES = {"suite", "what", "size", "batch", "dtype", "peer", "mode"}
OURS = {"crate_fast": "", "crate_fast cpu kernels": ", kernels for CPUs"}
NOISE = 1.05
"""A difference of medians within 5%, or within both runs' quartiles, is noise."""


def kind(mode: str) -> str:
    """What a mode is compared within: "eager", or "compiled" for all that torch.compile or a graph prepares."""
    return "eager" if mode == "eager" else "compiled"


def print_rows(result: dict) -> None:
    """The table of a run in the terminal."""
    machine = result["machine"]
    print(f"\n{machine['device']}; torch {machine['torch']}, triton {machine['triton']}, commit {str(machine['commit'])[:10]}")
    for dtype, limit in result["ceilings"].items():
        product, copy = limit["flops_per_second"] / 1e12, limit["bytes_per_second"] / 1e9
        print(f"ceilings measured in this run, {dtype}: product {product:.3g} TFLOP/s, copy {copy:.3g} GB/s")
    for name, rows in groups(result["rows"]).items():
        baseline = next((r for r in rows if r["peer"] == "published" and r["mode"] == "eager" and "ms" in r), None)
        print(f"\n{name}")
        header = f"{'ms':>9} {'q1':>8} {'q3':>8} {'images/s':>10} {'speed-up':>9} {'of floor':>9} {'peak MB':>8} {'kept MB':>8}"
        print(f"  {'peer':20} {'mode':16} {header} {'compile s':>9}  error")
        for row in rows:
            print(f"  {row['peer']:20} {row['mode']:16} {_cells(row, baseline)}")


def _cells(row: dict, baseline: dict | None) -> str:
    if "reason" in row:
        return f"not measured: {row['reason']}"
    speed_up = f"{baseline['ms'] / row['ms']:8.2f}×" if baseline else f"{'':9}"
    errors = " / ".join(f"{error:.1e}" for error in row["errors"]) or "another function"
    return (
        f"{row['ms']:9.2f} {row['ms_q1']:8.2f} {row['ms_q3']:8.2f} {row['images_per_second']:10,.1f} {speed_up} "
        f"{row['fraction_of_floor']:8.0%}  {_megabytes(row['peak_bytes'])} {_megabytes(row['kept_bytes'])} "
        f"{'' if row['compile_seconds'] is None else format(row['compile_seconds'], '.1f'):>9}  {errors}"
    )


def _megabytes(size: int | None) -> str:
    return f"{'':8}" if size is None else f"{size / 1e6:8,.0f}"


def table(result: dict) -> str:
    """The README's table: inference and training, the published class itself and crate_fast, eager and compiled and with its
    kernels for CPUs, at the largest batch, and how many times as fast at others; without rows where it was not measured beside,
    since our transcription of it is slower in training."""
    lines = ["| | published class | crate_fast | | other batches |", "|---|---|---|---|---|"]
    for suite, what in (("inference", "inference"), ("train", "training step")):
        rows = [row for row in result["rows"] if row["suite"] == suite and "ms" in row]
        published = {(_case(row), row["batch"]): row for row in rows if row["peer"] == CHECKOUT}
        cases: dict[tuple, dict[int, tuple[dict, dict]]] = {}
        for row in rows:
            beside = published.get((_case(row), row["batch"]))
            if row["peer"] in OURS and beside:
                cases.setdefault((*_case(row), OURS[row["peer"]]), {})[row["batch"]] = beside, row
        lines += [_line(what, *case, by_batch) for case, by_batch in cases.items()]
    return "\n".join(lines)


def _case(row: dict) -> tuple[str, str, str]:
    return row["size"], row["dtype"], row["mode"]


def _line(what: str, size: str, dtype: str, mode: str, kernels: str, by_batch: dict[int, tuple[dict, dict]]) -> str:
    """A row of the table from (published, ours) of every batch."""
    most = max(by_batch)
    speeds = [f"{row['images_per_second']:,.1f} images/s" for row in by_batch[most]]
    times = {batch: f"{published['ms'] / ours['ms']:.2f}×" for batch, (published, ours) in sorted(by_batch.items())}
    others = ", ".join(f"{batch}: {faster}" for batch, faster in times.items() if batch != most)
    name = f"CRATE-{size}, {what}, batch {most}, {dtype}, {mode}{kernels}"
    return f"| {name} | {speeds[0]} | {speeds[1]} | **{times[most]}** | {others} |"


def section(folder: Path) -> str:
    """What stands between the README's markers: for every device the published class was measured on, table and picture."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "ceilings" not in result or not any(row["peer"] == CHECKOUT for row in result["rows"]):
            continue  # not a result of run.py, or without the published class itself
        machine = result["machine"]
        parts.append(f"{machine['device']} (torch {machine['torch']}; `benchmarks/results/{path.name}`):\n\n{table(result)}")
        picture = path.with_suffix("") / "speed.png"
        if picture.exists():
            parts.append(f"![images a second](benchmarks/results/{path.stem}/speed.png)")
    return "\n\n".join(parts)


def update_readme(folder: Path) -> int:
    """Writes the pictures of every results file again, and the README's section; the exit status."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "ceilings" in result:
            plot(result, path.with_suffix(""))
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        print(f"run.py: error: {README.name} has no place for results: {START} … {END}", file=sys.stderr)
        return 2
    made = section(folder)
    if not made:
        print("run.py: error: nothing was measured beside the published class itself (--published DIR)", file=sys.stderr)
        return 2
    before, after = text.split(START)[0], text.split(END)[1]
    write_atomically(README, lambda file: file.write(f"{before}{START}\n\n{made}\n\n{END}{after}".encode()))
    print(f"{README.name}: results as in {', '.join(p.name for p in sorted(folder.glob('*.json')))}")
    return 0


def compare(old_path: Path, new_path: Path) -> int:
    """Prints what became slower or faster between two results files; 1: something became slower, 2: they do not compare."""
    try:
        files = [_read_rows(path) for path in (old_path, new_path)]
    except ValueError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    old, new = ({(title(r), r["peer"], r["mode"]): r for r in rows if "ms" in r} for rows in files)
    if not set(old) & set(new):
        print(f"run.py: error: {old_path} and {new_path} have no measurement in common", file=sys.stderr)
        return 2
    changes = [(key, old[key], new[key]) for key in new if key in old and _differs(old[key], new[key])]
    for key, a, b in sorted(changes, key=lambda change: change[1]["ms"] / change[2]["ms"]):
        verdict = "slower" if b["ms"] > a["ms"] else "faster"
        print(f"{verdict}: {', '.join(key)}: {a['ms']:.2f} ms to {b['ms']:.2f} ms ({b['ms'] / a['ms']:.2f} times)")
    lost = [key for key in old if key not in new]
    for key in lost:
        print(f"no longer measured: {', '.join(key)}")
    print(f"{len(set(old) & set(new))} rows compared, {len(changes)} differ outside the noise")
    return 1 if any(b["ms"] > a["ms"] for _, a, b in changes) else 0


def _read_rows(path: Path) -> list[dict]:
    """The rows of a results file; ValueError, naming the file, if it is none or of another schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path} is no results file of schema {SCHEMA}")
    if not all(isinstance(row, dict) and set(row) >= _NAMES for row in result["rows"]):
        raise ValueError(f"{path} has rows that do not say what was measured ({', '.join(sorted(_NAMES))})")
    return result["rows"]


def _differs(a: dict, b: dict) -> bool:
    slow, fast = max(a, b, key=lambda row: row["ms"]), min(a, b, key=lambda row: row["ms"])
    return slow["ms"] > NOISE * fast["ms"] and slow["ms_q1"] > fast["ms_q3"]
