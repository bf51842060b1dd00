"""Results as pictures: speed and memory by workload, speed-up by batch, and how far from the ceilings everything is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from crate_fast.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "crate_fast"
CHECKOUT = "published checkout"  # the peer that is the published class itself
WIDTH = 10  # inches
BAR, GAP, AROUND = 0.24, 0.5, 0.75  # inches that a bar takes; bars between peers; inches of a panel without bars
LINE = 0.19  # inches between labels of the roofline
MOST_POINTS = 24  # in a roofline of all rows


def title(row: dict) -> str:
    """A row's workload in words."""
    what = row["what"] if row["what"] in ("inference", "train") else f"{row['suite']}: {row['what']}"
    return f"{what}, CRATE-{row['size']}, batch {row['batch']}, {row['dtype']}"


def groups(rows: Iterable[dict], name: Callable[[dict], str] = title) -> dict[str, list[dict]]:
    """Rows by workload, or by another `name`, in order."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def largest(rows: list[dict], suite: str) -> list[dict]:
    """Rows of a suite at the largest batch of every size and dtype."""
    chosen = [row for row in rows if row["suite"] == suite]
    most: dict[tuple, int] = {}
    for row in chosen:
        key = row["size"], row["dtype"]
        most[key] = max(most.get(key, 0), row["batch"])
    return [row for row in chosen if row["batch"] == most[row["size"], row["dtype"]]]


def plot(result: dict, folder: Path) -> list[Path]:
    """Writes the pictures of all rows of a results file to `folder`, and returns their paths; what has no rows has none."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "ms" in row]
    drawn = []
    for name, draw in {"speed": _draw_speed, "batch": _draw_batch, "roofline": _draw_roofline, "memory": _draw_memory}.items():
        figure = Figure(figsize=(WIDTH, 5.5), dpi=120, layout="constrained")
        if not draw(figure, rows, result):
            continue
        figure.suptitle(f"{result['machine']['device']}; torch {result['machine']['torch']}", fontsize=10)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        write_atomically(path, lambda file, figure=figure: figure.savefig(file, format="png"))
        drawn.append(path)
    return drawn


def _draw_speed(figure: Figure, rows: list[dict], _) -> bool:
    chosen = largest(rows, "inference") + largest(rows, "train")
    return _draw_bars(figure, chosen, lambda row: row["images_per_second"], "images a second: more is better", "{:,.4g}")


def _draw_memory(figure: Figure, rows: list[dict], _) -> bool:
    chosen = [row for row in largest(rows, "train") if row["kept_bytes"]]
    return _draw_bars(figure, chosen, lambda row: row["kept_bytes"] / 1e6, "kept for backward, MB: less is better", "{:,.0f}")


def _draw_bars(figure: Figure, rows: list[dict], value: Callable[[dict], float], label: str, form: str) -> bool:
    """A panel for each workload; in it the peers, and of each a bar for each mode."""
    if not rows:
        return False
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    panels = groups(rows)
    columns = math.ceil(len(panels) / math.ceil(len(panels) / min(3, math.ceil(len(panels) / 4))))
    heights = [AROUND + BAR * (len(some) + GAP * len(groups(some, _peer))) for some in panels.values()]
    heights = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    figure.set_size_inches(WIDTH * (0.3 + 0.7 * columns), 0.8 + sum(heights))
    places = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flatten()
    shown: dict[str, object] = {}
    for axes, (name, some) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, some, modes, value, form, shown)
        axes.set_title(name, fontsize=10, loc="left", fontweight="bold")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes in places[len(panels) - columns : len(panels)]:
        axes.set_xlabel(label)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, fontsize=9)
    return True


def _draw_panel(axes, rows: list[dict], modes: list[str], value: Callable[[dict], float], form: str, shown: dict) -> None:
    place, middles = 0.0, {}
    for peer, some in groups(rows, _peer).items():
        places = [place + nth for nth in range(len(some))]
        for at, row in zip(places, some, strict=True):
            bars = axes.barh(at, value(row), height=0.9, color=_colour(row, modes))
            axes.bar_label(bars, labels=[form.format(value(row))], padding=3, fontsize=9)
            shown.setdefault(f"{OURS if peer == OURS else 'others'}, {row['mode']}", bars)
        middles[peer] = sum(places) / len(places)
        place = places[-1] + 1 + GAP
    axes.set_yticks(list(middles.values()), list(middles), fontsize=9)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() == OURS else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, max(map(value, rows)) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _peer(row: dict) -> str:
    return row["peer"]


def _colour(row: dict, modes: list[str]):
    """Ours in orange, others in blue; the darker, the earlier its mode is."""
    from matplotlib import colormaps

    share = modes.index(row["mode"]) / max(1, len(modes) - 1)
    return colormaps["Oranges" if row["peer"] == OURS else "Blues"](0.75 - 0.35 * share)


