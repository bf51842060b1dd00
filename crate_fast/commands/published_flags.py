"""The flags of the published main.py and finetune.py, and what becomes of each here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from ..data_sets import DATA_SETS
from ..optimizers import OPTIMIZERS
from ..settings import listed
from ..sizes import ARCHITECTURES
from .arguments import number, place, whole

VISION = "the published vit_* models are not part of this package (timm has them); use " + ", ".join(ARCHITECTURES)


class Published(NamedTuple):
    """A flag of a published script.

    names: as written there, the first one in full.
    setting: the setting it gives, or None.
    text: what it does here; of a flag without a setting, why it has no effect or what to use instead.
    effect: "known", "ignored" (accepted with a warning) or "refused".
    read: from the word given to the setting's value; None for a flag that stands alone.
    value: what a flag that stands alone means.
    also: other settings that it gives besides.
    """

    names: tuple[str, ...]
    setting: str | None
    text: str
    effect: str = "known"
    read: Callable[[str], object] | None = str
    value: object = None
    also: tuple[tuple[str, object], ...] = ()


def architecture(text: str) -> str:
    """A published size by its published name."""
    if text.startswith("vit"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; {VISION}")
    found = {name.lower(): name for name in ARCHITECTURES}.get(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed are {', '.join(ARCHITECTURES)}")
    return found


def optimizer(text: str) -> str:
    """An optimizer in either script's spelling."""
    found = {name.lower(): name for name in OPTIMIZERS}.get(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed are {', '.join(OPTIMIZERS)}")
    return found


def data_set(text: str) -> str:
    """A data set in finetune.py's names, or a folder."""
    return next((name for name, known in DATA_SETS.items() if known.finetune == text), text)


def augmentation(text: str) -> str:
    """What --randomaug means: 1 RandAugment, 0 TrivialAugment (not: nothing)."""
    meant = {"0": "trivial", "1": "randaugment"}
    if text not in meant:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be 0 or 1")
    return meant[text]


def weights(text: str) -> str | None:
    """A file of weights; the published README writes None for no file."""
    return None if text == "None" else text


def resume_switch(text: str) -> str | None:
    """What --resume takes: "auto", a path, or finetune.py's 0 and 1."""
    return {"0": None, "1": "auto"}.get(text, text) if text in ("0", "1") else place(text)


def _optimizers(script: str) -> str:
    """The optimizers of a published script, as it calls them, and those that it has not."""
    theirs = {name: getattr(known, script) for name, known in OPTIMIZERS.items()}
    others = listed(name for name, own in theirs.items() if own is None)
    return f"{', '.join(own for own in theirs.values() if own)}, and also {others}"


def _data_sets() -> str:
    """finetune.py's data sets as it calls them, with our names where they differ."""
    theirs = {name: known.finetune for name, known in DATA_SETS.items() if known.finetune}
    return ", ".join(own if own == name else f"{own} ({name})" for name, own in theirs.items())


LAUNCHER = "torchrun says it: torchrun --nproc_per_node=N -m crate_fast train ..."

MAIN = (
    Published(("--data",), "data", "folder with train/ and val/, or a data set's name", read=data_set),
    Published(("--arch", "-a"), "arch", f"{', '.join(ARCHITECTURES)}; vit_* are refused", read=architecture),
    Published(("--workers", "-j"), "workers", "processes that read images, on each machine", read=whole),
    Published(("--epochs",), "epochs", "passes over the training images", read=whole),
    Published(("--start-epoch",), None, "--resume knows the epoch of a checkpoint", "refused"),
    Published(("--label_smooth",), "label_smoothing", "is --label-smoothing", read=number),
    Published(("--batch-size", "-b"), "batch_size", "images of a step over all processes", read=whole),
    Published(("--lr", "--learning-rate"), "lr", "learning rate", read=number),
    Published(("--momentum",), "momentum", "of SGD; other optimizers have none, there and here", read=number),
    Published(("--wd", "--weight-decay"), "weight_decay", "weight decay", read=number),
    Published(
        ("--print-freq", "-p"), "log_every", "is --log-every, with main.py's lines", read=whole, also=(("print_log", True),)
    ),
    Published(("--resume",), "resume", "a run, a checkpoint of it or of main.py, or auto", read=resume_switch),
    Published(("--evaluate", "-e"), "evaluate", "evaluates what --resume or --init names, in float32", read=None, value=True),
    Published(("--pretrained",), None, "main.py never reads it; --init FILE starts from weights", "ignored", None),
    Published(("--world-size",), None, LAUNCHER, "ignored", whole),
    Published(("--rank",), None, LAUNCHER, "ignored", whole),
    Published(("--dist-url",), None, LAUNCHER, "ignored"),
    Published(("--dist-backend",), None, "nccl on GPUs and gloo elsewhere", "ignored"),
    Published(("--seed",), "seed", "of weights, order and augmentation; 0 if not given", read=whole),
    Published(("--gpu",), None, "use --device cuda:N to choose a GPU", "ignored", whole),
    Published(("--optimizer",), "optimizer", _optimizers("main"), read=optimizer),
    Published(("--multiprocessing-distributed",), None, LAUNCHER, "ignored", None),
    Published(("--dummy",), "data", "is --data synthetic", read=None, value="synthetic"),
)

FINETUNE = (
    Published(("--lr",), "lr", "learning rate", read=number),
    Published(
        ("--opt",),
        "optimizer",
        f"{_optimizers('finetune')}; decay only with adamW, unless a flag or a recipe of yours says it",
        read=optimizer,
    ),
    Published(("--net",), "arch", "CRATE_tiny (if not given), CRATE_small, ...; vit_* are refused", read=architecture),
    Published(("--bs",), "batch_size", "is --batch-size", read=whole),
    Published(("--data",), "data", f"{_data_sets()}, or a folder", read=data_set),
    Published(("--classes",), "classes", "the data says it; must agree with the data", read=whole),
    Published(("--resume",), "resume", "0; 1 is --resume auto, which needs --out; or a run", read=resume_switch),
    Published(("--randomaug",), "augment", "1: RandAugment; 0: TrivialAugment, as there", read=augmentation),
    Published(("--rand_aug_n",), "randaugment_ops", "RandAugment's changes an image", read=whole),
    Published(("--rand_aug_m",), "randaugment_magnitude", "RandAugment's strength", read=whole),
    Published(("--erase_prob",), "erase", "probability that a rectangle is erased", read=number),
    Published(("--n_epochs",), "epochs", "is --epochs", read=whole),
    Published(("--patch",), None, "it only names files there; --patch-size sets the model's patches", "ignored", whole),
    Published(("--ckpt_dir",), "init", "is --init: a file of weights, or None", read=weights),
    Published(("--data_dir",), "data_dir", "is --data-dir", read=str),
)

PUBLISHED = {"train": MAIN, "finetune": FINETUNE, "pretrain": ()}
