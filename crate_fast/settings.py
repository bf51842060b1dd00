"""What a training run is asked to do: one dataclass, from which the command line takes its flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError
from .eval_transform import LEAST_CROP, allowed_crop
from .files import names_something
from .sizes import ARCHITECTURES, BACKENDS, POOLS

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("Lion", "AdamW", "Adam", "SGD")
SCHEDULES = ("cosine", "main-epoch", "finetune-epoch")
STRATEGIES = ("ddp", "fsdp")
AUGMENTATIONS = ("none", "randaugment", "trivial")
LARGEST = 1_000_000  # of any size; memory ends long before


def flag(name: str) -> str:
    """The command line's name of a setting: "batch_size" to "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def option(default, group: str, text: str, *, kind: type | None = None, choices=None, **bounds) -> Any:
    """A field with what its flag needs: `group` and `text` of the help, `kind`, `choices` and `bounds`.

    Bounds: `least` and `most` (allowed themselves), `above` and `below` (not allowed themselves).
    """
    metadata = {"group": group, "text": text, "kind": kind or type(default), "choices": choices, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults train on the digits: 98% test top-1 in well under a minute on two idle CPU cores.

    Raises:
        ConfigError: a value of the wrong type or out of its bounds, or settings that do not fit each other.
    """

    out: str | None = option(None, "run", "run directory; a new name under runs/ if not given", kind=str)
    seed: int = option(0, "run", "of the weights, the order of the images and their augmentation", least=0, below=2**32)
    init: str | None = option(None, "run", "weights to start from: a file, or a run's directory; not its head", kind=str)
    checkpoint_every: int = option(10, "run", "epochs from one checkpoint to the next", least=1)
    checkpoint_minutes: float = option(10.0, "run", "minutes from one checkpoint to the next within an epoch", above=0)
    keep_checkpoints: int = option(2, "run", "newest checkpoints to keep; the best is kept besides", least=1, most=10_000)
    log_every: int = option(50, "run", "steps from one line of training metrics to the next, at most an epoch", least=1)
    tensorboard: str = option("no", "run", "write the metrics for TensorBoard too", choices=("no", "yes"))
    watch_rates: str = option(
        "no", "run", "measure coding rate and sparsity of every layer at each evaluation", choices=("no", "yes")
    )
    profile: str = option("no", "run", "write a trace of a few steps, for Perfetto", choices=("no", "yes"))

    data: str = option(
        "digits",
        "data",
        "digits, cifar10, cifar100, flowers102, pets, synthetic, a folder with a folder per class, or with train/ and val/ and "
        "such folders in each, or what `crate-fast prepare` has made of one",
    )
    data_dir: str = option("./data", "data", "where the published files of the four named sets are, or are downloaded to")
    classes: int | None = option(None, "data", "must agree with the data, if given", kind=int, least=1, most=LARGEST)
    workers: int = option(0, "data", "processes that read images, on each machine; 0: none but this", least=0, most=1024)
    val_split: float = option(
        0.2,
        "data",
        "of a folder without train/ and val/: part of each class that is held out, for evaluation",
        above=0,
        below=1,
    )
    keep_short_side: int = option(
        0,
        "data",
        "photographs in folders: reduce them once to N pixels on their short side, in memory; 0: read them every time",
        least=0,
        most=65_500,
    )
    max_unreadable: int = option(10, "data", "unreadable images that a process skips before it gives up", least=0)
    augment: str = option("none", "data", "besides crop and flip (TrivialAugment: trivial)", choices=AUGMENTATIONS)
    randaugment_ops: int = option(2, "data", "RandAugment's changes an image", least=0, most=100)
    randaugment_magnitude: int = option(14, "data", "RandAugment's strength, 0 to 30", least=0, most=30)
    erase: float = option(0.0, "data", "probability that a rectangle of an image is erased", least=0, most=1)
    crop_least: float = option(0.08, "data", "smallest part of an image's area that a random crop takes", above=0, most=1)
    eval_crop: float = option(
        0.875, "data", "evaluation: part of the short side in the central square; 0: the whole image, squeezed", least=0, most=1
    )
    rotate: float = option(12.0, "data", "of digits: rotation to either side, in degrees", least=0, most=180)
    zoom: float = option(0.1, "data", "of digits: enlargement or reduction, as a part", least=0, below=1)
    shift: float = option(1.0, "data", "of digits: shift to any side, in pixels of the 8×8 scan", least=0, most=8)

    epochs: int = option(80, "optimisation", "passes over the training images", least=1, most=1_000_000)
    batch_size: int = option(128, "optimisation", "images of a step, over all processes", least=1)
    accumulate: int = option(1, "optimisation", "parts in which a process computes its images of a step", least=1, most=LARGEST)
    last_batch: str = option("drop", "optimisation", "an epoch's last, incomplete batch", choices=("keep", "drop"))
    optimizer: str = option("Lion", "optimisation", "what moves the weights", choices=OPTIMIZERS)
    lr: float = option(1e-3, "optimisation", "learning rate, after warmup", above=0, most=1000)
    weight_decay: float = option(0.1, "optimisation", "times the learning rate, a step", least=0, most=1000)
    decay: str = option(
        "all", "optimisation", "what decays; matrices: no norms, biases, embeddings", choices=("all", "matrices")
    )
    momentum: float = option(0.9, "optimisation", "of SGD", least=0, below=1)
    schedule: str = option(
        "cosine", "optimisation", "of the learning rate: a step's, or a published script's by the epoch", choices=SCHEDULES
    )
    warmup: float = option(0.1, "optimisation", "part of all steps in which the learning rate rises", least=0, below=1)
    label_smoothing: float = option(0.1, "optimisation", "part of the target spread over all classes", least=0, below=1)
    mixup: float = option(0.0, "optimisation", "mixup's alpha; 0: no mixup", least=0, most=100)
    cutmix: float = option(
        0.0, "optimisation", "CutMix's alpha; 0: no CutMix; with mixup: either, by chance", least=0, most=100
    )
    clip_norm: float = option(0.0, "optimisation", "largest norm of a step's gradient; 0: no limit", least=0)
    ema: float = option(0.0, "optimisation", "decay of the mean of the weights that is evaluated; 0: none", least=0, below=1)
    dropout: float = option(0.0, "optimisation", "in the attention and on the embedded tokens", least=0, below=1)

    arch: str | None = option(None, "model", "published size, which sets the five below", kind=str, choices=ARCHITECTURES)
    dim: int = option(96, "model", "width of a token", least=1, most=LARGEST)
    depth: int = option(4, "model", "layers", least=1, most=1000)
    heads: int = option(3, "model", "attention heads of a layer", least=1, most=LARGEST)
    dim_head: int = option(32, "model", "width of a head", least=1, most=LARGEST)
    image_size: int = option(16, "model", "side of an image as the model sees it, in pixels", least=1, most=LARGEST)
    patch_size: int = option(4, "model", "side of a patch, in pixels", least=1, most=LARGEST)
    pool: str = option("cls", "model", "what the classifier reads: the class token, or the mean of all", choices=POOLS)
    ista: float = option(0.1, "model", "step size of the ISTA step", above=0, most=1000)
    lambd: float = option(0.1, "model", "threshold of the ISTA step", least=0, most=1000)

    device: str = option("auto", "machine", "auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    backend: str = option("auto", "machine", "what computes the layers", choices=BACKENDS)
    precision: str = option(
        "auto", "machine", "autocast dtype, or float32 for none; auto: bfloat16 on a GPU", choices=PRECISIONS
    )
    strategy: str = option(
        "ddp", "machine", "several processes: the whole model in each (ddp), or a part of it (fsdp)", choices=STRATEGIES
    )
    compile: str = option("no", "machine", "torch.compile of the model", choices=("no", "yes"))
    cuda_graphs: str = option(
        "no", "machine", "forward and backward as CUDA graphs, for steps that launching holds up", choices=("no", "yes")
    )
    peak_tflops: float = option(
        0.0, "machine", "the device's peak, for the part of it that is used; 0: a known GPU's, in 16 bit", least=0
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
        if self.compile == self.cuda_graphs == "yes":
            raise ConfigError("--cuda-graphs is 'yes' and --compile is 'yes'; a run takes one of them")
        for name in ("compile", "cuda_graphs", "watch_rates"):
            if self.strategy == "fsdp" and getattr(self, name) == "yes":
                raise ConfigError(f"{flag(name)} is 'yes' and --strategy is 'fsdp'; a model in parts runs as it is")
        if not allowed_crop(self.eval_crop):
            raise ConfigError(f"--eval-crop is {self.eval_crop}; it must be 0, or from {LEAST_CROP} to 1")
        self._check_augmentation()

    def _check_augmentation(self) -> None:
        """What is asked for must have an effect on the data it is asked for."""
        if self.data in ("digits", "synthetic") and self.augment != "none":
            raise ConfigError(f"--augment is {self.augment!r}; it changes photographs, and --data is {self.data}")
        if self.data in ("digits", "synthetic") and self.erase:
            raise ConfigError(f"--erase is {self.erase}; it changes photographs, and --data is {self.data}")
        for name in ("rotate", "zoom", "shift"):
            if self.data != "digits" and getattr(self, name):
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}; it changes digits, and --data is {self.data}")


def check_value(name: str, value, *, kind: type, choices=None, bounds: dict, **_) -> None:
    """Raises ConfigError, naming `name` and `value`, unless the value is of its kind, among its choices, within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    if isinstance(value, str) and not names_something(value):
        raise ConfigError(f"{name} is {value!r}, which names nothing")
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(choices)}")
    # A whole number may be beyond any float.
    if kind is float and not (isinstance(value, float | int) and -sys.float_info.max <= value <= sys.float_info.max):
        raise ConfigError(f"{name} is {value if isinstance(value, float) else 'beyond any float'}; it must be finite")
    if "least" in bounds and value < bounds["least"]:
        raise ConfigError(f"{name} is {value}; it must be at least {bounds['least']}")
    if "most" in bounds and value > bounds["most"]:
        raise ConfigError(f"{name} is {value}; it must be at most {bounds['most']}")
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(f"{name} is {value}; it must be above {bounds['above']}")
    if "below" in bounds and value >= bounds["below"]:
        raise ConfigError(f"{name} is {value}; it must be below {bounds['below']}")
