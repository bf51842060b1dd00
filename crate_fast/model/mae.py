"""CRATE-MAE, the masked autoencoder: the published class, on fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import autocasts, check_backend, check_tensor
from ..eval_transform import Transform
from ..files import shown
from ..functional import check_number, check_positive
from ..modules.applied import applied
from ..sizes import MAE_SIZES, STREAMS
from .buildable import as_pair, check_buildable, divide, times
from .encoder import Encoder
from .mae_blocks import decoder_blocks, encoder_blocks
from .positions import sine_positions

NORM = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Patches of square images by one convolution, (batch, channels, height, width) to (batch, patches, dim)."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = divide(img_size[0], patch_size[0]), divide(img_size[1], patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class CRATEMAE(nn.Module):
    """A white-box masked autoencoder (Pai et al., "Masked Completion via Structured Diffusion with White-Box Transformers",
    arXiv:2404.02446).

    Takes the arguments of the published class but its two kinds of block, draws the same weights from the same seed, and has
    the same state_dict. Mask tokens enter before the encoder, so that it sees every token.

    Args:
        img_size: side of the image in pixels, or (height, width), which are equal.
        patch_size: side of a patch in pixels; must divide `img_size`.
        in_chans: channels of an image.
        embed_dim: width of a token, a multiple of 4.
        depth: layers of the encoder.
        num_heads: attention heads (subspaces) of one of them; must divide `embed_dim`.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder; None: as the encoder's. The width must be
            the encoder's: the published class takes others, and does not run with them.
        mlp_ratio: taken as there, and used as little.
        norm_layer: makes what stands behind encoder and decoder, of a width; by default, as in the published sizes, LayerNorm
            with eps 1e-6.
        norm_pix_loss: whether the loss is of patches normalised by their own mean and variance.
        lambd: threshold λ of the encoder's ISTA step.
        backend, stream: as of `crate_fast.CRATE`.

    Raises:
        TypeError: a size that is no integer, a threshold that is no number.
        ValueError: a size that does not divide or is too small, images or patches that are no squares, another width of the
            decoder, an unknown backend or stream.
        MissingPackageError: NumPy is not installed.
    """

    transform: Transform | None = None  # how its images are normalised, where its file says so

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = NORM,
        norm_pix_loss: bool = False,
        lambd: float = 0.5,
        backend: str = "auto",
        stream: str = "auto",
    ) -> None:
        super().__init__()
        if stream not in STREAMS:
            raise ValueError(f"stream is {shown(stream)}; allowed are {', '.join(map(repr, STREAMS))}")
        check_backend(backend)
        width = embed_dim if decoder_embed_dim is None else decoder_embed_dim
        layers, heads = _or(decoder_depth, depth), _or(decoder_num_heads, num_heads)
        _check_sizes(in_chans, embed_dim, (depth, layers), (num_heads, heads))
        if width != embed_dim:
            raise ValueError(f"decoder_embed_dim is {shown(width)}; it must be embed_dim, {embed_dim}")
        image, patch = as_pair("img_size", img_size), as_pair("patch_size", patch_size)
        if image[0] != image[1] or patch[0] != patch[1]:
            raise ValueError(f"img_size is {times(image)} and patch_size {times(patch)}; both must be squares")
        side = divide(image[0], patch[0])
        check_buildable(width, depth + layers, width, in_chans * patch[0] ** 2, 2 * (side**2 + 1), in_chans * patch[0] ** 2)
        self.heads, self.depth, self.patch_size = num_heads, depth, patch[0]
        lambd, self.norm_pix_loss = check_positive("lambd", lambd), bool(norm_pix_loss)
        if norm_pix_loss and in_chans * patch[0] ** 2 == 1:
            raise ValueError("norm_pix_loss is True, and a patch of one value has no deviation to be normalised by")

        self.patch_embed = PatchEmbed(image, patch, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + 1, width), requires_grad=False)  # unused, as is decoder_embed
        self.blocks = encoder_blocks(width, depth, num_heads, lambd, backend, stream)
        self.norm = norm_layer(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, side**2 + 1, width), requires_grad=False)
        self.decoder_blocks = decoder_blocks(width, layers, heads, backend, stream)
        self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, patch[0] ** 2 * in_chans)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fixes the positions and draws what is no dictionary, as the constructor does."""
        positions = sine_positions(self.pos_embed.shape[-1], self.patch_embed.grid_size[0])
        self.pos_embed.copy_(positions)
        self.decoder_pos_embed.copy_(positions)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_initialize)

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.patch_embed.proj.in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image."""
        return self.patch_embed.img_size

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, pred, mask) of images (batch, channels, height, width).

        Args:
            imgs: of `img_size`.
            mask_ratio: the share of patches that is masked, from 0 to 1; int(patches · (1 − mask_ratio)) stay. With none masked
                the loss is NaN, a mean of nothing, as in the published class.
            noise: (batch, patches) numbers, of which an image's smallest tell the patches that stay; None: drawn by
                `torch.rand`, as in the published class.

        Returns:
            loss: (), mean squared error of the masked patches; pred: (batch, patches, patch² · channels), of all; mask: (batch,
            patches) float32, 1 where a patch was masked.

        Raises:
            TypeError: the images are no dense tensor of real floating point, or, outside autocast, not of the model's dtype.
            ValueError: their shape or device does not fit, or the shape of `noise`, or `mask_ratio` is no share.
        """
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, latent, pred, mask), pred, mask

    def forward_encoder(self, x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(all tokens behind the encoder, (batch, 1 + patches, dim), the mask, the order that takes shuffled patches back)."""
        self._check_images(x)
        patches = self.patch_embed(x)
        mask, ids_restore = self._draw_mask(patches, mask_ratio, noise)
        tokens = torch.where(mask[..., None] > 0, self.mask_token, patches)
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1) + self.decoder_pos_embed
        return self.norm(_run(self.blocks, tokens)), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor | None = None) -> Tensor:
        """All tokens behind the encoder to predicted patches, (batch, patches, patch² · channels)."""
        tokens = self.decoder_norm(_run(self.decoder_blocks, x))
        return applied(self.decoder_pred, tokens, getattr(self.decoder_blocks, "backend", "reference"))[:, 1:]

    def forward_loss(self, imgs: Tensor, latent: Tensor | None, pred: Tensor, mask: Tensor) -> Tensor:
        """The mean squared error of `pred` where `mask` is 1; `latent` counts for nothing."""
        return (self._patch_losses(imgs, pred) * mask).sum() / mask.sum()

    def image_losses(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """(batch,), the loss of each image by itself; 0 where none of its patches is masked."""
        return (self._patch_losses(imgs, pred) * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)

    def _patch_losses(self, imgs: Tensor, pred: Tensor) -> Tensor:
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        return ((pred - target) ** 2).mean(dim=-1)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """(the patches that stay, shuffled; the mask; the order that takes them back) of patches (batch, patches, dim)."""
        mask, ids_restore = self._draw_mask(x, mask_ratio)
        kept = torch.argsort(ids_restore, dim=1)[:, : _kept(x.shape[1], mask_ratio), None]
        return torch.gather(x, 1, kept.expand(-1, -1, x.shape[2])), mask, ids_restore

    def patchify(self, imgs: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, patches, patch² · channels), values by row, column and channel; raises
        ValueError where patches do not divide the image."""
        p = self.patch_embed.patch_size[0]
        if imgs.dim() != 4 or any(side % p for side in imgs.shape[2:]):
            raise ValueError(f"the image has shape {tuple(imgs.shape)}, which patches of {times((p, p))} do not divide")
        grid = imgs.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return torch.einsum("nchpwq->nhwpqc", grid).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches of a square image back to (batch, channels, height, width); raises ValueError where they make no square."""
        p = self.patch_embed.patch_size[0]
        if x.dim() != 3 or math.isqrt(x.shape[1]) ** 2 != x.shape[1] or x.shape[2] % p**2:
            words = f"it must be (batch, side², {p * p} · channels)"
            raise ValueError(f"patches of shape {tuple(x.shape)} make no square image; {words}")
        side = math.isqrt(x.shape[1])
        grid = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
        return torch.einsum("nhwpqc->nchpwq", grid).flatten(4).flatten(2, 3)

    def encoder(self) -> Encoder:
        """Its encoder on whole images, no patch masked, as the views of `crate_fast.inspection` look at it."""
        blocks: list[Any] = list(self.blocks)
        name, layers = "the encoder of a CRATE-MAE, no patch masked", [block.layers[0] for block in blocks]
        sizes = self.channels, self.image_size, self.patch_embed.patch_size
        return Encoder(name, layers, self.heads, *sizes, self.patch_embed, self.cls_token, self.decoder_pos_embed)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """The tokens of whole images that enter the encoder, (batch, 1 + patches, dim), with positions for their size."""
        _, _, height, width = x.shape
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.interpolate_pos_encoding(x, height, width)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Positions for the tokens x of images of w × h pixels, bicubically, scaled as in the published class."""
        positions = self.decoder_pos_embed
        count = positions.shape[1] - 1
        if x.shape[1] - 1 == count and w == h:
            return positions
        p, side = self.patch_embed.patch_size[0], math.sqrt(count)
        grid = positions[:, 1:].unflatten(1, (math.isqrt(count), -1)).permute(0, 3, 1, 2)
        factors = (w // p + 0.1) / side, (h // p + 0.1) / side
        moved = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat((positions[:, :1], moved.flatten(2).transpose(1, 2)), dim=1)

    def get_selfattention_enc(self, x: Tensor, layer: int = 10) -> Tensor:
        """The probabilities, (batch, heads, tokens, tokens), of whole images in the encoder's layer with this index from 0."""
        return self._until(x, layer)(return_attention=True)

    def get_last_key_enc(self, x: Tensor, layer: int = 10) -> Tensor:
        """The projections on all subspaces, (batch, tokens, embed_dim), of whole images in the layer with this index from 0."""
        return self._until(x, layer)(return_key=True)

    def flops(self) -> int:
        """Multiplications of the products of one image, forward: embedding, layers of both, prediction."""
        tokens, dim = self.decoder_pos_embed.shape[1:]
        blocks: list[Any] = [*self.blocks, *self.decoder_blocks]
        layers = sum(block.layers[0].flops(tokens) for block in blocks)
        return layers + (2 * tokens - 1) * dim * self.decoder_pred.out_features

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings, which most recipes for transformers keep from decaying, as they do norms and biases."""
        return {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has a layer keep for its backward pass what enters it alone, and compute the rest there again; or all."""
        self.blocks.grad_checkpointing = self.decoder_blocks.grad_checkpointing = bool(enable)

    def _until(self, x: Tensor, layer: int) -> Callable[..., Tensor]:
        if not hasattr(layer, "__index__") or not 0 <= layer < len(self.blocks):
            raise ValueError(f"layer is {shown(layer)}; it must be a whole number from 0 to {len(self.blocks) - 1}")
        tokens = self.prepare_tokens(x)
        for index in range(layer):
            tokens = self.blocks[index](tokens)
        return partial(self.blocks[layer], tokens)

    def _draw_mask(self, patches: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mask, the order that takes shuffled patches back) with the published class's draws; no patch is moved for them."""
        batch, count, _ = patches.shape
        kept = _kept(count, mask_ratio)
        if noise is None:
            noise = torch.rand(batch, count, device=patches.device)
        else:
            _check_noise(noise, patches)
        ids_restore = torch.argsort(torch.argsort(noise, dim=1, stable=True), dim=1)
        return (ids_restore >= kept).to(torch.get_default_dtype()), ids_restore

    def _check_images(self, image: Tensor) -> None:
        check_tensor("the image", image)
        model, size = self.cls_token, self.patch_embed.img_size
        if image.device != model.device:
            raise ValueError(f"the image is on {image.device} and the model on {model.device}; they must be on the same device")
        if image.dtype != model.dtype and not autocasts(image.device.type):
            raise TypeError(f"the image is {image.dtype} and the model {model.dtype}; outside autocast they must be the same")
        wanted = (self.patch_embed.proj.in_channels, *size)
        if image.dim() != 4 or image.shape[1:] != wanted:
            raise ValueError(f"the image has shape {tuple(image.shape)}; it must be (batch, {', '.join(map(str, wanted))})")


def _check_noise(noise: Tensor, patches: Tensor) -> None:
    """Raises TypeError or ValueError where `noise` gives no number for each of `patches`, (batch, patches, dim)."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise is a {type(noise).__name__}; it must be a tensor")
    if noise.shape != patches.shape[:2] or noise.device != patches.device:
        words = f"it must be (batch, patches), {tuple(patches.shape[:2])}, on {patches.device}"
        raise ValueError(f"noise has shape {tuple(noise.shape)} on {noise.device}; {words}")


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of the values of each patch, (batch, patches, 1), by which `norm_pix_loss` normalises them."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1.0e-6) ** 0.5


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def _check_sizes(in_chans: int, dim: int, depths: tuple[int, int], heads: tuple[int, int]) -> None:
    """Raises TypeError or ValueError where a size is no whole number, too small, or does not divide the width."""
    named = {"in_chans": in_chans, "embed_dim": dim, "num_heads": heads[0], "decoder_num_heads": heads[1]}
    for name, value in (named | {"depth": depths[0], "decoder_depth": depths[1]}).items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {shown(value)}; it must be an integer")
        if value < (name in named):
            raise ValueError(f"{name} is {shown(value)}; it must be at least {int(name in named)}")
    if dim % 4:
        raise ValueError(f"embed_dim is {shown(dim)}; it must be a multiple of 4, for the positions")
    for name in ("num_heads", "decoder_num_heads"):
        if dim % named[name]:
            raise ValueError(f"{name} is {shown(named[name])}; it must divide embed_dim, {dim}")


def _kept(patches: int, mask_ratio: float) -> int:
    """How many patches stay; raises TypeError or ValueError where `mask_ratio` is no share."""
    ratio = check_number("mask_ratio", mask_ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_ratio is {ratio}; it must be from 0 to 1")
    return int(patches * (1 - ratio))


def _run(blocks: nn.Module, x: Tensor) -> Tensor:
    """Through all blocks, also where another list stands in their place."""
    if isinstance(blocks, nn.ModuleList) and type(blocks).forward is nn.Module.forward:
        for block in blocks:
            x = block(x)
        return x
    return blocks(x)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.zeros_(module.bias)
        nn.init.ones_(module.weight)


def build_mae(size: str, **options) -> CRATEMAE:
    """A CRATE-MAE of a published size ("tiny", "small", "base", "large") for 224 px, unless `options` differ."""
    if size not in MAE_SIZES:
        raise ValueError(f"size is {size!r}; allowed are {', '.join(map(repr, MAE_SIZES))}")
    arguments: dict[str, Any] = dict(MAE_SIZES[size])
    return CRATEMAE(**arguments | options)


def mae_crate_tiny(**options) -> CRATEMAE:
    """Width 384, 12 and 12 layers, 6 heads; 11,555,328 parameters, fixed positions among them. `options`: of `CRATEMAE`."""
    return build_mae("tiny", **options)


def mae_crate_small(**options) -> CRATEMAE:
    """Width 576, 12 and 12 layers, 12 heads; 25,405,824 parameters. `options`: of `CRATEMAE`."""
    return build_mae("small", **options)


def mae_crate_base(**options) -> CRATEMAE:
    """Width 768, 12 and 12 layers, 12 heads; 44,638,464 parameters. `options`: of `CRATEMAE`."""
    return build_mae("base", **options)


def mae_crate_large(**options) -> CRATEMAE:
    """Width 1024, 24 and 24 layers, 16 heads. `options`: of `CRATEMAE`."""
    return build_mae("large", **options)
