"""Results that people can read: a table in the terminal, pictures, the README's table, and what changed between two runs."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from crate_fast.files import write_atomically

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- results: made by `python benchmarks/run.py --report` -->", "<!-- end of results -->"
SCHEMA = 1
_NAMES = {"suite", "what", "size", "batch", "dtype", "peer", "mode"}
CHECKOUT = "published checkout"  # the peer that is the published class itself
SHADES = ("tab:blue", "tab:cyan", "tab:purple", "tab:gray", "tab:olive", "tab:green")  # of peers; ours is orange
NOISE = 1.05
"""A difference of medians within 5%, or within both runs' quartiles, is noise."""


def title(row: dict) -> str:
    """A row's workload in words."""
    what = row["what"] if row["what"] in ("inference", "train") else f"{row['suite']}: {row['what']}"
    return f"{what}, CRATE-{row['size']}, batch {row['batch']}, {row['dtype']}"


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by workload, in order."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(row)
    return found


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


def plot(result: dict, folder: Path) -> list[Path]:
    """Writes the pictures of all rows of a results file to `folder`, and returns their paths; what has no rows has none."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "ms" in row]
    drawn = []
    for name, draw in {"speed": _draw_speed, "batch": _draw_batch, "roofline": _draw_roofline, "memory": _draw_memory}.items():
        figure = Figure(figsize=(10, 5.5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes, rows, result):
            continue
        figure.suptitle(f"{result['machine']['device']}; torch {result['machine']['torch']}", fontsize=9)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        write_atomically(path, lambda file, figure=figure: figure.savefig(file, format="png"))
        drawn.append(path)
    return drawn


def _largest(rows: list[dict], suite: str) -> list[dict]:
    """Rows of a suite at the largest batch of every size and dtype."""
    chosen = [row for row in rows if row["suite"] == suite]
    largest: dict[tuple, int] = {}
    for row in chosen:
        key = row["size"], row["dtype"]
        largest[key] = max(largest.get(key, 0), row["batch"])
    return [row for row in chosen if row["batch"] == largest[row["size"], row["dtype"]]]


def _draw_bars(axes, rows: list[dict], value, label: str, form: str) -> bool:
    if not rows:
        return False
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    values, place, names, labelled = [value(row) for row in rows], 0.0, {}, set()
    for key, group in groupby(rows, key=lambda r: f"{r['what']}, {r['size']}, {r['dtype']}, batch {r['batch']}"):
        axes.text(0, place - 0.65, f" {key}", fontsize=9, weight="bold", va="center")
        for row in group:
            peer, is_compiled = row["peer"], row["mode"] != "eager"
            bar = axes.barh(
                place,
                value(row),
                color="tab:orange" if peer == "crate_fast" else SHADES[peers.index(peer) % len(SHADES)],
                hatch="///" if is_compiled else None,
                edgecolor="white",
                label="_" if peer in labelled else peer,
            )
            labelled.add(peer)
            axes.bar_label(bar, labels=[form.format(value(row))], padding=3, fontsize=8)
            names[place] = f"{peer}, {row['mode']}"
            place += 1
        place += 1.2
    axes.figure.set_size_inches(10, 1.2 + 0.28 * place)
    axes.set_yticks(list(names), names.values(), fontsize=8)
    axes.set(xlabel=f"{label} (hatched: compiled)", xlim=(0, max(values) * 1.15), ylim=(place - 1.4, -1.2))
    axes.legend(fontsize="small", loc="lower right")
    return True


def _draw_speed(axes, rows: list[dict], _) -> bool:
    chosen = _largest(rows, "inference") + _largest(rows, "train")
    return _draw_bars(axes, chosen, lambda row: row["images_per_second"], "images a second", "{:,.4g}")


def _draw_memory(axes, rows: list[dict], _) -> bool:
    chosen = [row for row in _largest(rows, "train") if row["kept_bytes"]]
    return _draw_bars(axes, chosen, lambda row: row["kept_bytes"] / 1e6, "kept for backward, MB", "{:,.0f}")


def _draw_batch(axes, rows: list[dict], _) -> bool:
    """Speed-up over the published code as it comes, by batch."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for group in groups([row for row in rows if row["suite"] == "inference"]).values():
        eager = {row["peer"]: row for row in group if row["mode"] == "eager"}
        baseline = eager.get(CHECKOUT, eager.get("published"))
        for row in group:
            if baseline and row is not baseline:
                name = f"{row['peer']}, {row['mode']} ({row['size']}, {row['dtype']})"
                lines.setdefault(name, []).append((row["batch"], baseline["ms"] / row["ms"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, linewidth=2.5 if "crate_fast" in name else 1.2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="batch", ylabel="inference: times as fast as published, eager", ylim=(0, None))
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=7)
    return bool(lines)


def _draw_roofline(axes, rows: list[dict], result: dict) -> bool:
    """Every row of crate_fast by its arithmetic intensity, under the ceilings measured with it."""
    chosen = [row for row in rows if row["peer"] == "crate_fast" and row["mode"] == "eager"]
    if not chosen:
        return False
    for dtype, limit in result["ceilings"].items():
        peak, rate = limit["flops_per_second"] / 1e12, limit["bytes_per_second"] / 1e12
        intensities = [1, peak / rate, 4096]
        axes.plot(intensities, [min(peak, i * rate) for i in intensities], color="grey", label=f"ceiling, {dtype}")
    for index, row in enumerate(chosen):
        reached = row["flops"] / row["ms"] / 1e9
        name = f"{row['what']}, {row['size']}, batch {row['batch']}, {row['dtype']}"
        axes.scatter(row["flops"] / row["bytes"], reached, marker="osD^vPX*<>hdp8"[index % 14], s=45, label=name, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte (of the unavoidable work)", ylabel="TFLOP/s reached")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return True


def table(result: dict) -> str:
    """The README's table: inference and training at the largest batch, the published class itself and crate_fast, eager and
    compiled; without rows where it was not measured beside, since our transcription of it is slower in training."""
    lines = ["| | published class | crate_fast | |", "|---|---|---|---|"]
    for suite, what in (("inference", "inference"), ("train", "training step")):
        chosen = [row for row in _largest(result["rows"], suite) if "ms" in row]
        for group in groups(chosen).values():
            for mode in dict.fromkeys(row["mode"] for row in group):
                found = {row["peer"]: row for row in group if row["mode"] == mode}
                if {CHECKOUT, "crate_fast"} <= set(found):
                    lines.append(_line(what, mode, found[CHECKOUT], found["crate_fast"]))
    return "\n".join(lines)


def _line(what: str, mode: str, published: dict, ours: dict) -> str:
    name = f"CRATE-{ours['size']}, {what}, batch {ours['batch']}, {ours['dtype']}, {mode}"
    speeds = [f"{row['images_per_second']:,.1f} images/s" for row in (published, ours)]
    return f"| {name} | {speeds[0]} | {speeds[1]} | **{published['ms'] / ours['ms']:.2f}×** |"


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
