"""What a state dict alone tells of its model: its names and shapes, and the published values for what they leave open."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from torch import Tensor

from ..sizes import SIZES

WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, DistributedDataParallel and torch.compile
SHELVES = ("state_dict", "model")  # where main.py and finetune.py put the weights in their checkpoints
MEANS = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema")  # where others put their mean
MEANT = re.compile(r"(?i)(?<![a-z])(ema|swa|polyak|shadow|mean|avg|averaged?)(?![a-z])")  # and whatever is called so
COUNTER = "n_averaged"  # beside the weights of PyTorch's AveragedModel
INNER = ("module", *SHELVES)  # in one of these
WORDS = {"last": "last weights", "mean": "mean of the weights"}
NEEDED = {"pos_embedding": 3, "to_patch_embedding.1.weight": 1, "mlp_head.1.weight": 2}
OPEN = {"pool": "cls", "ista": 0.1, "lambd": 0.1}  # as published
HEAD_WIDTH = 64  # the constructor's


class Found(NamedTuple):
    """Weights in a checkpoint by the names of `CRATE`, under which name they lay (None: bare), and a line on others beside."""

    weights: dict[str, Tensor]
    shelf: str | None = None
    note: str | None = None


def find_weights(content: object, wanted: str | None = None) -> Found:
    """The weights in what a checkpoint holds; none where there are none of a CRATE.

    They may lie bare, or as main.py ("state_dict") or finetune.py ("model") puts them; prefixes of DataParallel,
    DistributedDataParallel and torch.compile are taken off. Beside the last weights there may be their mean over the steps.

    Args:
        content: what a file holds.
        wanted: "mean" or "last"; None: the mean where there is one of all weights, since that is what was evaluated.

    Raises:
        ValueError: of the mean and the last weights the one that is wanted is not there, or a weight is there twice.
    """
    if not isinstance(content, dict):
        return Found({})
    own = isinstance(content.get("arguments"), dict)  # ours: what is wrong with its weights is told later
    last = next((name for name in SHELVES if isinstance(content.get(name), dict)), None)
    found = {"last": Found(_weights_in(content if last is None else content[last], own), last)}
    named = (*MEANS, *(name for name in content if isinstance(name, str) and MEANT.search(name) and name != last))
    mean = next((name for name in named if isinstance(content.get(name), dict) and _weights_in(content[name], own)), None)
    if mean is not None:
        found["mean"] = Found(_weights_in(content[mean], own), mean)
        if wanted is None and not found["last"].weights.keys() <= found["mean"].weights.keys():
            wanted = "last"  # what is a mean of some weights alone is no model
    return choose({kind: one for kind, one in found.items() if one.weights}, wanted)


def choose(found: dict[str, Found], wanted: str | None) -> Found:
    """The one of "mean" and "last" that is `wanted`, noting it where both are there; raises as `find_weights`."""
    if not found:
        return Found({})
    taken = wanted or ("mean" if "mean" in found else "last")
    if taken not in found:
        raise ValueError(f"--weights is {wanted!r}; there are only the {' and '.join(WORDS[kind] for kind in found)} in it")
    other = next((kind for kind in found if kind != taken), None)
    if other is None:
        return found[taken]
    names = " and ".join(f"{WORDS[kind]} ({found[kind].shelf!r})" for kind in sorted(found))
    note = f"it has the {names}; taken: the {WORDS[taken]} (--weights {other} takes the other)"
    return found[taken]._replace(note=note)


def _weights_in(shelf: dict, own: bool) -> dict[str, Tensor]:
    inner = next((shelf[name] for name in INNER if isinstance(shelf.get(name), dict)), shelf)
    weights = unwrapped(inner)
    whole = "pos_embedding" in weights and all(isinstance(value, Tensor) for value in weights.values())
    return weights if whole or own else {}


def unwrapped(weights: dict) -> dict[str, Tensor]:
    """The weights without the prefixes of `WRAPPERS`; raises ValueError where two have one name then."""

    def bare(key: str) -> str:
        while key.startswith(WRAPPERS):
            key = key.partition(".")[2]
        return key

    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key == COUNTER:
            continue
        if bare(str(key)) in found:
            raise ValueError(f"it has {bare(str(key))!r} twice, once as {str(key)[:200]!r}, and nothing tells which is meant")
        found[bare(str(key))] = value
    return found


def infer_arguments(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """The arguments of `CRATE` that fit `weights`: those that shapes tell, and those that had to be taken as published.

    Args:
        weights: by the names of `CRATE`.
        known: arguments that the caller knows; they go before what shapes tell.

    Returns:
        (all arguments, those of them that were taken because neither shapes nor `known` tell them).

    Raises:
        ValueError: shapes tell too little; the message names what has to be said.
    """
    for name, dimensions in NEEDED.items():
        if name not in weights or weights[name].dim() != dimensions:
            raise ValueError(f"no weights of a CRATE: it has no {name!r} of {dimensions} dimensions")
    _, tokens, dim = weights["pos_embedding"].shape
    arguments = {"dim": dim, "num_classes": len(weights["mlp_head.1.weight"])}
    arguments["depth"] = len({key.split(".")[2] for key in weights if key.startswith("transformer.layers.")})
    arguments |= _infer_sizes(len(weights["to_patch_embedding.1.weight"]), tokens - 1, known)
    told, taken = _infer_heads(weights, dim, arguments["depth"], known)
    taken |= {name: value for name, value in OPEN.items() if name not in known}
    return arguments | told | taken | known, taken


def _infer_sizes(values: int, patches: int, known: dict) -> dict:
    """channels, patch_size and image_size from the values of a patch and the number of patches, squares unless known."""
    patch = _as_pair(known["patch_size"]) if "patch_size" in known else None
    if patch is not None:
        channels = known.get("channels", values // max(1, patch[0] * patch[1]))
    else:
        # 3·a² = b² has no solution, so that colour and grey cannot be mistaken for each other.
        tried = (known["channels"],) if "channels" in known else (3, 1)
        channels = next((c for c in tried if c > 0 and values % c == 0 and _root(values // c)), None)
        if channels is None:
            raise ValueError(f"a patch has {values} values, of no square patch with {' or '.join(map(str, tried))} channels; "
                             "say patch_size")  # fmt: skip
        patch = (math.isqrt(values // channels),) * 2
    if "image_size" not in known and not _root(patches):
        raise ValueError(f"{patches} patches make no square image; say image_size")
    side = _root(patches) or 0
    image = known.get("image_size", [side * patch[0], side * patch[1]])
    return {"channels": channels, "patch_size": list(patch), "image_size": image}


def _infer_heads(weights: dict[str, Tensor], dim: int, depth: int, known: dict) -> tuple[dict, dict]:
    """(heads and dim_head that are told, those that are taken)."""
    first = "transformer.layers.0.0.fn."
    if depth and f"{first}to_out.0.weight" not in weights:
        return {"heads": 1, "dim_head": dim}, {}  # the only case without a projection back
    project = weights.get(f"{first}qkv.weight")
    width = len(project) if project is not None and project.dim() == 2 else HEAD_WIDTH
    if "heads" in known:
        return {"dim_head": width // max(1, known["heads"])}, {}
    if "dim_head" in known:
        return {"heads": width // max(1, known["dim_head"])}, {}
    for size in SIZES.values():
        if (size["dim"], size["depth"], size["heads"] * size["dim_head"]) == (dim, depth, width):
            return {}, {"heads": size["heads"], "dim_head": size["dim_head"]}
    if width % HEAD_WIDTH:
        raise ValueError(f"its shapes leave the number of heads open ({width} values in all heads); say heads")
    return {}, {"heads": width // HEAD_WIDTH, "dim_head": HEAD_WIDTH}


def _as_pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _root(number: int) -> int | None:
    """The whole root of a positive square, else None."""
    root = math.isqrt(max(0, number))
    return root if root and root**2 == number else None
