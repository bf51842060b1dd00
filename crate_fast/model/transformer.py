"""The layers of CRATE in a row, those that can be run by fused kernels, the others by their modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backend import autocasts, choose_backend
from ..modules.kernel_weights import kernel_weights, make_weights
from ..modules.layer import Attention, Layer, PreNorm, ScaledPreNorm, evaluates
from ..modules.plain import has_global_hooks, same_place
from ..modules.step import STEPS
from ..ranges import in_range, is_profiled

if TYPE_CHECKING:
    from ..kernels import StackState
    from ..modules.kernel_weights import Weights


class Stack(nn.Module):
    """Layers in a row, however they are named, run by fused kernels where that is possible and nobody could tell."""

    layers: Any  # of modules, a `Layer` each where it may be fused
    backend: str
    stream: str
    grad_checkpointing: bool = False
    """Whether what a layer keeps for its backward pass is computed again there, from what enters it."""

    def run(self, x: Tensor, pool: str | None, layers: Iterable[nn.Module] | None = None) -> Tensor:
        """The layers, or those of them that are given, then the pooling: (batch, dim) with pool "cls" or "mean", all tokens
        with None.

        Pooling belongs here because a fused run can pool what it holds in 16 bit without writing all tokens in 32.
        """
        way = self._ways(x)
        runs: list[tuple[str, list[Any]]] = [  # of whatever modules there are, where they go by them
            (name, list(layers)) for name, layers in groupby(self.layers if layers is None else layers, key=way)
        ]
        for index, (name, layers) in enumerate(runs):
            last = index == len(runs) - 1
            if name == "fused":
                x = self._run_fused(layers, x, pool if last else None)
                if last:
                    return x
                continue
            evaluated, end = name == "evaluated", layers[-1]
            for layer in layers[:-1]:
                x = self._call(layer, layer.evaluated if evaluated else layer, x)
            if last and pool == "cls" and (evaluated or (isinstance(end, Layer) and end.runs_unwatched(x))):
                x = self._call(end, end.through, Layer.class_token, x)
            else:
                x = self._call(end, end.evaluated if evaluated else end, x)
        return pool_tokens(x, pool)

    def _ways(self, x: Tensor) -> Callable[[nn.Module], str]:
        """Tells of a layer how it is run on x: "fused" with its neighbours, "evaluated" as `Layer.evaluated`, or by its
        "modules". All layers are asked before the first is run: between products of an image, whose data take the cache, a
        CPU takes three times as long to ask."""
        watched = x.dim() != 3 or x.numel() == 0 or has_global_hooks()
        fuses = not watched and (self.backend == "triton" or choose_backend(self.backend, x).name == "triton")
        evaluated = not watched and evaluates(x)
        cast, chosen = autocasts(x.device.type), {}

        def way(layer: nn.Module) -> str:
            if fuses and self._fuses(layer, x, cast, chosen):
                return "fused"
            if evaluated and isinstance(layer, Layer) and not layer.is_sharded() and layer.is_evaluated(x):
                return "evaluated"
            return "modules"

        return way

    def _call(self, layer: nn.Module, function: Callable, *arguments, draws: bool = True):
        """`function` of `arguments`, which computes `layer`; with `grad_checkpointing` its backward pass calls it again.

        draws: whether it may draw random numbers, whose generators are then kept, which takes time and no CUDA graph takes.
        """
        if is_profiled():
            index = next((str(index) for index, each in enumerate(self.layers) if each is layer), "other")
            return in_range(f"layers.{index}", partial(self._call_unnamed, draws=draws), function, *arguments)
        return self._call_unnamed(function, *arguments, draws=draws)

    def _call_unnamed(self, function: Callable, *arguments, draws: bool):
        if self._checkpoints():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=draws)
        return function(*arguments)

    def _checkpoints(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def _fuses(self, layer: nn.Module, x: Tensor, cast: bool, chosen: dict[int, str]) -> bool:
        """Whether kernels run `layer` on x, `cast` by autocast or not; `chosen` is filled with the backend by head width."""
        if not isinstance(layer, Layer) or layer.residual or not layer.is_fusable():
            return False
        mssa, sparse = layer.parts()
        if not sparse["fn"].folds:
            return False
        weights = layer.weights()
        if not layer.fits(weights, x.shape[-1]) or not same_place(weights) or weights[0].device != x.device:
            return False  # the composed path says what is wrong
        if not cast and weights[0].dtype != x.dtype:
            return False
        head_width = weights[2].shape[0] // mssa["fn"].heads
        if head_width not in chosen:
            chosen[head_width] = choose_backend(self.backend, x, head_width).name
        return chosen[head_width] == "triton"

    def _run_fused(self, layers: list[Layer], x: Tensor, pool: str | None) -> Tensor:
        from ..kernels import enter_stack, leave_stack

        device = x.device.type
        autocast = autocasts(device)
        activation_dtype = operand_dtype = x.dtype
        if autocast:
            activation_dtype, operand_dtype = stack_dtypes(self.stream, torch.get_autocast_dtype(device))
        result = torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype
        with torch.autocast(device, enabled=False):
            together = [layer for layer in layers if not layer.is_sharded()]
            weights = iter(in_range("weights", kernel_weights, together, operand_dtype) if together else ())
            state = enter_stack(x, activation_dtype)
            called = is_profiled() or self._checkpoints()  # else through nothing: 1 µs a layer
            for layer in layers:
                if layer.is_sharded():
                    state = self._call(layer, layer, state, partial(_run_alone, operand_dtype=operand_dtype), draws=False)
                elif called:
                    state = self._call(layer, _run_layer, layer, state, next(weights), draws=False)
                else:
                    state = _run_layer(layer, state, next(weights))
            return leave_stack(state, result, pool, scaled=operand_dtype == torch.float16)


class Transformer(Stack):
    """`depth` layers on (batch, tokens, dim), each run by fused kernels where that is possible and nobody could tell.

    Args:
        dim, depth, heads, dim_head: sizes.
        dropout: in the attention.
        ista, lambd: step size η and threshold λ of the ISTA step.
        backend: see `crate_fast.choose_backend`.
        stream: dtype of the activations that fused layers keep under autocast; see `crate_fast.CRATE`.
        step: name of the step of sparsification, in `crate_fast.modules.STEPS`.
        drop_path: stochastic depth of the last layer; see `crate_fast.CRATE`.
        eps: of the layers' LayerNorms.
        out_bias: whether the attention's projection back has a bias.
        init_values: of LayerScale; None: without it.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        ista: float = 0.1,
        lambd: float = 0.1,
        backend: str = "auto",
        stream: str = "auto",
        step: str = "ista",
        drop_path: float = 0.0,
        eps: float = 1e-5,
        out_bias: bool = True,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.heads = heads
        self.depth = depth
        self.dim = dim
        self.backend = backend
        self.stream = stream
        for index in range(depth):
            attention = Attention(dim, heads=heads, dim_head=dim_head, dropout=dropout, backend=backend, out_bias=out_bias)
            sparse = STEPS[step](dim, dim, dropout=dropout, step_size=ista, lambd=lambd, backend=backend)
            if init_values is None:
                layer = Layer(PreNorm(dim, attention, eps), PreNorm(dim, sparse, eps))
            else:
                layer = Layer(*(ScaledPreNorm(dim, part, eps, init_values) for part in (attention, sparse)))
            layer.drop_path = drop_path * index / (depth - 1) if depth > 1 else drop_path
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, None)


