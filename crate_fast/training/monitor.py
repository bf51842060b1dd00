"""Watching a run: scalars for TensorBoard, a trace of a few steps, and the part of a device's peak that is used."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from ..device import Compute
from ..errors import InspectionError
from ..files import drawable, write_atomically
from ..inspection.rates import measure_layers
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..model.transformer import layers_of
from ..optional import require
from ..settings import MachineSettings, RunSettings
from .checkpoints import SavingError
from .run_directory import RunDirectory

SKIPPED, WARMED, TRACED = 3, 2, 3  # steps: before anything, with the profiler on but not kept, kept
NO_SCALARS = ("split", "step")
MEASURES = {
    "subspace_rate": "$R^c$ before attention, in nats",
    "compressed_rate": "$R^c$ after attention, in nats",
    "nonzero": "share of non-zero entries after ISTA",
    "rate": "$R$ of all tokens, in nats",
}
# Dense 16-bit products as the vendor states them, in TFLOP/s; the first name that is part of the device's counts.
PEAKS = {
    **{"B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0},
    **{"L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0, "RTX A6000": 155.0},
}


def training_flops(model: CRATE | CRATEMAE) -> float:
    """Flops of the products of one image's forward and backward pass, the usual numerator of model-flops utilisation.

    Three times those forward: the embedding, in a layer two projections, two products of attention and the step of
    sparsification, ISTA as the one product h M, the head. What the tied attention's symmetry saves is not taken off.
    """
    if isinstance(model, CRATEMAE):
        return 6.0 * model.flops()
    tokens, dim = model.pos_embedding.shape[1:]
    patch = model.channels * math.prod(model.patch_size)
    head: Any = model.mlp_head[1]
    total = (tokens - 1) * patch * dim + dim * head.out_features
    total += sum(layer.flops(tokens) for layer in layers_of(model.transformer))
    return 6.0 * total


def peak_flops(settings: MachineSettings, compute: Compute) -> float | None:
    """Flops a second that a device can make at most: as --peak-tflops says, or for a known GPU in 16 bit; else None."""
    if settings.peak_tflops:
        return 1e12 * settings.peak_tflops
    if compute.device.type != "cuda" or compute.precision == "float32":  # how float32 multiplies is not for its name to say
        return None
    return next((1e12 * peak for name, peak in PEAKS.items() if name in compute.describe()), None)


WATCHED = 32  # test images, of which rates are measured


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Errors of the system in other threads, which their owners are told of, are not printed besides."""
    before = threading.excepthook

    def tell(happened: threading.ExceptHookArgs) -> None:
        if not issubclass(happened.exc_type, OSError):
            before(happened)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


