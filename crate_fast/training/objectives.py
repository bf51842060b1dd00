"""What a run learns: the model, the loss of a part of a step and the score of a test batch, by `--objective`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.open import Data
from ..data.order import share_of
from ..data.philox import MASK, uniforms
from ..device import Compute
from ..model.alpha import CRATEAlpha
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..processes import Ranks
from ..settings import ConfigError, TrainConfig
from .metrics import Judge, PatchScore, Score, classified, measure, measure_patches
from .mixing import mix


class Place(NamedTuple):
    """Where in a run a part of a step is.

    key: seed, step, process and part, of which what is drawn for the batch as a whole depends.
    epoch: counted from 1.
    images: their places in the epoch's order.
    """

    key: tuple[int, ...]
    epoch: int
    images: slice


class Classes:
    """Which class an image is of: a CRATE or a CRATE-α, by cross-entropy."""

    name, score = "CRATE", Score

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def build(self, data: Data) -> CRATE:
        """The model, its weights drawn from PyTorch's generator; raises ConfigError or ValueError where none is such."""
        config = self.config
        if config.num_classes is not None and config.num_classes < data.classes:
            raise ConfigError(f"--num-classes is {config.num_classes}; {data.name} has {data.classes} classes")
        arguments: dict[str, Any] = dict(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=config.num_classes or data.classes,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            channels=data.channels,
            dim_head=config.dim_head,
            dropout=config.dropout,
            emb_dropout=config.dropout,
            ista=config.ista,
            lambd=config.lambd,
            backend=config.backend,
            drop_path=config.drop_path,
        )
        if config.model != "CRATEAlpha":
            return CRATE(**arguments, pool=config.pool, stream=config.stream)
        model = CRATEAlpha(**arguments, init_values=config.layer_scale or None)
        model.reset_for_training()
        return model

    def loss(
        self, model: CRATE, net: nn.Module, images: Tensor, labels: Tensor, place: Place, compute: Compute, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the sum of the images' losses, a scalar; what they add to a meter whose sums are `like`).

        Args:
            net: `model`, as the processes share it.
            images, labels: a part of a step; images with label -100 count nothing.
            place: where in the run it is.
        """
        batch = mix(images, labels, self.config, place.key)
        with compute.autocast():
            logits = net(batch.images)
        loss = batch.loss(logits.float(), self.config.label_smoothing)
        return loss, measure(loss, logits, batch.labels, like)

    def judge(self, ranks: Ranks, count: int) -> Judge:
        """What measures a model on this process's share of `count` test images, batch by batch in order."""
        return classified

    @staticmethod
    def quality(score: Score) -> float:
        """The larger the better, and above -1."""
        return score.top1


class Patches:
    """What is in an image where it is masked: a CRATE-MAE, by the squared error of the masked patches.

    Which patches of an image are masked is a function of seed, epoch and its place in the epoch's order, whatever process
    computes it; of test images, of their place alone, so that epochs can be compared.
    """

    name, score = "CRATE-MAE", PatchScore

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def build(self, data: Data) -> CRATEMAE:
        """As `Classes.build`."""
        config = self.config
        return CRATEMAE(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=data.channels,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            decoder_depth=config.decoder_depth or config.depth,
            norm_pix_loss=config.norm_pix_loss,
            lambd=config.lambd,
            backend=config.backend,
            stream=config.stream,
        )

    def loss(
        self, model: CRATEMAE, net: nn.Module, images: Tensor, labels: Tensor, place: Place, compute: Compute, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Classes.loss`."""
        noise = self._noise(images, place.epoch, np.arange(place.images.start, place.images.stop))
        with compute.autocast():
            _, pred, mask = net(images, self.config.mask_ratio, noise)
        return measure_patches(model, images, labels, pred, mask, like)

    def judge(self, ranks: Ranks, count: int) -> Judge:
        """As `Classes.judge`."""
        seen = share_of(count, ranks).start

        def judge(model: CRATEMAE, images: Tensor, labels: Tensor, like: Tensor) -> Tensor:
            nonlocal seen
            noise = self._noise(images, 0, np.arange(seen, seen + len(images)))  # epoch 0 is none of training
            seen += len(images)
            _, pred, mask = model(images, self.config.mask_ratio, noise)
            return measure_patches(model, images, labels, pred, mask, like)[1]

        return judge

    @staticmethod
    def quality(score: Score) -> float:
        """As `Classes.quality`."""
        return 1 / (1 + score.loss)

    def _noise(self, images: Tensor, epoch: int, places: np.ndarray) -> Tensor:
        patches = (self.config.image_size // self.config.patch_size) ** 2
        return mask_noise(self.config.seed, epoch, places, patches).to(images.device, non_blocking=True)


OBJECTIVES = {"classes": Classes, "patches": Patches}
Objective = Classes | Patches


def mask_noise(seed: int, epoch: int, places: np.ndarray, patches: int) -> Tensor:
    """(n, patches) float32 in [0, 1) for `CRATEMAE`, a function of seed, epoch and the images' `places` in it, (n,)."""
    return torch.from_numpy(uniforms(seed, epoch, places, MASK, patches)).float()
