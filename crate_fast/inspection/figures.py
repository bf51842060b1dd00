"""The papers' figures: rates and sparsity over layers, and attention maps head by head."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files import drawable, write_atomically

DPI = 120
LETTERS = 11  # of a title, in an inch
COLOUR_MAP = "inferno"
IMAGE = "image"  # among the panels of maps
PANEL = 2.6  # inches of the longer side of a panel of maps
LEAST_SIDE = 448  # pixels of the shorter side of a picture that nobody has to enlarge to see its patches
APART = 0.05  # of a layer, between the marks before and after its MSSA
COLOUR_SHARE = 0.6  # of a map's colours in an overlay; the rest is the image


def plot_rates(measured: dict[str, list[dict]], path: Path, what: str = "") -> None:
    """Draws R^c before and after each layer's MSSA, mean and deviation over images, at `path`.

    Args:
        measured: by label, the rows of `Measures.rows`.
        path: the file, *.png or *.pdf.
        what: the models are, in words, where all are the same.
    """
    figure, axes = _figure_over_layers(measured)
    for label, rows, colour in _coloured(measured):
        before = {"color": colour, "marker": "o", "shift": -APART}
        after = {"color": colour, "marker": "^", "linestyle": "--", "markerfacecolor": "white", "shift": APART}
        _plot(axes, rows, "subspace_rate", f"{label}: $R^c(Z^\\ell)$, before MSSA", **before)
        _plot(axes, rows, "compressed_rate", f"{label}: $R^c(Z^{{\\ell+1/2}})$, after", **after)
    axes.set(
        title=_across_layers("Coding rate", what), ylabel=r"$R^c$ [SSA block] in nats"
    )  # not from 0: MSSA takes off little
    _finish(figure, axes, path)


def plot_sparsity(measured: dict[str, list[dict]], path: Path, what: str = "") -> None:
    """Draws the share of entries that are not zero after each layer's ISTA; as `plot_rates`."""
    figure, axes = _figure_over_layers(measured)
    for label, rows, colour in _coloured(measured):
        _plot(axes, rows, "nonzero", label, color=colour, marker="s")
    axes.set(title=_across_layers("Non-zero entries", what), ylabel="share of non-zero entries [ISTA block]")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    _finish(figure, axes, path)


def _across_layers(quantity: str, what: str) -> str:
    return f"{quantity} across layers" + (f" of {what}" if what else "")


def _figure_over_layers(measured: dict[str, list[dict]]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    axes.set_xlabel(r"layer $\ell$")
    axes.set_xlim(0.5, max(len(rows) for rows in measured.values()) + 0.5)
    return figure, axes


def _coloured(measured: dict[str, list[dict]]):
    from matplotlib import colormaps

    for index, (label, rows) in enumerate(measured.items()):
        yield (
            drawable(label),
            rows,
            colormaps["tab10"](index % 10) if len(measured) <= 10 else colormaps["viridis"](index / len(measured)),
        )


def _plot(axes, rows: list[dict], name: str, label: str, shift: float = 0.0, **style) -> None:
    layers = [row["layer"] + shift for row in rows]
    means, deviations = ([row[f"{name}_{kind}"] for row in rows] for kind in ("mean", "std"))
    axes.errorbar(layers, means, yerr=deviations, label=label, capsize=4, linewidth=1.8, markersize=6, **style)


def _finish(figure, axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def plot_heads(image: Tensor, maps: Tensor, numbers: list[int], title: str, path: Path) -> None:
    """Draws the image, the mean of its heads' maps, and every head's map with its scale in percent, as one PNG at `path`.

    Args:
        image: (height, width, 3 or 1) uint8.
        maps: (heads, rows, columns), at least 0.
        numbers: the heads' numbers, to print.
        title: above all.
        path: the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, Callable]] = [
        (IMAGE, lambda axes: axes.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)),
        ("mean of the heads", lambda axes: axes.imshow(100 * maps.mean(0).numpy(), cmap=COLOUR_MAP, interpolation="nearest")),
    ]
    for number, one in zip(numbers, maps, strict=True):
        panels.append(
            (f"head {number}", lambda axes, one=one: axes.imshow(100 * one.numpy(), cmap=COLOUR_MAP, interpolation="nearest"))
        )
    columns = _columns(len(panels))
    lines = math.ceil(len(panels) / columns)
    height, width = image.shape[:2]
    panel = PANEL * min(1, max(0.4, width / height)), PANEL * min(1, max(0.4, height / width))
    size = columns * (panel[0] + 0.5) + 0.3, lines * (panel[1] + 0.3) + 0.4
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places:
        axes.axis("off")
    for axes, (name, draw) in zip(places, panels, strict=False):
        drawn = draw(axes)
        if name != IMAGE:
            bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, ticks=MaxNLocator(3), format="%.3g")
            bar.ax.tick_params(labelsize=8)
        axes.set_title(name, fontsize="small")
    figure.suptitle(textwrap.fill(drawable(f"{title}, in %"), int(LETTERS * size[0])), fontsize="medium")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _columns(panels: int) -> int:
    """Of 3 to 6 columns those that leave the fewest places empty; the fewer the better."""
    return min(range(3, 7), key=lambda columns: (-panels % columns, columns)) if panels > 5 else panels


def coloured(one: Tensor) -> Tensor:
    """A map (rows, columns) in colours, its least to its greatest: (rows, columns, 3) uint8."""
    from matplotlib import colormaps

    low, high = one.min(), one.max()
    levels = (one - low) / (high - low) if high > low else torch.zeros_like(one)
    return torch.from_numpy(colormaps[COLOUR_MAP](levels.numpy())[..., :3] * 255).round().byte()


def blend(pixels: Tensor, colours: Tensor) -> Tensor:
    """Both (height, width, 3) uint8: the colours over the pixels."""
    return pixels.float().lerp(colours.float(), COLOUR_SHARE).round().byte()


def enlarged(patches: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(rows, columns, channels) to (height, width, channels), every patch filled with its value."""
    return patches.repeat_interleave(patch_size[0], dim=0).repeat_interleave(patch_size[1], dim=1)


def save_picture(pixels: Tensor, path: Path, times: int | None = None) -> None:
    """Writes (height, width, 3 or 1) uint8 to `path` as PNG, each pixel `times` as wide and high; None: as often as gives the
    shorter side `LEAST_SIDE` pixels."""
    from PIL import Image

    times = times or math.ceil(LEAST_SIDE / min(pixels.shape[:2]))
    image = Image.fromarray(enlarged(pixels, (times, times)).squeeze(-1).numpy())
    write_atomically(path, lambda file: image.save(file, format="PNG"))
