"""A layer of CRATE as modules, with the published names, parameters and order of random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import functional
from ..backend import autocasts, choose_backend, computes_now, is_transformed
from ..reference import constant_to_compile
from .applied import applied
from .cpu_inference import evaluated_layer
from .plain import (
    Place,
    PlainTree,
    has_global_hooks,
    has_weights,
    is_exported,
    is_plain,
    is_sharded,
    keeps_forwards,
    linear_at,
    norm_at,
    same_place,
)
from .step import STEPS, SparseStep


class PreNorm(nn.Module):
    """`fn` of the layer-normalised input; (batch, tokens, dim) to the same."""

    fn: Any  # in a layer an Attention or a SparseStep, which its place tells
    _modules: dict[str, Any]  # read as it is, here and below, since attributes of modules are found slowly

    def __init__(self, dim: int, fn: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


class ScaledPreNorm(PreNorm):
    """LayerScale (arXiv:2103.17239): `PreNorm` times `scale`, (dim,), learned, and `init_values` at first."""

    def __init__(self, dim: int, fn: nn.Module, eps: float, init_values: float) -> None:
        super().__init__(dim, fn, eps)
        self.scale = nn.Parameter(torch.empty(dim))
        self.init_values = init_values
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets `scale` as it was at first."""
        nn.init.constant_(self.scale, self.init_values)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return super().forward(x, **kwargs) * self.scale