def _draw_batch(figure: Figure, rows: list[dict], _) -> bool:
    """Speed-up over the published code as it comes, by batch: a panel for each size and dtype."""
    panels = _speed_ups([row for row in rows if row["suite"] == "inference"])
    if not panels:
        return False
    peers = list(dict.fromkeys(peer for lines in panels.values() for peer, _ in lines))
    modes = list(dict.fromkeys(mode for lines in panels.values() for _, mode in lines))
    columns = min(3, len(panels))
    lines_of_panels = math.ceil(len(panels) / columns)
    figure.set_size_inches(max(WIDTH, 3 + 4 * columns), 1 + 4 * lines_of_panels)
    places = figure.subplots(lines_of_panels, columns, squeeze=False).flatten()
    shown: dict[str, object] = {}
    for axes, (name, lines) in zip(places, panels.items(), strict=False):
        for (peer, mode), points in lines.items():
            nth = modes.index(mode)
            style = {"marker": "osD^vP"[nth % 6], "linestyle": ("-", "--", ":", "-.")[nth % 4], "linewidth": 1.5}
            style |= {"markerfacecolor": "none", "markeredgewidth": 2} if nth else {}
            style |= {"color": f"C{peers.index(peer)}"} | ({"linewidth": 3, "markersize": 9} if peer == OURS else {})
            (line,) = axes.plot(*zip(*sorted(points), strict=True), **style)
            shown.setdefault(f"{peer}, {mode}", line)
        batches = sorted({batch for points in lines.values() for batch, _ in points})
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="batch", title=f"inference, {name}", ylim=(0, None))
        axes.set_xticks(batches, map(str, batches))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    places[0].set_ylabel("times as fast as published, eager")
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=9)
    return True


def _speed_ups(rows: list[dict]) -> dict[str, dict[tuple[str, str], list[tuple[int, float]]]]:
    """By size and dtype, by (peer, mode): batches, and how many times as fast as the published class, eager, or where that was
    not measured as our transcription of it."""
    panels: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for group in groups(rows).values():
        eager = {row["peer"]: row for row in group if row["mode"] == "eager"}
        baseline = eager.get(CHECKOUT, eager.get("published"))
        for row in group:
            if baseline and row is not baseline:
                lines = panels.setdefault(f"CRATE-{row['size']}, {row['dtype']}", {})
                lines.setdefault((row["peer"], row["mode"]), []).append((row["batch"], baseline["ms"] / row["ms"]))
    return panels


def _draw_roofline(figure: Figure, rows: list[dict], result: dict) -> bool:
    """Every row of crate_fast by its arithmetic intensity, under the ceiling of its dtype, which was measured with it; of many
    rows those of the largest batches."""
    chosen = [row for row in rows if row["peer"] == OURS and row["mode"] == "eager" and row["dtype"] in result["ceilings"]]
    if len(chosen) > MOST_POINTS:
        chosen = [row for suite in dict.fromkeys(row["suite"] for row in chosen) for row in largest(chosen, suite)]
    if not chosen:
        return False
    panels = groups(chosen, lambda row: row["dtype"])
    heights = [max(4.5, 1 + LINE * len(some)) for some in panels.values()]
    figure.set_size_inches(WIDTH, 1 + sum(heights))
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    whats = list(dict.fromkeys(_operation(row) for row in chosen))
    for axes, height, (dtype, some) in zip(places, heights, panels.items(), strict=True):
        axes.set(xscale="log", yscale="log", ylabel="TFLOP/s reached")
        points = sorted(
            ((row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9, row) for row in some), key=lambda p: p[1]
        )
        ridge = _draw_ceiling(axes, dtype, result["ceilings"][dtype])
        intensities, reached = ([*each] for each in zip(ridge, *(point[:2] for point in points), strict=True))
        axes.set(xlim=(min(intensities) / 3, max(intensities) * 2), ylim=(min(reached) / 1.5, max(reached) * 1.5))
        _draw_points(axes, points, whats, min(1 / len(points), LINE / (height - 0.8)))
        _label_plainly(axes)
    places[-1].set_xlabel("flops a byte (of the unavoidable work)")
    return True


def _draw_ceiling(axes, dtype: str, limit: dict) -> tuple[float, float]:
    """What the device does at best; where the two limits meet."""
    peak, rate = limit["flops_per_second"] / 1e12, limit["bytes_per_second"] / 1e12
    ends = [1e-3, peak / rate, 1e7]
    axes.plot(ends, [min(peak, i * rate) for i in ends], linewidth=2, color="0.35")
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
    axes.annotate(f"ceiling, {dtype}: {peak:.3g} TFLOP/s", (0.99, peak), fontsize=9, color="0.35", **place)
    return peak / rate, peak


def _draw_points(axes, points: list[tuple[float, float, dict]], whats: list[str], step: float) -> None:
    """Points and their names, which stand in a column beside in the order of height, `step` of the axes' height apart."""
    for nth, (at, much, row) in enumerate(points):
        kind = whats.index(_operation(row))
        colour, name = f"C{kind % 10}", f"{row['what']}, {row['size']}, batch {row['batch']}"
        axes.scatter(at, much, color=colour, marker="osD^vPX*"[kind % 8], s=50, zorder=3)
        line = {"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8, "relpos": (0, 0.5)}
        place = {"xytext": (1.04, 0.5 + (nth - (len(points) - 1) / 2) * step), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(f"{much:.3g}: {name}", (at, much), fontsize=8, color=colour, arrowprops=line, **place)


def _label_plainly(axes) -> None:
    """Ticks at 1, 2 and 5 of each power of ten, as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _operation(row: dict) -> str:
    """What has a colour of its own: an operation in all directions, inference, training."""
    return row["what"].split(" ")[0]
