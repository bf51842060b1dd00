"""CRATE with the methods that timm asks of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.resize import grid_of
from ..checkpoint.timm_config import POOLS
from ..files import shown
from ..functional import check_number
from ..model.alpha import CRATEAlpha
from ..model.buildable import as_pair, divide, times
from ..model.crate import CRATE
from ..model.positions import resample_positions
from ..model.transformer import pool_tokens
from ..sizes import POOLS as CLASS_POOLS
from .weights import load

Size = int | tuple[int, int]


class TimmCRATE(CRATE):
    """A `crate_fast.CRATE` as timm's scripts and tools use a model.

    Its head is a LayerNorm, `mlp_head.0`, which timm calls the features' norm, and the classifier `mlp_head.1`, on the pooled
    tokens; without classes an nn.Identity is in the classifier's place, as in timm.

    Args:
        num_classes: number of logits; 0: the model gives features, (batch, dim).
        pool: as of `CRATE`; None: nothing is pooled.
        drop_rate: dropout before the classifier.
        dynamic_img_size: whether images of any size that patches divide are taken, for which position embeddings are resampled,
            bicubically, each time; else those of `image_size` alone, where `CRATE` gives smaller ones its first positions.
        arguments: as of `CRATE`.

    Raises: as `CRATE`.
    """

    feature_info: list[dict[str, Any]]
    pretrained_cfg: dict[str, Any]  # which timm sets
    pool: str | None  # pyright: ignore[reportIncompatibleVariableOverride] (None besides)

    def __init__(
        self,
        *,
        num_classes: int,
        pool: str | None = "cls",
        drop_rate: float = 0.0,
        dynamic_img_size: bool = False,
        **arguments: Any,
    ) -> None:
        # The head is drawn last, so that other weights are the same without it.
        self._construct(num_classes=num_classes or 1, pool="cls" if pool is None else pool, **arguments)
        self.pool, self.dynamic_img_size = pool, dynamic_img_size
        self.drop_rate = check_number("drop_rate", drop_rate)
        if not 0 <= self.drop_rate <= 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be from 0 to 1")
        if num_classes == 0:
            self.mlp_head[1] = nn.Identity()
        self._describe_features()

    def _construct(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    def _describe_features(self) -> None:
        self.transformer.depth = len(self.transformer.layers)
        sizes = dict(num_chs=self.transformer.dim, reduction=max(self.patch_size))
        self.feature_info = [{"module": f"transformer.layers.{i}"} | sizes for i in range(self.transformer.depth)]

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 without a classifier."""
        return getattr(self.mlp_head[1], "out_features", 0)

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return self.transformer.dim

    num_features = head_hidden_size = embed_dim

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.channels

    @property
    def global_pool(self) -> str:
        """What the head reads, one of `POOLS`."""
        return next(name for name, own in POOLS.items() if own == self.pool)

    @property
    def grad_checkpointing(self) -> bool:
        """What `set_grad_checkpointing` has set."""
        return self.transformer.grad_checkpointing

    def _positions(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        if tuple(size) == self.image_size:
            return self.pos_embedding
        return resample_positions(self.pos_embedding, grid_of(self.image_size, self.patch_size), grid_of(size, self.patch_size))

    def _check_size(self, size: tuple[int, ...]) -> None:
        if not self.dynamic_img_size and size != self.image_size:
            raise ValueError(
                f"the image is {times(size)} and this model is for {times(self.image_size)}; make it with that img_size, or "
                "with dynamic_img_size=True, or change it by set_input_size"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to all tokens after the layers, (batch, 1 + patches, dim), not yet normalised."""
        return self._features(x, None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives to logits, (batch, num_classes); with global_pool "" of every token.

        Args:
            pre_logits: what the classifier reads instead, (batch, dim): pooled and normalised.
        """
        return self._classify(pool_tokens(x, self.pool), pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        norm, classifier = self.mlp_head
        x = F.dropout(norm(self.to_latent(x)), self.drop_rate, self.training)
        return x if pre_logits else classifier(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """What `forward_features` gives, and what layers give on the way there, between which they run fused as ever.

        Args:
            indices: which layers, from 0, negative ones from the last; a number: so many at the end; None: all.
            return_prefix_tokens: with each its class token, (batch, 1, dim), beside.
            norm: whether the head's LayerNorm is applied to them, and to what is returned beside them.
            stop_early: whether layers after the last of these are left out.
            output_fmt: "NCHW": (batch, dim, rows, columns) of patches; "NLC": (batch, patches, dim).
            intermediates_only: whether they are returned alone.
            output_dict: whether everything is returned in a dictionary, with timm's keys.

        Returns:
            (tokens, list of intermediates), or as the arguments say.

        Raises:
            ValueError: an unknown `output_fmt`, or a layer that is not there; else as `forward`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {shown(output_fmt)}; allowed are 'NCHW' and 'NLC'")
        layers = list(self.transformer.layers)
        taken = _indices(indices, len(layers))
        self._check_image(x)
        height, width = grid_of(x.shape[-2:], self.patch_size)
        x, done, seen = self._embed(x), 0, {}
        for end in sorted({*taken} if stop_early else {*taken, len(layers) - 1}):
            x, done = self.transformer.run(x, None, layers[done : end + 1]), end + 1
            seen[end] = self.mlp_head[0](x) if norm else x
        found = [seen[index] for index in sorted({*taken})]
        patches, classes = [y[:, 1:] for y in found], [y[:, :1] for y in found]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in patches]
        tokens = self.mlp_head[0](x) if norm else x
        return _as_asked(tokens, patches, classes if return_prefix_tokens else None, intermediates_only, output_dict)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes off the layers after the last of `indices`, and the head's norm and classifier where that is said; returns
        which layers `indices` means, from 0."""
        layers = self.transformer.layers
        taken = _indices(indices, len(layers))
        self.transformer.layers = layers[: max(taken) + 1]
        self._describe_features()
        if prune_norm:
            self.mlp_head[0] = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def init_weights(self) -> None:
        """As `reset_parameters`."""
        self.reset_parameters()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong together, from the embedding to the head: for learning rates by layer (`--layer-decay`)."""
        stem = r"^cls_token|pos_embedding|to_patch_embedding|conv1"
        return dict(stem=stem, blocks=[(r"^transformer\.layers\.(\d+)", None), (r"^mlp_head\.0", (99999,))])

    def get_classifier(self) -> nn.Module:
        """The nn.Linear that gives the logits; nn.Identity without classes."""
        return self.mlp_head[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier, random, in the old one's place; with 0 classes none.

        Args:
            global_pool: "token", "avg" or "", see `build`; None: as before.

        Raises:
            ValueError: another `global_pool`, or a negative number of classes.
        """
        if global_pool is not None and global_pool not in POOLS:
            raise ValueError(f"global_pool is {shown(global_pool)}; allowed are {', '.join(map(repr, POOLS))}")
        if num_classes < 0:
            raise ValueError(f"num_classes is {shown(num_classes)}; it must be at least 0")
        if global_pool is not None:
            self.pool = POOLS[global_pool]
        classifier: nn.Module = nn.Identity()
        if num_classes:
            classifier = nn.Linear(self.embed_dim, num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
        self.mlp_head[1] = classifier.train(self.training)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Makes the model one for images of `img_size`, height and width: its position embeddings are resampled, bicubically.

        Raises:
            ValueError: patches do not divide it, or `patch_size` is another than the model's.
        """
        if patch_size is not None and as_pair("patch_size", patch_size) != self.patch_size:
            raise ValueError(f"patch_size is {shown(patch_size)}; this model's patches stay {self.patch_size}")
        if img_size is None:
            return
        size = as_pair("img_size", img_size)
        for side, patch in zip(size, self.patch_size, strict=True):
            divide(side, patch)
        old = self.pos_embedding
        if size != self.image_size:
            grids = grid_of(self.image_size, self.patch_size), grid_of(size, self.patch_size)
            self.pos_embedding = nn.Parameter(resample_positions(old.detach(), *grids), old.requires_grad)
        self.image_size = size
        self._traits = dict(getattr(self, "_traits", {}), img_size=size)
        getattr(self, "pretrained_cfg", {}).update(input_size=(self.channels, *size))

    def load_pretrained(self, checkpoint_path: str | os.PathLike, prefix: str = "") -> None:
        """Gives the model the weights in a file, a run or a model of the Hub, whatever `crate_fast.load_checkpoint` reads; see
        `crate_fast.timm.weights.load`."""
        load(self, checkpoint_path)


class TimmCRATEAlpha(TimmCRATE, CRATEAlpha):
    """A `crate_fast.CRATEAlpha` likewise; its arguments are that class's, and `pool`, which CRATE-α has not of its own."""

    def _construct(self, *, pool: str, **arguments: Any) -> None:
        if pool not in CLASS_POOLS:
            raise ValueError(f"pool is {shown(pool)}; allowed are {', '.join(map(repr, CLASS_POOLS))}")
        CRATEAlpha.__init__(self, **arguments)


def _indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of `count` layers are meant, from 0, see `TimmCRATE.forward_intermediates`; at least one."""
    wanted = count if indices is None else indices
    if isinstance(wanted, int):
        wanted = range(count - wanted, count) if wanted <= count else ()
    found = [index + count if index < 0 else index for index in wanted]
    if not found or not all(0 <= index < count for index in found):
        raise ValueError(f"indices is {shown(indices)}; of {count} layers at least one must be meant, from 0 to {count - 1}")
    return found


def _as_asked(tokens: Tensor, patches: list[Tensor], classes: list[Tensor] | None, alone: bool, as_dict: bool) -> Any:
    """What `forward_intermediates` returns."""
    if as_dict:
        found: dict[str, Any] = {"image_intermediates": patches}
        found |= {} if classes is None else {"image_intermediates_prefix": classes}
        return found if alone else found | {"image_features": tokens}
    pairs = patches if classes is None else list(zip(patches, classes, strict=True))
    return pairs if alone else (tokens, pairs)
