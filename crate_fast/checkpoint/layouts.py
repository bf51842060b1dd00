"""Where a checkpoint has its weights: under which key and prefix, and which of several there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeGuard

from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, DistributedDataParallel and torch.compile
WRAPPED = {*(name[:-1] for name in WRAPPERS), "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"}
"""Modules around others, whose names may stand anywhere in that of a weight; the last two are FSDP1's."""
MODEL_KEYS = ("state_dict", "model")  # where main.py and finetune.py put the weights in their checkpoints
OTHERS = ("net", "model_state_dict", "model_state", "module", "network", "weights", "params")  # where others do
MEANS = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema")  # where others put their mean
MEANT = re.compile(r"(?i)(?<![a-z])(ema|swa|polyak|shadow|mean|avg|averaged?)(?![a-z])")  # and whatever is called so
COUNTER = "n_averaged"  # beside the weights of PyTorch's AveragedModel
COUNTED = ("total_ops", "total_params")  # what thop hangs on every module it counts
INNER = ("module", *MODEL_KEYS)  # in one of these, in a checkpoint of ours
WORDS = {"last": "last weights", "mean": "mean of the weights"}
REWRITTEN = {
    ".base_layer.": "an adapter is on it: save what PEFT's merge_and_unload() gives",
    ".parametrizations.": "it is parametrised: save it after torch.nn.utils.parametrize.remove_parametrizations",
    ".weight_orig": "it is pruned: save it after torch.nn.utils.prune.remove",
    "fn.product.weight": "it is of a copy by as_linears, from which no dictionary can be had: save the model it was made of",
}
"""By a part of its name, why a weight stands for one that is not there, and what to do."""
FIRST = "pos_embedding"  # which every CRATE has, and whose prefix is that of all
FIRST_OF_MAE = "decoder_pos_embed"  # the same of a CRATE-MAE
DEEPEST = 3  # dictionaries in one another
MOST = 16  # models in a state dict


class Found(NamedTuple):
    """Weights in a checkpoint by the names of `CRATE`, under which name they lay (None: bare), and a line on others beside."""

    weights: dict[str, Tensor]
    key: str | None = None
    note: str | None = None


def find_weights(content: object, wanted: str | None = None) -> Found:
    """The weights in what a checkpoint holds; none where there are none of a CRATE or a CRATE-MAE.

    They may lie bare, or as main.py ("state_dict"), finetune.py ("model") and others put them, as part of a larger model such
    as Lightning's; names of the modules around are taken out. Beside the last weights there may be their mean over the steps.

    Args:
        content: what a file holds.
        wanted: "mean" or "last", or of several models the name of one, under which it lies: "student.backbone"; None: the mean
            where there is one of all weights, since that is what was evaluated.

    Raises:
        ValueError: what is wanted is not there, a weight is there twice, or there are several models and nothing tells which
            is meant; the message names them.
    """
    if not isinstance(content, dict):
        return Found({})
    if isinstance(content.get("arguments"), dict):  # ours: what is wrong with its weights is told later
        found = _own(content)
    else:
        kinds: dict[str, list[Found]] = {"last": [], "mean": []}
        for kind, one in _models(content):
            kinds[kind].append(one)
        if is_name(wanted):
            return _named([*kinds["last"], *kinds["mean"]], wanted)
        found = {kind: _likeliest(some) for kind, some in kinds.items() if some}
    if "mean" in found and wanted is None and not found.get("last", Found({})).weights.keys() <= found["mean"].weights.keys():
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
    names = " and ".join(f"{WORDS[kind]} ({found[kind].key!r})" for kind in sorted(found))
    note = f"it has the {names}; taken: the {WORDS[taken]} (--weights {other} takes the other)"
    return found[taken]._replace(note=joined(note, found[taken].note))


def is_name(wanted: str | None) -> TypeGuard[str]:
    """Whether `wanted` is the name of a model rather than a kind of weights."""
    return wanted is not None and wanted not in WORDS


def _named(found: list[Found], wanted: str) -> Found:
    """The model that lies under the name `wanted`; raises ValueError where none or several do."""
    own = [one for one in found if one.key == wanted]
    if len(own) != 1:
        raise ValueError(f"--weights is {wanted[:200]!r}; there are {_names(found) or 'no weights of a CRATE'} in it")
    return own[0]


def _names(found: list[Found]) -> str:
    """What models are called, at most as many as one state dict may have."""
    rest = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(repr(one.key) if one.key else "weights without a name" for one in found[:MOST]) + rest


