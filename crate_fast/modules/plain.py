"""Whether a module is exactly what its class says: nothing hooked, wrapped, pruned, parametrised or replaced.

Fused kernels pass modules by, so they may only stand for modules that nobody is watching or has changed. A module under
FSDP2's `fully_shard` is watched by nobody: its hooks make its weights whole for the time of a call, whatever computes in it.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
PLAIN = (nn.Parameter, Tensor)
ModuleClass = TypeVar("ModuleClass", bound=nn.Module)


def has_global_hooks() -> bool:
    """True while a hook is registered on all modules at once."""
    return any(len(getattr(torch_module, name, ())) for name in _GLOBAL_HOOKS)


def is_exported() -> bool:
    """True while `torch.export` or `torch.jit.trace` records operators for elsewhere, where only PyTorch's own are known."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def keeps_nothing() -> bool:
    """True while a graph is made, which can keep nothing from call to call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def keeps_forwards(*modules: nn.Module) -> bool:
    """Whether `forward` of each module is a method, asked so that torch.compile guards what it is and asks all again."""
    return all(isinstance(module.forward, MethodType) for module in modules)


def has_weights(module: nn.Module, *names: str) -> bool:
    """Whether weights of these names, or None in their place, are parameters, no buffers or attributes instead."""
    return all(name in module._parameters for name in names)


def is_plain(module: nn.Module, cls: type[ModuleClass], sharded: bool = False) -> TypeGuard[ModuleClass]:
    """True if `module` is a `cls` and no subclass, has no hooks, its class's forward, and ordinary tensors as parameters.

    sharded: parameters may be parts of such tensors, which `fully_shard` makes whole when a module around is called.
    """
    m = module  # in plain loops and lines: asked of 13 modules a layer, before each call
    if type(m) is not cls or "forward" in m.__dict__:
        return False
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return False
    for p in m._parameters.values():  # noqa: SIM110
        if type(p) not in PLAIN and p is not None and not (sharded and _is_part(p)):
            return False
    return True


def is_sharded(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True if `module` is a `cls` that `fully_shard` has taken and nobody else: called, it sees what it would see without.

    Not where its `MixedPrecisionPolicy` casts what goes in or out: a cast stream is none that fused kernels can go on with.
    """
    if type(module) is cls or not isinstance(module, cls) or not hasattr(module, "unshard"):
        return False
    from torch.distributed.fsdp import FSDPModule

    if type(module).__bases__ != (FSDPModule, cls) or "forward" in module.__dict__:
        return False
    state = module._get_fsdp_state()  # pyright: ignore[reportCallIssue] (it is an FSDPModule)
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if module._backward_hooks or module._backward_pre_hooks or any(getattr(h, "__self__", None) is not state for h in hooks):
        return False
    return state._mp_policy.param_dtype is None and state._mp_policy.output_dtype is None


def _is_part(parameter: Tensor) -> bool:
    """True for a part of a parameter that is divided among processes once: no part of it is computed with by itself."""
    placements = getattr(parameter, "placements", None)
    return placements is not None and all(place.is_replicate() for place in placements[:-1])


class Place(NamedTuple):
    """What has to be at one place of a tree of modules for the tree to be plain."""

    path: str  # as `nn.Module.get_submodule` takes it; below "", the root, and behind what is around it
    classes: Collection[type[nn.Module]]
    needed: tuple[str, ...] = ()  # parameters, no buffers or attributes instead
    optional: tuple[str, ...] = ()  # the same, or None


def norm_at(path: str) -> Place:
    """A LayerNorm with weight and bias."""
    return Place(path, (nn.LayerNorm,), ("weight", "bias"))


def linear_at(path: str) -> Place:
    """A Linear with bias or without."""
    return Place(path, (nn.Linear,), ("weight",), ("bias",))


class PlainTree:
    """Which modules a tree has to have, and nothing else in an nn.Sequential, for one computation to stand for all of them."""

    def __init__(self, *places: Place) -> None:
        paths = ["", *(place.path for place in places)]
        parents = [path.rpartition(".")[0] for path in paths[1:]]
        self._length = parents.count("")
        self._places = [
            (paths.index(parent), path.rpartition(".")[2], classes, needed, optional, parents.count(path))
            for parent, (path, classes, needed, optional) in zip(parents, places, strict=True)
        ]

    def holds(self, root: nn.Module, sharded: bool = False) -> bool:
        """Whether all modules below `root` are plain and what they have to be; `sharded` as in `is_plain`."""
        if isinstance(root, nn.Sequential) and len(root._modules) != self._length:
            return False
        modules = [root]
        for parent, name, classes, needed, optional, length in self._places:
            module: Any = modules[parent]._modules.get(name)
            kind = type(module)
            if kind not in classes or not is_plain(module, kind, sharded):
                return False
            if kind is nn.Sequential and len(module._modules) != length:
                return False
            parameters = module._parameters
            for weight in needed:
                if parameters.get(weight) is None:
                    return False
            for weight in optional:
                if weight not in parameters:
                    return False
            modules.append(module)
        return True


def drops_nothing(dropout: nn.Module) -> bool:
    """True for a plain Dropout that lets everything through now."""
    return is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0)


def same_place(parameters: tuple[Tensor, ...]) -> bool:
    """True if all parameters have one device and one dtype."""
    device, dtype = parameters[0].device, parameters[0].dtype
    for p in parameters:  # noqa: SIM110 (all() of a generator takes twice as long, and this is asked of every layer, each call)
        if p.dtype is not dtype or p.device != device:
            return False
    return True
