"""The curves of a run."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.save_load import write_atomically
from ..optional import require
from ..files import drawable


def plot_curves(rows: list[dict], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs, in training and on the test split, as a PNG at `path`.

    `rows` are those of metrics.jsonl.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    steps_per_epoch = rows[-1]["step"] / rows[-1]["epoch"] if rows else 1  # all of its lines may be damaged
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    for split, label, colour in (("train", "training (augmented)", "tab:blue"), ("test", "test", "tab:orange")):
        chosen = [row for row in rows if row["split"] == split]
        epochs = [row["step"] / steps_per_epoch for row in chosen]
        style = {"label": label, "color": colour, "linewidth": 1.8, "marker": "o", "markersize": 2.5}
        loss_axes.plot(epochs, [row["loss"] for row in chosen], **style)
        top1_axes.plot(epochs, [100 * row["top1"] for row in chosen], **style)
    loss_axes.set(title="loss", xlabel="epoch", ylabel="cross-entropy (in training with label smoothing)", ylim=(0, None))
    top1_axes.set(title="accuracy", xlabel="epoch", ylabel="top-1 accuracy in %", ylim=(0, 101))
    for axes in (loss_axes, top1_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(drawable(title))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