def joined(*notes: str | None) -> str | None:
    """Notes in a line, None where there are none."""
    return "; ".join(note for note in notes if note) or None


def _own(content: dict) -> dict[str, Found]:
    found = {}
    for kind, names in (("last", MODEL_KEYS), ("mean", MEANS)):
        mapping = next((name for name in names if isinstance(content.get(name), dict)), None)
        if mapping is not None or kind == "last":
            weights = content if mapping is None else content[mapping]
            inner = next((weights[name] for name in INNER if isinstance(weights.get(name), dict)), weights)
            found[kind] = Found(unwrapped(inner), mapping)
    return found


def unwrapped(weights: dict) -> dict[str, Tensor]:
    """The weights without the names of `WRAPPED`, and without what counts; raises ValueError where two have one name then."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        parts = str(key).split(".")
        if parts[-1] == COUNTER or parts[-1] in COUNTED:
            continue
        bare = ".".join(part for part in parts if part not in WRAPPED)
        if bare in found:
            raise ValueError(f"it has {bare[:200]!r} twice, once as {str(key)[:200]!r}, and nothing tells which is meant")
        found[bare] = value
    return found


def rewritten(names: Iterable[object]) -> str | None:
    """Why weights of these names are not a model's own, see `REWRITTEN`, in a line; None where they may be."""
    for name in names:
        reason = next((reason for part, reason in REWRITTEN.items() if part in str(name)), None)
        if reason is not None:
            return f"{str(name)[:200]!r} is no weight of a CRATE's; {reason}"
    return None


def _models(content: dict) -> Iterator[tuple[str, Found]]:
    """All models with positions in nested dictionaries: ("last" or "mean", weights), those on known shelves first.

    The note of one says what lies beside it under no prefix of its own.
    """
    left: list[tuple[tuple[str, ...], dict]] = [((), content)]
    seen: set[int] = set()
    while left:
        path, mapping = left.pop(0)
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        for prefix, weights, others in _by_prefix(mapping):
            words = (*path, *prefix.split(".")[:-1])
            mean = COUNTER in mapping or any(word in MEANS or MEANT.search(word) for word in words)
            note = f"left out, not of the model: {len(others)} entries, {others[0][:200]!r} first" if others else None
            yield "mean" if mean else "last", Found(weights, ".".join(words) or None, note)
        if len(path) < DEEPEST:
            inner = [((*path, name), value) for name, value in mapping.items() if isinstance(name, str)]
            left += sorted((one for one in inner if isinstance(one[1], dict)), key=lambda one: _rank(one[0][-1]))


def _by_prefix(mapping: dict) -> Iterator[tuple[str, dict[str, Tensor], list[str]]]:
    """(prefix, weights, what else is there) of each model in a state dict; nothing that is not all tensors is a model."""
    firsts = (FIRST, FIRST_OF_MAE)
    if not any(isinstance(key, str) and key.endswith(firsts) for key in mapping):
        return
    bare = unwrapped(mapping)
    prefixes = [key[: -len(first)] for key in bare for first in firsts if key == first or key.endswith(f".{first}")]
    if len(prefixes) > MOST:
        raise ValueError(f"it has {len(prefixes)} models, and nothing tells which is meant")
    known = tuple(prefixes)
    others = [key for key in bare if not key.startswith(known)]
    for prefix in prefixes:
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        names = [key for key in bare if key.startswith(prefix) and not key.startswith(longer)]
        own = {name[len(prefix) :]: bare[name] for name in names}
        if all(isinstance(value, Tensor) for value in own.values()):
            yield prefix, own, others


def _rank(name: str) -> int:
    known = (*MODEL_KEYS, *OTHERS, *MEANS)
    return known.index(name) if name in known else len(known)


def _likeliest(found: list[Found]) -> Found:
    """Of several models the one that lies under a known key; raises ValueError where that does not tell."""
    ranks = [sum(map(_rank, (one.key or "").split("."))) if one.key else -1 for one in found]
    best = min(ranks)
    if ranks.count(best) > 1 or (len(found) > 1 and best >= _rank("")):
        raise ValueError(
            f"it has several models ({_names(found)}), and nothing tells which is meant; say which (--weights NAME), or save "
            "one of them by itself"
        )
    chosen = found[ranks.index(best)]
    others = ", ".join(repr(one.key) for one in found if one is not chosen)
    note = f"it has other weights beside: {others}; taken: {chosen.key!r}" if others else None
    return chosen._replace(note=joined(note, chosen.note))