class Monitor:
    """What `settings` ask for beside metrics.jsonl, in the first process; while entered, it is told of steps and rows."""

    def __init__(self, settings: RunSettings, run: RunDirectory, first: bool, step: int) -> None:
        self._run = run
        self._wants_board = first and settings.tensorboard
        self._wants_trace = first and settings.profile
        self._wants_rates = first and settings.watch_rates
        self._watched = torch.empty(0)
        self._step, self._board, self._profiler = step, None, None

    def __enter__(self) -> Monitor:
        self._stack = ExitStack()
        if self._wants_board:
            from torch.utils.tensorboard import SummaryWriter

            self._stack.enter_context(_quiet_threads())
            with self._naming_the_board():
                # What a killed run wrote after its last checkpoint comes again.
                self._board = SummaryWriter(str(self._run.tensorboard), purge_step=self._step + 1)
        if self._wants_trace:
            plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARMED, active=TRACED, repeat=1)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self._stack.enter_context(self._profiler)
        return self

    def __exit__(self, *error) -> None:
        if self._wants_trace and error[0] is None:
            steps = SKIPPED + WARMED + TRACED
            print(f"crate-fast: warning: no trace: --profile needs {steps} steps, and fewer were left", file=sys.stderr)
        with self._stack:
            if self._board is not None:
                self._close_board(self._board, error[0] is None)

    def _close_board(self, board, tell: bool) -> None:
        """Writes what is left; an error is told where it is the first."""
        try:
            with self._naming_the_board():
                board.close()
        except SavingError:
            if tell:
                raise

    @contextmanager
    def _naming_the_board(self) -> Iterator[None]:
        """Turns an error of the system, which comes from a thread of TensorBoard's, into a line that names its folder."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            words = "--resume goes on from the last checkpoint, with --tensorboard no without it"
            raise SavingError(f"{self._run.tensorboard} cannot be written ({reason}); {words}") from error

    def step(self) -> None:
        """After a step of training."""
        if self._profiler is not None:
            self._profiler.step()

    def row(self, row: dict) -> None:
        """After a line of metrics."""
        if self._board is not None:
            with self._naming_the_board():
                for name, value in row.items():
                    if name not in NO_SCALARS:
                        for place, one in _scalars(name, value):
                            self._board.add_scalar(f"{row['split']}/{place}", one, row["step"])

    def first_of(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The test batches, the first of whose images are remembered where rates are asked for."""
        for images, labels in batches:
            if self._wants_rates and not len(self._watched):
                self._watched = images[:WATCHED].clone()
            yield images, labels

    def rates(self, model: CRATE | CRATEMAE) -> dict[str, list[float]]:
        """By their names the means of `model`'s measures over the images watched, a number for each layer; or nothing."""
        if not len(self._watched):
            return {}
        try:
            measures = measure_layers(model, self._watched)
        except InspectionError:  # not finite, which the loss tells
            return {}
        return {name: values.mean(dim=1).tolist() for name, values in measures._asdict().items()}

    def _write(self, profiler: profile) -> None:
        self._wants_trace = False
        write_atomically(self._run.trace, lambda file: profiler.export_chrome_trace(file.name))


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """A number under its name, or those of layers, each under its own."""
    if not isinstance(value, list):
        return [(name, value)]
    return [(f"{name}/layer-{layer:02}", one) for layer, one in enumerate(value, start=1)]


def plot_watched(rows: list[dict], path: Path, title: str) -> None:
    """Draws rates and sparsity over the layers, a line for each evaluation at which they were measured, as a PNG at `path`.

    `rows` are those of metrics.jsonl; without any measures in them nothing is drawn.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measured = [row for row in rows if all(isinstance(row.get(name), list) for name in MEASURES)]
    if not measured:
        return
    scale = ScalarMappable(Normalize(measured[0]["epoch"], max(measured[-1]["epoch"], measured[0]["epoch"] + 1)), "viridis")
    figure = Figure(figsize=(15, 4.5), dpi=120, layout="constrained")
    places = figure.subplots(1, len(MEASURES))
    for axes, (name, words) in zip(places, MEASURES.items(), strict=True):
        for row in measured:
            colour = colormaps["viridis"](scale.norm(row["epoch"]))
            axes.plot(range(1, len(row[name]) + 1), row[name], color=colour, linewidth=1.6, marker="o", markersize=2.5)
        axes.set(title=words, xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.colorbar(scale, ax=places, label="epoch", ticks=MaxNLocator(integer=True))
    figure.suptitle(drawable(title))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def plot_curves(rows: list[dict], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs, in training and on the test split, as a PNG at `path`.

    `rows` are those of metrics.jsonl.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps_per_epoch = rows[-1]["step"] / rows[-1]["epoch"] if rows else 1  # all of its lines may be damaged
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    tells = all("top1" in row for row in rows)  # a CRATE-MAE has a loss alone
    loss_axes, top1_axes, *_ = [*figure.subplots(1, 1 + tells, squeeze=False)[0], None]
    for split, label, colour in (("train", "training (augmented)", "tab:blue"), ("test", "test", "tab:orange")):
        chosen = [row for row in rows if row["split"] == split]
        epochs = [row["step"] / steps_per_epoch for row in chosen]
        style = {"label": label, "color": colour, "linewidth": 1.8, "marker": "o", "markersize": 2.5}
        loss_axes.plot(epochs, [row["loss"] for row in chosen], **style)
        if top1_axes is None:
            continue
        top1_axes.plot(epochs, [100 * row["top1"] for row in chosen], **style)
    words = "cross-entropy (in training with label smoothing)" if tells else "mean squared error of masked patches"
    loss_axes.set(title="loss", xlabel="epoch", ylabel=words, ylim=(0, None))
    if top1_axes is not None:
        top1_axes.set(title="accuracy", xlabel="epoch", ylabel="top-1 accuracy in %", ylim=(0, 101))
    for axes in filter(None, (loss_axes, top1_axes)):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(drawable(title))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
