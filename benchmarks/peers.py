"""Who is measured: the published mathematics, the best of PyTorch put into it, and crate_fast, all with the same weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crate_fast import (
    CRATE,
    CRATEMAE,
    BackendError,
    CRATEAlpha,
    build_cpu_kernels,
    cpu_kernels,
    functional,
    reference,
    reference_alpha,
)

MODES = ("eager", "compiled", "compiled layers", "max-autotune", "reduce-overhead", "cuda graph")
COMPILED = MODES[1:5]


class Unavailable(RuntimeError):
    """A peer cannot run here; the message says why."""


class Peer(NamedTuple):
    """An implementation.

    `model` builds the whole classifier from the published constructor's arguments, and `alpha` and `mae` CRATE-α and CRATE-MAE
    from theirs, each None where the peer has none; `mssa` (w, heads) and `ista` (h, D) are the operations alone, likewise.
    `modes` are those that the full suite of a GPU measures.
    """

    name: str
    what: str
    model: Callable[[dict], nn.Module] | None
    modes: tuple[str, ...]
    mssa: Callable[[Tensor, int], Tensor] | None = None
    ista: Callable[[Tensor, Tensor], Tensor] | None = None
    alpha: Callable[[dict], nn.Module] | None = None
    mae: Callable[[dict], nn.Module] | None = None
    same_function: bool = True  # False: another architecture, for context; no parity is asked of it
    around: Callable[[], AbstractContextManager] = nullcontext  # in which it is built, judged and timed


class SdpaAttention(reference.Attention):
    """The published attention with PyTorch's fused one on (w, w, w), all heads at once."""

    kernel: SDPBackend | None = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.to_out(_sdpa(w, self.kernel).transpose(1, 2).flatten(2))


