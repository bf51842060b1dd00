"""The CRATE classifier: the published class, on fused kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from ..backend import autocasts, check_backend, check_tensor, is_transformed
from ..eval_transform import Transform
from ..files import shown
from ..functional import check_number, check_positive
from ..modules.applied import applied
from ..modules.cpu_inference import evaluated_embedding
from ..modules.plain import has_global_hooks, is_exported, is_plain, keeps_forwards, same_place
from ..modules.step import STEPS
from ..optional import require
from ..ranges import in_range
from ..sizes import POOLS, SIZES, STREAMS
from .buildable import as_pair, check_buildable, divide, times
from .embedding import is_plain_embedding
from .encoder import Encoder
from .transformer import Transformer, layers_of, pool_tokens

if TYPE_CHECKING:
    from typing_extensions import Self


class CRATE(nn.Module):
    """A white-box vision transformer (Yu et al., "White-Box Transformers via Sparse Rate Reduction", arXiv:2306.01129).

    Takes the published class's arguments, draws the same weights from the same seed, and has the same state_dict.

    Args:
        image_size: side of the image in pixels, or (height, width).
        patch_size: side of a patch in pixels, or (height, width); must divide `image_size`.
        num_classes: number of logits.
        dim: width of a token.
        depth: number of layers.
        heads: attention heads (subspaces) of a layer.
        pool: what the head reads: "cls", the class token, or "mean", the mean of all tokens.
        channels: channels of an image.
        dim_head: width of a head (dimension of a subspace).
        dropout: on attention probabilities and after the attention's projection back.
        emb_dropout: on the embedded tokens.
        ista: step size η of the ISTA step.
        lambd: threshold λ of the ISTA step; 0.1 in the published code.
        backend: "triton", "torch", "reference" or "auto"; see `crate_fast.choose_backend`.
        stream: dtype of the activations between fused kernels under autocast: "float16" (as few bytes as bfloat16, 4 to 8
            times as exact; what exceeds 65,504 becomes infinite), "bfloat16", "float32", or "auto": float16 under bfloat16
            autocast and float32 under float16, each at least as precise as the published code under the same by the logits and
            the median over gradients.
        step: name of the step of sparsification: "ista", or another `SparseStep` of `crate_fast.modules.STEPS`.
        drop_path: stochastic depth, in training: the share of a batch's images for which the last layer leaves out its step of
            compression, x + MSSA(LN(x)) being x; 0 in the first layer, linearly more from layer to layer. A layer's other step
            has no residual and is never left out.

    Raises:
        TypeError: a size that is no integer, a step size, threshold or dropout that is no number.
        ValueError: a size that does not divide or is too small, more than 10,000 layers or 10 billion weights, a dropout that
            is no share, an unknown pool, backend, stream or step.
    """

    transform: Transform | None = None  # how its images are evaluated, where its file or its run says so

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        ista: float = 0.1,
        lambd: float = 0.1,
        backend: str = "auto",
        stream: str = "auto",
        step: str = "ista",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool is {shown(pool)}; allowed are 'cls' (class token) and 'mean' (mean of all tokens)")
        if stream not in STREAMS:
            raise ValueError(f"stream is {shown(stream)}; allowed are {', '.join(map(repr, STREAMS))}")
        if step not in STEPS:
            raise ValueError(f"step is {shown(step)}; allowed are {', '.join(map(repr, STEPS))}")
        check_backend(backend)
        sizes = {"dim": dim, "heads": heads, "dim_head": dim_head, "channels": channels}
        for name, value in (sizes | {"depth": depth, "num_classes": num_classes}).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {shown(value)}; it must be an integer")
            if value < (name in sizes):
                raise ValueError(f"{name} is {shown(value)}; it must be at least {int(name in sizes)}")
        # Numbers of Python's own from here on, whatever NumPy's they were: a checkpoint with others could not be read again.
        shares = {"dropout": dropout, "emb_dropout": emb_dropout, "drop_path": drop_path}
        dropout, emb_dropout, drop_path = (check_number(name, share) for name, share in shares.items())
        ista, lambd = check_positive("ista", ista), check_positive("lambd", lambd)
        for name, share in zip(shares, (dropout, emb_dropout, drop_path), strict=True):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must be from 0 to 1")
        self.image_size, self.patch_size = as_pair("image_size", image_size), as_pair("patch_size", patch_size)
        rows, columns = (divide(i, p) for i, p in zip(self.image_size, self.patch_size, strict=True))
        patch_height, patch_width = self.patch_size
        patch_dim = channels * patch_height * patch_width
        sparse = sum(math.prod(shape) for shape in STEPS[step].shapes(dim).values())
        check_buildable(dim, depth, heads * dim_head, patch_dim, rows * columns + 1, num_classes, sparse)
        self.channels = channels

        self._make_embedding(dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, rows * columns + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(emb_dropout)
        numbers = dropout, ista, lambd, backend, stream, step, drop_path
        self.transformer = self._made_layers(dim, depth, heads, dim_head, *numbers)
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def _make_embedding(self, dim: int) -> None:
        """Adds the modules that make tokens of patches."""
        height, width = self.patch_size
        patch_dim = self.channels * height * width
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=height, p2=width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )

    def _made_layers(self, *sizes) -> Transformer:
        return Transformer(*sizes)

    def _embedding(self) -> nn.Module:
        return self.to_patch_embedding

    def embed_patches(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width), which patches divide, to (batch, patches, dim), without their positions."""
        return applied(self.to_patch_embedding, image, self._backend())

    def encoder(self) -> Encoder:
        """All before its head, as the views of `crate_fast.inspection` look at it."""
        sizes = self.channels, self.image_size, self.patch_size
        layers = list(layers_of(self.transformer))
        name = f"a {type(self).__name__}"
        return Encoder(name, layers, self.transformer.heads, *sizes, self.embed_patches, self.cls_token, self.pos_embedding)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width) to logits (batch, num_classes).

        Images smaller than `image_size` work where patches divide them; they use the first position embeddings.

        Raises:
            TypeError: the image is no dense tensor of real floating point, or, outside autocast, not of the model's dtype.
            ValueError: its shape or device does not fit.
        """
        return in_range("head", self._classify, self._features(image, self.pool))

    def _features(self, image: Tensor, pool: str | None) -> Tensor:
        """What the layers make of an image: (batch, dim) with pool "cls" or "mean", (batch, 1 + patches, dim) with None."""
        self._check_image(image)
        x = in_range("embedding", self._embed, image)
        if has_global_hooks() or not (is_plain(self.transformer, Transformer) and keeps_forwards(self.transformer)):
            return pool_tokens(self.transformer(x), pool)
        return self.transformer.run(x, pool)

    def _classify(self, x: Tensor) -> Tensor:
        """(batch, dim), pooled, to logits."""
        return applied(self.mlp_head, self.to_latent(x), self._backend())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew as the constructor does: the same from the same seed."""
        self._embedding().apply(_reset)
        self.pos_embedding.normal_()
        self.cls_token.normal_()
        self.transformer.apply(_reset)
        self.mlp_head.apply(_reset)

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings, which most recipes for transformers keep from decaying, as they do norms and biases."""
        return {"pos_embedding", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has a layer keep for its backward pass what enters it alone, and compute the rest there again; or all, as at first.

        The gradients are the same to the bit; a step takes about a third more time.
        """
        self.transformer.grad_checkpointing = bool(enable)

    def _embed(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width) to the tokens that enter the layers, (batch, 1 + patches, dim)."""
        positions = self._positions(image)
        if self._embeds_at_once(image):
            _, norm, linear, last_norm = self.to_patch_embedding
            weights = [norm.weight, norm.bias, linear.weight, linear.bias, last_norm.weight, last_norm.bias]
            eps = [norm.eps, last_norm.eps]
            return evaluated_embedding(image, [*weights, self.cls_token, positions], list(self.patch_size), eps)
        x = self.embed_patches(image)
        positions = positions[:, : 1 + x.shape[1]]
        positions = torch.cat((self.cls_token + positions[:, :1], positions[:, 1:]), dim=1)
        # The class token's place is kept in the tokens' dtype, under autocast a narrower one than the positions': the wider
        # tokens are written once.
        place = x.new_zeros(()).expand(x.shape[0], 1, x.shape[2])
        return self.dropout(torch.cat((place, x), dim=1) + positions)

    def _backend(self) -> str:
        """Of its products beside the layers: the layers', literally PyTorch's where something else stands in their place."""
        return getattr(self.transformer, "backend", "reference")

    def _positions(self, image: Tensor) -> Tensor:
        """(1, 1 + patches or more, dim): the position embeddings of an image, of which the first are taken."""
        return self.pos_embedding

    def _embeds_at_once(self, image: Tensor) -> bool:
        """Whether `evaluated_embedding` may stand for the modules, on a CPU: GPUs gain nothing from it."""
        if image.device.type != "cpu" or image.numel() == 0 or torch.is_grad_enabled() or autocasts("cpu"):
            return False
        if has_global_hooks() or is_transformed() or is_exported() or self._backend() == "reference":
            return False
        plain = is_plain_embedding(self.to_patch_embedding, self.dropout)
        return plain and same_place((image, *self.to_patch_embedding.parameters(), self.cls_token))

    def _check_image(self, image: Tensor) -> None:
        check_tensor("the image", image)
        model = self.cls_token
        if image.device != model.device:
            raise ValueError(f"the image is on {image.device} and the model on {model.device}; they must be on the same device")
        if image.dtype != model.dtype and not autocasts(image.device.type):
            raise TypeError(f"the image is {image.dtype} and the model {model.dtype}; outside autocast they must be the same")
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise ValueError(f"the image has shape {tuple(image.shape)}; it must be (batch, {self.channels}, height, width)")
        size = tuple(image.shape[2:])
        if any(s % p or s == 0 for s, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"the image is {size[0]}×{size[1]}, which patches of {times(self.patch_size)} do not divide")
        self._check_size(size)

    def _check_size(self, size: tuple[int, ...]) -> None:
        """Raises ValueError where there are no positions for an image of (height, width), which patches divide."""
        patches = (size[0] // self.patch_size[0]) * (size[1] // self.patch_size[1])
        if patches >= self.pos_embedding.shape[1]:
            raise ValueError(
                f"the image is {size[0]}×{size[1]}, {patches} patches; this model has position embeddings for "
                f"{self.pos_embedding.shape[1] - 1} (image_size={times(self.image_size)})"
            )

    def save_pretrained(self, directory: str | os.PathLike[str], **options) -> str | None:
        """Writes model.safetensors, config.json and a model card to `directory`, which it makes if need be.

        Args:
            options: of `huggingface_hub.ModelHubMixin.save_pretrained`.

        Returns:
            The commit's address with `push_to_hub=True`, else None.

        Raises:
            MissingPackageError: huggingface-hub is not installed.
            ValueError: the model was changed after it was built, so that it could not be built again.
            OSError: `directory` cannot be written to.
        """
        return _hub().as_on_hub(self).save_pretrained(os.fspath(directory), **options)

    def push_to_hub(self, name: str, **options) -> str:
        """Writes the same to the Hugging Face Hub, as the model `name`, ORGANISATION/NAME; returns the commit's address.

        Args:
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private` and `token`.

        Raises: as `save_pretrained`, and what huggingface_hub raises where the Hub refuses.
        """
        return _hub().as_on_hub(self).push_to_hub(name, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides,
    ) -> Self:
        """The model in a directory of `save_pretrained`, or on the Hugging Face Hub, in evaluation mode, as one of this class.

        Args:
            source: the directory, or ORGANISATION/NAME.
            device, overrides: as of `crate_fast.load_checkpoint`.
            revision, cache_dir, force_download, local_files_only, token: of `huggingface_hub.hf_hub_download`.

        Raises: as `crate_fast.load_checkpoint`.
        """
        where = dict(revision=revision, cache_dir=cache_dir, force_download=force_download, token=token)
        where |= dict(local_files_only=local_files_only)
        found = _hub().HubModel.from_pretrained(str(source), device=device, overrides=overrides, kind=cls, **where)
        return cast("Self", found.model)


def _reset(module: nn.Module) -> None:
    """Draws the weights of `module` anew, as its own class does."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


def _hub():
    require("huggingface_hub")
    from ..checkpoint import hub

    return hub


def pair(t: Any) -> tuple:
    """`t` itself where it is a tuple, else (t, t); one of the published module's names."""
    return t if isinstance(t, tuple) else (t, t)


def build(size: str, num_classes: int = 1000, **options) -> CRATE:
    """A CRATE of a published size ("tiny", "small", "base", "large") for 224 px and patches of 16, unless `options` differ."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; allowed are {', '.join(map(repr, SIZES))}")
    arguments: dict[str, Any] = dict(image_size=224, patch_size=16, num_classes=num_classes)
    arguments |= SIZES[size] | options
    return CRATE(**arguments)


def constructor(name: str, module: str) -> Callable[..., CRATE]:
    """What `CRATE_NAME` means for a size that has no function below: for `__getattr__` of a `module`."""
    size = name.removeprefix("CRATE_")
    if name == size or size not in SIZES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return partial(build, size)


def CRATE_tiny(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-Tiny: width 384, 12 layers, 6 heads; 6,090,856 parameters. `options` are keywords of `CRATE`."""
    return build("tiny", num_classes, **options)


def CRATE_small(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-Small: width 576, 12 layers, 12 heads; 13,116,328 parameters. `options` are keywords of `CRATE`."""
    return build("small", num_classes, **options)


def CRATE_base(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-Base: width 768, 12 layers, 12 heads; 22,796,008 parameters. `options` are keywords of `CRATE`."""
    return build("base", num_classes, **options)


def CRATE_large(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-Large: width 1024, 24 layers, 16 heads; 77,641,192 parameters. `options` are keywords of `CRATE`."""
    return build("large", num_classes, **options)