class Attention(nn.Module):
    """The MSSA step without its residual: project on the subspaces, attend, project back (arXiv:2306.01129, equation 12).

    Args:
        dim: width of a token.
        heads: number of subspaces.
        dim_head: dimension of a subspace.
        dropout: on the attention probabilities, and again after the projection back.
        backend: see `crate_fast.choose_backend`.
        out_bias: whether the projection back has a bias.
    """

    _modules: dict[str, Any]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        backend: str = "auto",
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.backend = backend
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner_dim, bias=False)
        if heads == 1 and dim_head == dim:
            self.to_out: nn.Module = nn.Identity()
        else:
            self.to_out = nn.Sequential(nn.Linear(inner_dim, dim, bias=out_bias), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        w = applied(self.qkv, x, self.backend)
        self._check_part(w)
        openly = self._needs_probabilities()
        out = self._attend_openly(w) if openly else functional.mssa(w, self.heads, self.scale, self.backend)
        return applied(self.to_out, out, self.backend)

    def _check_part(self, w: Tensor) -> None:
        """Raises ValueError where w has other than all of the values of qkv, as in a part of a model parallel by tensors, and
        `heads` are not those of them: split into narrower heads, they would give other numbers in silence."""
        here, all_of_them = w.shape[-1], getattr(self.qkv, "out_features", w.shape[-1])
        if here == all_of_them or type(self.scale) is not float or not self.scale > 0:
            return
        width = max(1, round(self.scale**-2))
        if here != self.heads * width:
            raise ValueError(
                f"w has {here} of the {all_of_them} values that qkv gives, and heads is {self.heads}; of a width of {width} "
                f"it must be {here // width} where qkv is one of several parts"
            )

    def _needs_probabilities(self) -> bool:
        """Whether the matrix of probabilities must exist: it is dropped from, or somebody watches it."""
        plain = is_plain(self.attend, nn.Softmax) and _is_over_keys(self.attend) and is_plain(self.dropout, nn.Dropout)
        return not plain or has_global_hooks() or (self.training and self.dropout.p > 0)

    def _attend_openly(self, w: Tensor) -> Tensor:
        split = w.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = torch.matmul(split, split.transpose(-1, -2)) * self.scale
        return torch.matmul(self.dropout(self.attend(scores)), split).transpose(1, 2).flatten(2)


class Layer(nn.Sequential):
    """One step of compression and one of sparsification, a `SparseStep`: x ← ISTA(x + MSSA(x)), or, of a step with a residual,
    z ← x + MSSA(x), x ← z + step(z).

    Indexed like the published list of the two; FSDP2 of torch 2.11 takes no nn.ModuleList, even with a forward.
    """

    frozen: dict[torch.dtype, tuple] | None = None
    """What `fresh_weights` gave, by the operands' dtype, in a copy that `crate_fast.freeze` made; else None."""
    drop_path: float = 0.0
    """In training, the share of a batch's images for which this layer leaves out a step with a residual; see `drop_path`."""
    residual: bool = False
    """Whether the step of sparsification has a residual, as `SparseStep.residual` says."""
    _modules: dict[str, Any]

    if TYPE_CHECKING:  # nn.Sequential tells no more of the two than that they are modules

        def __getitem__(self, idx: int | slice) -> Any: ...
        def __iter__(self) -> Iterator[PreNorm]: ...

    def __init__(self, mssa: PreNorm, sparse: PreNorm) -> None:
        super().__init__(mssa, sparse)
        self.residual = isinstance(sparse.fn, SparseStep) and sparse.fn.residual

    def forward(self, x, run: Callable | None = None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """(batch, tokens, dim) to the same; with `run` what that makes of this layer and x, see `through`."""
        if run is not None:
            return run(self, x)
        if evaluates(x) and self.is_evaluated(x):
            return self.evaluated(x)
        share = self.drop_path if self.training else 0.0
        z = drop_path(self[0](x), share) + x
        return drop_path(self[1](z), share) + z if self.residual else self[1](z)

    def evaluated(self, x: Tensor) -> Tensor:
        """`forward` of what `evaluates` and `is_evaluated` have let through."""
        mssa, sparse = self.parts()
        attention, step = mssa["fn"], sparse["fn"]
        numbers = (attention.heads, attention.scale, mssa["norm"].eps, sparse["norm"].eps)
        return evaluated_layer(x, list(self.weights()), *numbers, step.name, step.step_size, step.lambd)

    def through(self, run: Callable, x):
        """`run(self, x)`, as a call of this layer where it is sharded, so that its weights are whole."""
        return self(x, run) if self.is_sharded() else run(self, x)

    def is_sharded(self) -> bool:
        """Whether `torch.distributed.fsdp.fully_shard` has taken this layer, and nobody watches it."""
        return is_sharded(self, Layer)

    def is_evaluated(self, x: Tensor) -> bool:
        """Whether `evaluated_layer` may stand for these modules where `evaluates` lets it: nobody watches them."""
        return not (self.residual or self.training) and self.runs_unwatched(x)

    def runs_unwatched(self, x: Tensor) -> bool:
        """Whether modules may be passed by on "torch": all are plain and nobody watches, and the backend, asked for or chosen,
        is that one."""
        if x.dim() != 3 or x.numel() == 0 or has_global_hooks() or not self.is_fusable(("auto", "torch")):
            return False
        attention = self.parts()[0]["fn"]
        weights = self.weights()
        if not self.fits(weights, x.shape[-1]) or not same_place(weights) or weights[0].device != x.device:
            return False  # the modules say what is wrong
        return choose_backend(attention.backend, x, attention.qkv.out_features // attention.heads).name == "torch"

    def fits(self, weights: tuple[Tensor, ...], dim: int) -> bool:
        """Whether the sizes of its `weights` are those of a layer of width `dim`, and vectors in one piece, as what passes
        modules by takes them to be."""
        mssa, sparse = self.parts()
        attention, inner = mssa["fn"], weights[2].shape[0]
        heads, scale = attention.heads, attention.scale
        if type(heads) is not int or heads < 1 or inner % heads or not isinstance(scale, (int, float)) or not abs(scale) < inf:
            return False
        of_step = sparse["fn"].shapes(dim).values()
        vectors = len(weights) - len(of_step) - 4  # of the second LayerNorm, and the projection's bias where it has one
        for w, shape in zip(weights, ((dim,), (dim,), (inner, dim), (dim, inner), *((dim,),) * vectors, *of_step), strict=True):
            if w.shape != shape or (len(shape) == 1 and not w.is_contiguous()):
                return False
        return True

    def is_fusable(self, backends: tuple[str, ...] = ("auto", "triton")) -> bool:
        """Whether one fused computation may stand for all modules of this layer: none is hooked, changed or dropping out,
        or dropping a path, and their backends are among `backends`."""
        if not self._is_plain() or (torch.compiler.is_compiling() and not keeps_forwards(*self.modules())):
            return False
        mssa, sparse = self.parts()
        attention, step = mssa["fn"], sparse["fn"]
        if step.backend not in backends or (self.training and self.drop_path > 0):
            return False
        return fuses_attention(attention, backends, unbiased=self.residual)

    # Constant to torch.compile, as hooks are to it anyway, and it guards classes itself: else it guards 500 facts, 0.27 ms
    # before each call of a layer.
    @constant_to_compile
    def _is_plain(self) -> bool:
        sharded = self.is_sharded()
        if not (sharded or is_plain(self, Layer)) or not _PLAIN.holds(self, sharded):
            return False
        step = self.parts()[1]["fn"]
        return has_weights(step, *step.weight_names)

    def class_token(self, x: Tensor) -> Tensor:
        """The class token that this layer makes of x: (batch, tokens, dim) to (batch, 1, dim), all it reads computed once.

        After the last layer nobody reads the other tokens, so what only they need is left out: nearly all of the layer.
        """
        mssa, sparse = self
        attention = mssa.fn
        out = functional.class_token_mssa(mssa.norm(x), attention.qkv.weight, attention.heads, attention.scale)
        z = applied(attention.to_out, out, attention.backend) + x[:, :1]
        return sparse(z) + z if self.residual else sparse(z)

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters: `kernels.LayerWeights` in order, with the step's weights where that has M; no bias where none is."""
        mssa, sparse = self.parts()
        attention = mssa["fn"]._modules
        norm1, project, norm2 = (part._parameters for part in (mssa["norm"], attention["qkv"], sparse["norm"]))
        out, step = attention["to_out"]._modules["0"]._parameters, sparse["fn"]
        of_step = [step._parameters[name] for name in step.weight_names]
        vectors = norm2["weight"], norm2["bias"]
        bias = () if out["bias"] is None else (out["bias"],)
        return norm1["weight"], norm1["bias"], project["weight"], out["weight"], *bias, *vectors, *of_step

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The modules of its two halves, by name, found faster than as attributes."""
        mssa, sparse = self._modules.values()
        return mssa._modules, sparse._modules

    def settings(self):
        """The numbers that are not learned, as `kernels.LayerSettings`."""
        from ..kernels import LayerSettings

        mssa, sparse = self.parts()
        attention, step = mssa["fn"], sparse["fn"]
        shrinkage = step.step_size * step.lambd
        return LayerSettings(attention.heads, attention.scale, mssa["norm"].eps, sparse["norm"].eps, shrinkage)

    def flops(self, tokens: int) -> int:
        """Multiplications of the products of `tokens` tokens, forward: two projections, two products of attention, the step."""
        mssa, sparse = self
        inner, dim = mssa.fn.qkv.weight.shape
        return tokens * (2 * inner * (dim + tokens) + sparse.fn.flops(dim))


def evaluates(x: Tensor) -> bool:
    """Whether `evaluated_layer` may stand for layers of x at all: nothing is differentiated, recorded under autocast or
    exported. Asked before weights are looked at: a trace records that, and PyTorch makes two to compare."""
    if torch.is_grad_enabled() or is_exported() or is_transformed():
        return False
    return not autocasts(x.device.type) or _is_cast_now(x)


def drop_path(step: Tensor, share: float) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): a residual's `step`, (batch, tokens, dim), zero for each image with probability
    `share`, and 1 / (1 − share) times as large for the others, so that its mean is what it was; `step` itself for 0."""
    if share == 0:
        return step
    kept = step.new_empty((step.shape[0], 1, 1)).bernoulli_(1 - share)
    return step * (kept / (1 - share) if share < 1 else kept)


def fuses_attention(attention: Attention, backends: tuple[str, ...], unbiased: bool = False) -> bool:
    """Whether a fused computation may stand for a plain `attention`: it drops nothing out and its backend is among these;
    `unbiased`: its projection back may lack a bias."""
    if attention.backend not in backends:
        return False
    inner = attention._modules
    linear, dropout = inner["to_out"]._modules.values()
    if any(d.training and d.p > 0 for d in (inner["dropout"], dropout)):
        return False
    biases = inner["qkv"]._parameters["bias"], linear._parameters["bias"]
    return _is_over_keys(inner["attend"]) and biases[0] is None and (biases[1] is not None or unbiased)


def attention_places(path: str) -> tuple[Place, ...]:
    """What has to be below an `Attention` at `path`."""
    return (
        Place(f"{path}.attend", (nn.Softmax,)),
        Place(f"{path}.dropout", (nn.Dropout,)),
        linear_at(f"{path}.qkv"),
        Place(f"{path}.to_out", (nn.Sequential,)),
        linear_at(f"{path}.to_out.0"),
        Place(f"{path}.to_out.1", (nn.Dropout,)),
    )


_PLAIN = PlainTree(  # what is below a layer that one computation may stand for
    Place("0", (PreNorm,)),
    norm_at("0.norm"),
    Place("0.fn", (Attention,)),
    *attention_places("0.fn"),
    Place("1", (PreNorm,)),
    norm_at("1.norm"),
    Place("1.fn", STEPS.values()),
)


def _is_cast_now(x: Tensor) -> bool:
    """Whether autocast on a CPU casts what is made of x as it is called: an operator that is recorded would run without."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and computes_now(x) and not is_in_torch_dispatch_mode()


def _is_over_keys(softmax: nn.Module) -> bool:
    return type(softmax) is nn.Softmax and softmax.dim == -1
