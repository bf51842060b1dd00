"""M of a step of sparsification, kept from call to call on a CPU as long as it is what the weights make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .plain import PLAIN, keeps_nothing

Fold = Callable[[Sequence[Tensor], float], Tensor]  # from a step's weights and its size to M, as `SparseStep.fold`
_ATTRIBUTE = "_crate_fast_kept"  # of a step's first weight
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Kept(NamedTuple):
    """M, beside the proof of what it was made of; on the first weight it belongs to, so that it goes when that goes."""

    fold: Fold
    sources: list[Tensor]  # copies of the weights
    step_size: float
    matrices: dict[torch.dtype | None, Tensor]  # M, (dim, dim), as it was formed under None, and in the dtypes asked for

    def __reduce__(self):
        return set, ()  # copies and pickles of a weight hold nothing, in a type that every unpickler knows


def kept_matrix(fold: Fold, weights: Sequence[Tensor], step_size: float, dtype: torch.dtype | None = None) -> Tensor:
    """`fold` of the weights, in `dtype` if that is given, with columns in one piece then, as a product in 16 bit reads them; on
    a CPU kept from call to call, as long as the weights are bit for bit what it was made of.

    Nothing but the contents tells: fused optimizers, writes through `.data`, NumPy and shared memory move no version counter.
    A comparison reads 2·dim² values, where M costs 2·dim³ operations; on a GPU the host would have to wait for it.
    """
    recorded = keeps_nothing() or is_in_torch_dispatch_mode()
    if recorded or any(weight.device.type != "cpu" or type(weight) not in PLAIN for weight in weights):
        return _cast(fold(weights, step_size), dtype)
    kept = getattr(weights[0], _ATTRIBUTE, None)
    if not (isinstance(kept, Kept) and (kept.fold, kept.step_size) == (fold, step_size) and _are_same(kept.sources, weights)):
        with torch.inference_mode(False), torch.no_grad():
            sources = [weight.detach().clone() for weight in weights]  # M is made of copies: another process may be writing
            kept = Kept(fold, sources, step_size, {None: fold(sources, step_size)})
        setattr(weights[0], _ATTRIBUTE, kept)
    if dtype not in kept.matrices:
        with torch.inference_mode(False), torch.no_grad():
            kept.matrices[dtype] = _cast(kept.matrices[None], dtype)
    return kept.matrices[dtype]


def _cast(matrix: Tensor, dtype: torch.dtype | None) -> Tensor:
    return matrix if dtype is None or matrix.dtype == dtype else matrix.t().to(dtype, memory_format=torch.contiguous_format).t()


def _are_same(sources: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    return all(_same_bits(source, weight) for source, weight in zip(sources, weights, strict=True))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit: NaN is itself, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = torch.int64 if all(map(_is_words, (a, b))) else _INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


def _is_words(x: Tensor) -> bool:
    """Whether the rows of x may be read in words of eight bytes."""
    size = x.element_size()
    in_step = x.storage_offset() * size % 8 == 0 and x.shape[-1] * size % 8 == 0
    return in_step and x.is_contiguous()  # pyright: ignore[reportReturnType] (nothing is symbolic here)
