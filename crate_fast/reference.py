"""The published mathematics of CRATE, step by step, in plain PyTorch at any precision.

This file defines correctness: tests and benchmarks compare everything else with it. It is written to be read beside the
paper (Yu et al., "White-Box Transformers via Sparse Rate Reduction", arXiv:2306.01129), imports torch alone, and makes no
attempt to be fast. `CRATE` here has the constructor, the parameter names and the order of random draws of the published
class, so one seed gives one model in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float64).max


def mssa(w: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Multi-head subspace self-attention, equation (12) of the paper: softmax(w wᵀ · scale) w for each head.

    Args:
        w: (batch, tokens, heads × head width), the tokens projected on every head's subspace: query, key and value in one.
        heads: number of heads.
        scale: factor on the scores; 1/sqrt(head width) when None.

    Returns:
        (batch, tokens, heads × head width), in w's dtype (under autocast, in the autocast dtype).
    """
    batch, tokens, width = w.shape
    w = w.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
    probabilities = attention_probabilities(w, scale)
    return torch.matmul(probabilities, w).transpose(1, 2).reshape(batch, tokens, width)


def attention_probabilities(w: Tensor, scale: float | None = None) -> Tensor:
    """softmax(w wᵀ · scale) over the last axis, for w of shape (batch, heads, tokens, head width).

    Under autocast on a GPU PyTorch takes the softmax in float32; asked for by name, the CPU does the same.
    """
    scores = torch.matmul(w, w.transpose(-1, -2)) * (w.shape[-1] ** -0.5 if scale is None else scale)
    device = w.device.type
    autocast = has_autocast(device) and torch.is_autocast_enabled(device) and scores.dtype != torch.float64
    return torch.softmax(scores, dim=-1, dtype=torch.float32 if autocast else None)


def constant_to_compile(function):
    """`torch.compiler.assume_constant_result`, without its import of all of the compiler, which takes as long as torch's."""
    function._dynamo_marked_constant = True
    return function


@constant_to_compile
def has_autocast(device: str) -> bool:
    """Whether a type of device has autocast at all; "meta" has none. A constant, since torch.compile of 2.11 cannot ask."""
    return torch.amp.is_autocast_available(device)


def ista(h: Tensor, weight: Tensor, step_size: float = 0.1, lambd: float = 0.1) -> Tensor:
    """One ISTA step, equation (17) of the paper: relu(h + η(h D − h Dᵀ D) − ηλ) for tokens in rows.

    Args:
        h: (..., dim) tokens.
        weight: (dim, dim), the dictionary D.
        step_size: η.
        lambd: λ, the price of a non-zero entry.

    Returns:
        (..., dim), at least 0 everywhere.

    Raises:
        ValueError: η or λ is negative or not finite.
    """
    check_numbers(step_size, lambd)
    correlation = nn.functional.linear(nn.functional.linear(h, weight), weight.t())
    projection = nn.functional.linear(h, weight.t())
    update = step_size * (projection - correlation) - step_size * lambd
    return torch.relu(h + update)


def check_numbers(step_size: float, lambd: float) -> None:
    """Raises ValueError where η or λ, unless they are tensors, are negative or not finite."""
    for name, number in (("step_size", step_size), ("lambd", lambd)):
        if isinstance(number, int | float) and not 0 <= number <= LARGEST:
            said = number if isinstance(number, float) else "beyond any float" if number > 0 else "a negative whole number"
            raise ValueError(f"{name} is {said}; it must be finite and at least 0")


class PreNorm(nn.Module):
    """`fn` of the layer-normalised input."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Attention(nn.Module):
    """Projection on the subspaces, MSSA, and the projection back, in CRATE-α without a bias."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float, out_bias: bool = True) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False)
        if heads == 1 and dim_head == dim:
            self.to_out: nn.Module = nn.Identity()
        else:
            self.to_out = nn.Sequential(nn.Linear(inner, dim, bias=out_bias), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x)
        batch, tokens, width = w.shape
        w = w.reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        probabilities = self.dropout(attention_probabilities(w, self.scale))
        out = torch.matmul(probabilities, w).transpose(1, 2).reshape(batch, tokens, width)
        return self.to_out(out)