def layers_of(transformer: Transformer) -> Iterator[Layer]:
    """Its layers, taken for what it was built with."""
    return cast("Iterator[Layer]", iter(transformer.layers))


def stack_dtypes(stream: str, autocast: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the activations between kernels, dtype of the operands of their products) of fused layers under autocast.

    "auto" has the leanest activations that are no less precise than the published code under the same autocast, for logits and
    the median over gradients: float16 under bfloat16 autocast, float32 under float16 (`benchmarks/precision.py`). 16-bit
    activations round a token with its mean: where that is many times the deviation, "float32" is more precise.
    """
    if stream == "auto":
        stream = "float32" if autocast == torch.float16 else "float16"
    if stream == "float32":
        return torch.float32, torch.float16
    dtype = torch.bfloat16 if stream == "bfloat16" else torch.float16
    return dtype, dtype


def pool_tokens(x: Tensor, pool: str | None) -> Tensor:
    """The class token ("cls"), the mean over all tokens ("mean"), or all tokens (None) of (batch, tokens, dim)."""
    if pool is None:
        return x
    return x.mean(dim=1) if pool == "mean" else x[:, 0]


def _run_layer(layer: Layer, state: StackState, weights: Weights) -> StackState:
    """The fused `layer` with its `weights` as `make_weights` gives them."""
    from ..kernels import fused_layer

    return fused_layer(state, *weights, layer.settings())


def _run_alone(layer: Layer, state: StackState, operand_dtype: torch.dtype) -> StackState:
    """The fused `layer`, whose weights are whole just now."""
    return _run_layer(layer, state, *make_weights([layer], operand_dtype))
