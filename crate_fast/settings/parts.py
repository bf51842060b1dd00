"""The settings of a run, in the parts in which its rooms see them; `TrainConfig` is all of them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from ..data_sets import DATA_SETS, UNCHANGED, images_of
from ..eval_transform import LEAST_CROP, allowed_crop
from ..optimizers import OPTIMIZERS
from ..sizes import ARCHITECTURES, BACKENDS, MODELS, POOLS, STREAMS
from .checked import LARGEST, ConfigError, Field, OneOf, Part, Switch, Text, as_flag, checked, flag

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS = get_args(Precision)


@checked
class SeedSettings(Part):
    """What every draw of a run comes from."""

    seed: int = Field(0, ge=0, lt=2**32, description="of the weights, the order of the images and their augmentation")


@checked
class ImageSettings(Part):
    """What data and model must agree on."""

    image_size: int = Field(16, ge=1, le=LARGEST, description="side of an image as the model sees it, in pixels")


@checked
class StepSettings(SeedSettings):
    """How an epoch is cut into steps, and a step into parts."""

    batch_size: int = Field(128, ge=1, le=LARGEST, description="images of a step, over all processes")
    accumulate: int = Field(1, ge=1, le=LARGEST, description="parts in which a process computes its images of a step")
    last_batch: Literal["keep", "drop"] = Field("drop", description="an epoch's last, incomplete batch")


@checked
class RunSettings(SeedSettings):
    """Where a run is written to, how often, and what it tells."""

    out: Text | None = Field(None, description="run directory; a new name under runs/ if not given")
    init: Text | None = Field(None, description="weights to start from: a file, or a run's directory; not its head")
    checkpoint_every: int = Field(10, ge=1, le=LARGEST, description="epochs from one checkpoint to the next")
    checkpoint_minutes: float = Field(10.0, gt=0, description="minutes from one checkpoint to the next within an epoch")
    keep_checkpoints: int = Field(2, ge=1, le=10_000, description="newest checkpoints to keep; the best is kept besides")
    log_every: int = Field(
        50, ge=1, le=LARGEST, description="steps from one line of training metrics to the next, at most an epoch"
    )
    print_log: Switch = Field(False, description="print the published main.py's lines, a line every --log-every steps")
    tensorboard: Switch = Field(False, description="write the metrics for TensorBoard too")
    watch_rates: Switch = Field(False, description="measure coding rate and sparsity of every layer at each evaluation")
    profile: Switch = Field(False, description="write a trace of a few steps, for Perfetto")


@checked
class DataSettings(StepSettings, ImageSettings):
    """Which images, how they are read and how they are changed."""

    data: Text = Field(
        "digits",
        description=f"{', '.join(DATA_SETS)}, a folder with a folder per class, or with train/ and val/ and such folders in "
        "each, or what `crate-fast prepare` has made of one",
    )
    data_dir: Text = Field("./data", description="where the published files of the named sets are, or are downloaded to")
    classes: int | None = Field(None, ge=1, le=LARGEST, description="must agree with the data, if given")
    workers: int = Field(0, ge=0, le=1024, description="processes that read images, on each machine; 0: none but this")
    val_split: float = Field(
        0.2, gt=0, lt=1, description="of a folder without train/ and val/: part of each class that is held out, for evaluation"
    )
    train_part: float = Field(
        1.0, gt=0, le=1, description="part of each class's training images that is used, the same in every run"
    )
    keep_short_side: int = Field(
        0,
        ge=0,
        le=65_500,
        description="photographs in folders: reduce them once to N pixels on their short side, in memory; 0: read every time",
    )
    max_unreadable: int = Field(10, ge=0, le=10**9, description="unreadable images that a process skips before it gives up")
    augment: Literal["none", "randaugment", "trivial"] = Field(
        "none", description="besides crop and flip (TrivialAugment: trivial)"
    )
    randaugment_ops: int = Field(2, ge=0, le=100, description="RandAugment's changes an image")
    randaugment_magnitude: int = Field(14, ge=0, le=30, description="RandAugment's strength, 0 to 30")
    erase: float = Field(0.0, ge=0, le=1, description="probability that a rectangle of an image is erased")
    crop_least: float = Field(0.08, gt=0, le=1, description="smallest part of an image's area that a random crop takes")
    eval_crop: float = Field(
        0.875, ge=0, le=1, description="evaluation: part of the short side in the central square; 0: the whole image, squeezed"
    )
    rotate: float = Field(12.0, ge=0, le=180, description="of digits: rotation to either side, in degrees")
    zoom: float = Field(0.1, ge=0, lt=1, description="of digits: enlargement or reduction, as a part")
    shift: float = Field(1.0, ge=0, le=8, description="of digits: shift to any side, in pixels of the 8×8 scan")


@checked
class OptimisationSettings(StepSettings):
    """How the weights are moved."""

    epochs: int = Field(80, ge=1, le=1_000_000, description="passes over the training images")
    optimizer: Annotated[str, OneOf(tuple(OPTIMIZERS))] = Field("Lion", description="what moves the weights")
    lr: float = Field(1e-3, gt=0, le=1000, description="learning rate, after warmup")
    weight_decay: float = Field(0.1, ge=0, le=1000, description="times the learning rate, a step")
    decay: Literal["all", "matrices", "kernels"] = Field(
        "all", description="what decays; matrices: no norms, biases, embeddings; kernels: no weights of ISTA steps either"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    beta1: float | None = Field(None, ge=0, lt=1, description="decay of the mean of gradients: 0.9 if not given")
    beta2: float | None = Field(None, ge=0, lt=1, description="the optimizer's other decay: 0.999, Lion's 0.99 if not given")
    schedule: Literal["cosine", "constant", "main-epoch", "finetune-epoch"] = Field(
        "cosine", description="of the learning rate: by the step, or a published script's by the epoch"
    )
    min_lr: float = Field(0.0, ge=0, le=1000, description="what the learning rate falls to, with --schedule cosine")
    warmup: float = Field(0.1, ge=0, lt=1, description="part of all steps in which the learning rate rises")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="part of the target spread over all classes")
    mixup: float = Field(0.0, ge=0, le=100, description="mixup's alpha; 0: no mixup")
    cutmix: float = Field(0.0, ge=0, le=100, description="CutMix's alpha; 0: no CutMix; with mixup: either, by chance")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient; 0: no limit")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the mean of the weights that is evaluated; 0: none")


@checked
class ObjectiveSettings(Part):
    """What is learned."""

    objective: Literal["classes", "patches"] = Field(
        "classes", description="what is told: classes (by a CRATE), or patches that are masked (by a CRATE-MAE)"
    )
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="of patches: part of an image's that is masked")
    norm_pix_loss: Switch = Field(False, description="of patches: each normalised by its own mean and deviation for the loss")
    decoder_depth: int = Field(0, ge=0, le=1000, description="of patches: layers of the decoder; 0: as many as the encoder's")


@checked
class ModelSettings(ImageSettings):
    """Which CRATE it is."""

    model: Annotated[str, OneOf(MODELS)] = Field(
        "CRATE", description="member of the family; CRATEAlpha: overcomplete dictionaries, and a residual about each step"
    )
    arch: Annotated[str | None, OneOf(tuple(ARCHITECTURES))] = Field(
        None, description="published size, which sets model, width, depth, heads and their width; of CRATE-α patches too"
    )
    dim: int = Field(96, ge=1, le=LARGEST, description="width of a token")
    depth: int = Field(4, ge=1, le=1000, description="layers")
    heads: int = Field(3, ge=1, le=LARGEST, description="attention heads of a layer")
    dim_head: int = Field(32, ge=1, le=LARGEST, description="width of a head")
    patch_size: int = Field(4, ge=1, le=LARGEST, description="side of a patch, in pixels")
    num_classes: int | None = Field(
        None, ge=1, le=LARGEST, description="outputs of the head, the data's classes or more; as many as those if not given"
    )
    pool: Annotated[str, OneOf(POOLS)] = Field(
        "cls", description="what the classifier reads: the class token, or the mean of all"
    )
    ista: float = Field(0.1, gt=0, le=1000, description="step size of the ISTA step")
    lambd: float = Field(0.1, ge=0, le=1000, description="threshold of the ISTA step")
    dropout: float = Field(0.0, ge=0, lt=1, description="in the attention and on the embedded tokens")
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stochastic depth: part of the images for which the last layer has no attention, or of CRATE-α's either "
        "step; less before",
    )
    layer_scale: float = Field(
        0.0, ge=0, le=1, description="of CRATE-α: learned factors on what a step adds, and what they are at first; 0: none"
    )


@checked
class MachineSettings(Part):
    """What computes it."""

    device: Text = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    backend: Annotated[str, OneOf(BACKENDS)] = Field("auto", description="what computes the layers")
    precision: Precision = Field("auto", description="autocast dtype, or float32 for none; auto: bfloat16 on a GPU")
    stream: Annotated[str, OneOf(STREAMS)] = Field(
        "auto", description="dtype of the activations between fused kernels under autocast; auto: float16 under bfloat16"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: the whole model in each (ddp), or a part of it (fsdp)"
    )
    compile: Switch = Field(False, description="torch.compile of the model")
    cuda_graphs: Switch = Field(False, description="forward and backward as CUDA graphs, for steps that launching holds up")
    peak_tflops: float = Field(
        0.0, ge=0, description="the device's peak, for the part of it that is used; 0: a known GPU's, in 16 bit"
    )
    num_threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: as many as PyTorch takes by itself")


@checked
class TrainConfig(MachineSettings, ModelSettings, ObjectiveSettings, OptimisationSettings, DataSettings, RunSettings):
    """Settings of a run. The defaults train on the digits: 98% test top-1 in well under a minute on two idle CPU cores.

    Raises:
        ConfigError: a value of the wrong type or out of its bounds, or settings that do not fit each other.
    """

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"--image-size is {self.image_size}, which patches of --patch-size {self.patch_size} do not divide"
            )
        if self.model == "CRATEAlpha" and self.pool != "cls":
            raise ConfigError(f"--pool is {self.pool!r} and --model is 'CRATEAlpha', which reads the class token, 'cls'")
        if self.model != "CRATEAlpha" and self.layer_scale:
            raise ConfigError(f"--layer-scale is {self.layer_scale}; it is of --model CRATEAlpha, which is {self.model!r}")
        if self.compile and self.cuda_graphs:
            raise ConfigError("--cuda-graphs is 'yes' and --compile is 'yes'; a run takes one of them")
        for name in ("compile", "cuda_graphs", "watch_rates"):
            if self.strategy == "fsdp" and getattr(self, name):
                raise ConfigError(f"{flag(name)} is 'yes' and --strategy is 'fsdp'; a model in parts runs as it is")
        if self.objective == "patches":
            self._check_patches()
        if self.min_lr and self.schedule != "cosine":
            raise ConfigError(f"--min-lr is {self.min_lr}; it is of --schedule cosine, which is {self.schedule}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr is {self.min_lr}; it must be at most --lr, {self.lr}")
        if not allowed_crop(self.eval_crop):
            raise ConfigError(f"--eval-crop is {self.eval_crop}; it must be 0, or from {LEAST_CROP} to 1")
        for kind, settings in UNCHANGED.items():  # what is asked for must have an effect on the data it is asked for
            for name, none in settings.items():
                value = getattr(self, name)
                if value != none and images_of(self.data) != kind:
                    raise ConfigError(f"{flag(name)} is {value!r}; it changes {kind}, and --data is {self.data}")

    def _check_patches(self) -> None:
        """Raises ConfigError where something is asked for that a CRATE-MAE has not."""
        for name, only in OF_CLASSES.items():
            if (value := getattr(self, name)) != only:
                raise ConfigError(
                    f"{flag(name)} is {as_flag(value)!r} and --objective is 'patches', which takes {as_flag(only)!r} alone"
                )
        if self.heads * self.dim_head != self.dim:
            raise ConfigError(
                f"--heads is {self.heads} and --dim-head {self.dim_head}; of a CRATE-MAE they make --dim, {self.dim}, together"
            )
        patches = (self.image_size // self.patch_size) ** 2
        if int(patches * (1 - self.mask_ratio)) == patches:
            raise ConfigError(f"--mask-ratio is {self.mask_ratio}, which masks none of {patches} patches")
        if self.dim % 4:
            raise ConfigError(f"--dim is {self.dim}; of a CRATE-MAE it must be a multiple of 4")


OF_CLASSES = {
    **{"mixup": 0.0, "cutmix": 0.0, "dropout": 0.0, "drop_path": 0.0, "ista": 0.1, "num_classes": None},
    **{"model": "CRATE", "layer_scale": 0.0},
    **{"strategy": "ddp", "cuda_graphs": False},
}
"""The settings that a CRATE-MAE does not take, and the values that ask for nothing."""

PARTS_BY_SECTION: dict[str, tuple[type, ...]] = {
    "run": (RunSettings, SeedSettings),
    "data": (DataSettings,),
    "optimisation": (OptimisationSettings, StepSettings),
    "objective": (ObjectiveSettings,),
    "model": (ModelSettings, ImageSettings),
    "machine": (MachineSettings,),
}
"""What the help calls the parts, in its order."""