class FeedForward(nn.Module):
    """One ISTA step on a learned dictionary."""

    def __init__(self, dim: int, step_size: float, lambd: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        check_numbers(step_size, lambd)
        self.step_size = step_size
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        return ista(x, self.weight, self.step_size, self.lambd)


class Transformer(nn.Module):
    """`depth` layers, each x ← ISTA(x + MSSA(x))."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, dropout: float, ista: float, lambd: float) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()  # of pairs, which its type cannot say
        for _ in range(depth):
            attention = PreNorm(dim, Attention(dim, heads, dim_head, dropout))
            self.layers.append(nn.ModuleList([attention, PreNorm(dim, FeedForward(dim, ista, lambd))]))

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.layers:
            x = sparsify(attention(x) + x)
        return x


class Patches(nn.Module):
    """(batch, channels, height, width) to (batch, patches, patch height × patch width × channels), row by row."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, image: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        rows, columns = height // self.height, width // self.width
        patches = image.reshape(batch, channels, rows, self.height, columns, self.width)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


class CRATE(nn.Module):
    """The published CRATE classifier; `lambd` is the one addition (0.1 there, fixed)."""

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
    ) -> None:
        super().__init__()
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        patch_height, patch_width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        patch_dim = channels * patch_height * patch_width
        self.to_patch_embedding = nn.Sequential(
            Patches(patch_height, patch_width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        patches = (height // patch_height) * (width // patch_width)
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, dropout, ista, lambd)
        self.pool = pool
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        x = self.to_patch_embedding(image)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.dropout(x + self.pos_embedding[:, : x.shape[1]])
        x = self.transformer(x)
        return self.mlp_head(x.mean(dim=1) if self.pool == "mean" else x[:, 0])


class DecoderStep(nn.Module):
    """The step of CRATE-MAE's decoder, from codes to what they stand for: h Wᵀ."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class MAEBlock(nn.Module):
    """A layer of CRATE-MAE under the published names: of the encoder x ← ISTA(x + MSSA(x)), of the decoder x̂ = LN(x) Wᵀ, then
    x ← x̂ − MSSA(x̂)."""

    def __init__(self, dim: int, heads: int, lambd: float | None) -> None:
        super().__init__()
        self.encodes = lambd is not None
        if lambd is not None:
            parts = [PreNorm(dim, Attention(dim, heads, dim // heads, 0.0)), PreNorm(dim, FeedForward(dim, 0.1, lambd))]
        else:
            parts = [PreNorm(dim, DecoderStep(dim)), PreNorm(dim, Attention(dim, heads, dim // heads, 0.0))]
        self.layers: Any = nn.ModuleList([nn.ModuleList(parts)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers[0]
        if self.encodes:
            return second(first(x) + x)
        x = first(x)
        return x - second(x)


class CRATEMAE(nn.Module):
    """The published CRATE-MAE (Pai et al., arXiv:2404.02446) on square images, encoder and decoder of one size."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        in_chans: int = 3,
        norm_pix_loss: bool = False,
        lambd: float = 0.5,
    ) -> None:
        super().__init__()
        side, dim = img_size // patch_size, embed_dim
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.patches = Patches(patch_size, patch_size)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), sines(side, dim)
        self.blocks = nn.ModuleList([MAEBlock(dim, num_heads, lambd) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, dim)
        self.mask_token, self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), sines(side, dim)
        self.decoder_blocks = nn.ModuleList([MAEBlock(dim, num_heads, None) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.view(dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        patches = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2)
        batch, count, _ = patches.shape
        shuffled = torch.argsort(torch.rand(batch, count, device=imgs.device), dim=1)
        mask = torch.ones(batch, count, device=imgs.device)
        mask.scatter_(1, shuffled[:, : int(count * (1 - mask_ratio))], 0.0)
        x = torch.where(mask[:, :, None] == 1, self.mask_token, patches)
        x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1) + self.decoder_pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = self.patches(imgs)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum(), pred, mask


def sines(side: int, dim: int) -> nn.Parameter:
    """Fixed positions, (1, 1 + side², dim): sines and cosines of the column, then of the row; 0 for the class token."""
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in (column, row)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return nn.Parameter(torch.cat((waves.new_zeros(1, dim), waves)).float()[None], requires_grad=False)