class FlexAttention(reference.Attention):
    """The published attention with FlexAttention on (w, w, w)."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.to_out(flex_attention(w, w, w).transpose(1, 2).flatten(2))


def _sdpa(w: Tensor, kernel: SDPBackend | None) -> Tensor:
    if kernel is None:
        return F.scaled_dot_product_attention(w, w, w)
    with sdpa_kernel([kernel]):
        return F.scaled_dot_product_attention(w, w, w)


def _sdpa_mssa(kernel: SDPBackend | None) -> Callable[[Tensor, int], Tensor]:
    def mssa(w: Tensor, heads: int) -> Tensor:
        return _sdpa(w.unflatten(-1, (heads, -1)).transpose(1, 2), kernel).transpose(1, 2).flatten(2)

    return mssa


def _with_attention(
    cls: type[nn.Module], kernel: SDPBackend | None = None, published: type[nn.Module] = reference.CRATE
) -> Callable[[dict], nn.Module]:
    """What builds the published model, CRATE, CRATE-α or another, with another class of attention, derived from its own."""
    replaced = cls.__mro__[1]

    def build(arguments: dict) -> nn.Module:
        model = published(**arguments)
        for module in model.modules():
            if type(module) is replaced:
                module.__class__ = cls
                module.kernel = kernel
        return model

    return build


def _crate(backend: str, kind: type[nn.Module] = CRATE) -> Callable[[dict], nn.Module]:
    return lambda arguments: kind(**arguments, backend=backend)


def _timm(arguments: dict) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise Unavailable("timm is not installed")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=arguments["image_size"], patch_size=arguments["patch_size"], num_classes=arguments["num_classes"],
        embed_dim=arguments["dim"], depth=arguments["depth"], num_heads=arguments["heads"],
    )  # fmt: skip


def load_published(path: Path) -> Peer:
    """The published class out of a checkout of its repository, CRATE's or CRATE-α's.

    Raises:
        Unavailable: neither model/crate.py is there nor torch_inference/model/crate_alpha.py, or it does not import.
    """
    file, of_alpha = path / "model" / "crate.py", path / "torch_inference" / "model" / "crate_alpha.py"
    is_alpha = of_alpha.is_file()
    file = of_alpha if is_alpha else file
    if not file.is_file():
        raise Unavailable(f"--published is {path}; there is no {file}")
    specification = importlib.util.spec_from_file_location("_published_crate", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise Unavailable(f"{file} does not import: {error}") from error
    modes = ("eager", "compiled", "max-autotune")
    what, build = "the published repository's own class", lambda arguments: module.CRATE(**arguments)
    if is_alpha:
        return Peer("published checkout", what, None, modes, alpha=build)
    return Peer("published checkout", what, build, modes, mae=_published_mae(path))


def _published_mae(path: Path) -> Callable[[dict], nn.Module] | None:
    """Builds the CRATE-MAE of a checkout, encoder and decoder of one size; None where it has none."""
    if not (path / "model" / "crate_ae" / "crate_ae.py").is_file():
        return None

    def build(arguments: dict) -> nn.Module:
        sys.path.insert(0, str(path))  # its files import each other by their folder
        try:
            mae = importlib.import_module("model.crate_ae.crate_ae")
        except Exception as error:
            raise Unavailable(f"{path}/model/crate_ae does not import: {error}") from error
        decoder = {f"decoder_{name}": arguments[name] for name in ("embed_dim", "depth", "num_heads")}
        norm = partial(nn.LayerNorm, eps=1e-6)
        return mae.MaskedAutoencoderViT(mae.CRATEEncoderBlock, mae.CRATEDecoderBlock, norm_layer=norm, **arguments, **decoder)

    return build


def all_peers(device: torch.device, backend: str = "auto") -> list[Peer]:
    """Every peer of a device; the published mathematics comes first, crate_fast, on `backend`, last."""
    whole = ("eager", "compiled", "max-autotune", "cuda graph")
    sdpa = "the same with scaled_dot_product_attention(w, w, w)"
    peers = [
        Peer(
            "published",
            "the published mathematics",
            lambda a: reference.CRATE(**a),
            whole,
            reference.mssa,
            reference.ista,
            lambda a: reference_alpha.CRATEAlpha(**a),
            lambda a: reference.CRATEMAE(**a),
        ),
        Peer(
            "sdpa",
            sdpa,
            _with_attention(SdpaAttention),
            whole,
            _sdpa_mssa(None),
            alpha=_with_attention(SdpaAttention, published=reference_alpha.CRATEAlpha),
            mae=_with_attention(SdpaAttention, published=reference.CRATEMAE),
        ),
    ]
    if device.type == "cuda":
        pinned = {
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        for name, kernel in pinned.items():
            build, mssa = _with_attention(SdpaAttention, kernel), _sdpa_mssa(kernel)
            alpha = _with_attention(SdpaAttention, kernel, reference_alpha.CRATEAlpha)
            peers.append(Peer(name, f"{sdpa}, {kernel.name} pinned", build, ("compiled",), mssa, alpha=alpha))
        peers.append(Peer("flex", "the same with FlexAttention", _with_attention(FlexAttention), ("compiled",)))
        mssa, ista = partial(functional.mssa, backend="torch"), partial(functional.ista, backend="torch")
        what = 'crate_fast\'s algebra without its kernels (backend="torch")'
        alpha = _crate("torch", CRATEAlpha)
        peers.append(Peer("algebra", what, _crate("torch"), ("eager", "compiled"), mssa, ista, alpha))
    what = "timm's VisionTransformer of the same sizes, for context"
    peers.append(Peer("timm ViT", what, _timm, ("compiled",), alpha=_timm, same_function=False))
    ours = ("eager", "compiled", "reduce-overhead", "cuda graph")
    mssa, ista = partial(functional.mssa, backend=backend), partial(functional.ista, backend=backend)
    what, others = f'crate_fast, backend="{backend}"', (_crate(backend, CRATEAlpha), _crate(backend, CRATEMAE))
    return [*peers, Peer("crate_fast", what, _crate(backend), ours, mssa, ista, *others)]


def with_cpu_kernels(peers: list[Peer]) -> list[Peer]:
    """`peers`, crate_fast's without the kernels for CPUs, and one more with them.

    Raises:
        Unavailable: they cannot be built here.
    """
    try:
        build_cpu_kernels()
    except BackendError as error:
        raise Unavailable(str(error)) from error
    *others, ours = peers
    plain = ours._replace(around=partial(cpu_kernels.used, False))
    compiled = ours._replace(
        name="crate_fast cpu kernels",
        what="crate_fast after build_cpu_kernels()",
        modes=("eager",),
        around=partial(cpu_kernels.used, True),
    )
    return [*others, plain, compiled]


def in_mode(module: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """`module` to be called in one of `MODES`; what "cuda graph" does comes later.

    Compiled for the very shapes, for every peer: code for any batch would be slower.
    """
    if mode in ("eager", "cuda graph"):
        return module
    torch._dynamo.reset()
    if mode == "compiled":
        return torch.compile(module, dynamic=False)
    if mode in ("max-autotune", "reduce-overhead"):
        return torch.compile(module, mode=mode, dynamic=False)
    for block in _blocks(module):
        block.compile(dynamic=False)
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, which torch.compile compiles once for all: regional compilation."""
    if hasattr(module, "blocks"):
        return [*module.blocks, *getattr(module, "decoder_blocks", ())]
    layers = module.transformer.layers if hasattr(module, "transformer") else [module]
    if type(layers[0]) is nn.ModuleList:  # the published layer is a list, which is not called itself
        return [block for layer in layers for block in layer]
    return list(layers)


def check_graphs(device: torch.device) -> None:
    """Raises Unavailable where nothing can be recorded."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA GPU")


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """`step` captured in a CUDA graph and replayed; it must take its inputs from fixed memory.

    A call gives what `step` returned when it was captured, with the values of this replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> object:
        graph.replay()
        return result

    return replay
