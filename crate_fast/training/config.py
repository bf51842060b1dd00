"""What a training run is asked to do: one dataclass, from which the command line takes its flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from ..backend import BACKENDS
from ..model import POOLS

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LARGEST = 1_000_000  # of any size; memory ends long before


class ConfigError(ValueError):
    """A setting cannot be used; the message names its flag and its value, or the file."""


def flag(name: str) -> str:
    """The command line's name of a setting: "batch_size" to "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def option(default, group: str, text: str, *, kind: type | None = None, choices=None, **bounds):
    """A field with what its flag needs: `group` and `text` of the help, `kind`, `choices` and `bounds`.

    Bounds: `least` and `most` (allowed themselves), `above` and `below` (not allowed themselves).
    """
    metadata = {"group": group, "text": text, "kind": kind or type(default), "choices": choices, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run on the digits; the defaults reach 98% test top-1 in well under a minute on two CPU cores.

    Raises:
        ConfigError: a value of the wrong type or out of its bounds, or sizes that do not fit each other.
    """

    out: str | None = option(None, "run", "run directory; a new name under runs/ if not given", kind=str)
    seed: int = option(0, "run", "of the weights, the order of the images and their augmentation", least=0, below=2**32)
    checkpoint_every: int = option(10, "run", "epochs from one checkpoint to the next", least=1)
    log_every: int = option(50, "run", "steps from one line of training metrics to the next, at most an epoch", least=1)

    epochs: int = option(80, "optimisation", "passes over the training images", least=1, most=1_000_000)
    batch_size: int = option(128, "optimisation", "images of a step", least=1)
    lr: float = option(1e-3, "optimisation", "Lion's learning rate, after warmup", above=0, most=1000)
    weight_decay: float = option(0.1, "optimisation", "Lion's weight decay, times the learning rate a step", least=0, most=1000)
    warmup: float = option(0.1, "optimisation", "part of all steps in which the learning rate rises", least=0, below=1)
    label_smoothing: float = option(0.1, "optimisation", "part of the target spread over all classes", least=0, below=1)
    dropout: float = option(0.0, "optimisation", "in the attention and on the embedded tokens", least=0, below=1)
    rotate: float = option(12.0, "optimisation", "augmentation: rotation to either side, in degrees", least=0, most=180)
    zoom: float = option(0.1, "optimisation", "augmentation: enlargement or reduction, as a part", least=0, below=1)
    shift: float = option(1.0, "optimisation", "augmentation: shift to any side, in pixels of the 8×8 scan", least=0, most=8)

    image_size: int = option(16, "model", "side to which the 8×8 scans are enlarged, in pixels", least=1, most=LARGEST)
    patch_size: int = option(4, "model", "side of a patch, in pixels of the enlarged image", least=1, most=LARGEST)
    dim: int = option(96, "model", "width of a token", least=1, most=LARGEST)
    depth: int = option(4, "model", "layers", least=1, most=1000)
    heads: int = option(3, "model", "attention heads of a layer", least=1, most=LARGEST)
    dim_head: int = option(32, "model", "width of a head", least=1, most=LARGEST)
    pool: str = option("cls", "model", "what the classifier reads: the class token, or the mean of all", choices=POOLS)
    ista: float = option(0.1, "model", "step size of the ISTA step", above=0, most=1000)
    lambd: float = option(0.1, "model", "threshold of the ISTA step", least=0, most=1000)

    device: str = option("auto", "machine", "auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    backend: str = option("auto", "machine", "what computes the layers", choices=BACKENDS)
    precision: str = option(
        "auto", "machine", "autocast dtype, or float32 for none; auto: bfloat16 on a GPU", choices=PRECISIONS
    )
    num_threads: int = option(0, "machine", "CPU threads; 0: as many as PyTorch takes by itself", least=0, most=1024)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                check_value(flag(setting.name), value, **setting.metadata)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"--image-size is {self.image_size}, which patches of --patch-size {self.patch_size} do not divide"
            )


def check_value(name: str, value, *, kind: type, choices=None, bounds: dict, **_) -> None:
    """Raises ConfigError, naming `name` and `value`, unless the value is of its kind, among its choices, within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be finite")
    if "least" in bounds and value < bounds["least"]:
        raise ConfigError(f"{name} is {value}; it must be at least {bounds['least']}")
    if "most" in bounds and value > bounds["most"]:
        raise ConfigError(f"{name} is {value}; it must be at most {bounds['most']}")
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(f"{name} is {value}; it must be above {bounds['above']}")
    if "below" in bounds and value >= bounds["below"]:
        raise ConfigError(f"{name} is {value}; it must be below {bounds['below']}")
