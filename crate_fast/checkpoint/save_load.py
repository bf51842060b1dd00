"""Models and checkpoints as files: written whole or not at all, checked when read, never executed.

A model file is safetensors with the published state_dict keys; the constructor's arguments stand as JSON in its metadata.
A checkpoint is a `torch.save` archive of plain values and tensors, read with `weights_only=True`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..eval_transform import Transform
from ..files import first_line, shown, tell, write_atomically
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from .constructor import CHANGED, MODELS, OF_MODELS, build, constructor_arguments, difference_of, skeleton, untaken
from .layouts import WORDS
from .mae import MAE_ARGUMENTS, changed_arguments, infer_mae, is_mae, mae_keywords
from .published import infer_arguments
from .read import TRANSFORM, CheckpointError, Model, model_file, read_model
from .resize import grid_of, resized_mae_weights, resized_weights
from .tensor_files import write_tensors

RESIZED = ("num_classes", "image_size")  # those that may be others than a file's, with a new head and other positions
FREE = ("training", "backend", "stream", "transform", "frozen", "drop_path", "grad_checkpointing")
"""Settings that a model and what its file builds need not share."""
NO_CLASSES = "it holds a CRATE-MAE, which tells no classes apart; crate-fast train --init fine-tunes a CRATE from its encoder"


def save_model(model: CRATE | CRATEMAE, path: str | os.PathLike) -> None:
    """Writes weights (in their own dtypes) and constructor arguments of `model` to `path`, as safetensors.

    Raises:
        TypeError: `model` is no CRATE and no CRATEMAE.
        ValueError: it was changed after it was built, so that `load_checkpoint` could not build it again.
        OSError: `path` cannot be written.
    """
    arguments, weights = described(model)
    write_tensors(Path(path), weights, arguments | transform_entry(model))


def save_checkpoint(model: CRATE | CRATEMAE, path: str | os.PathLike, **state) -> None:
    """Writes `model` and `state` (tensors and plain values: optimizer state, counters) to `path`, for `read_checkpoint`.

    Raises: as `save_model`; also TypeError where `state` has what could not be read again, such as NumPy's numbers.
    """
    write_state(model, path, model=described(model)[1], **state)


def write_state(model: CRATE | CRATEMAE, path: str | os.PathLike, /, **content) -> None:
    """Writes `content` and what builds a model like this one, whose weights may lie elsewhere; raises as `save_checkpoint`."""
    for name, value in content.items():
        _check_readable(name, value)
    content = {"arguments": arguments_of(model), **transform_entry(model), **content}
    write_atomically(path, lambda file: torch.save(content, file))


def _check_readable(name: str, value: object) -> None:
    """Raises TypeError where nested `value` has something of a class that `torch.load` of weights alone does not know."""
    if type(value).__module__.partition(".")[0] not in ("builtins", "collections", "torch"):
        raise TypeError(f"{name} holds a {type(value).__name__}; a checkpoint holds tensors and Python's own values")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    for each in inner:
        _check_readable(name, each)


def transform_entry(model: CRATE | CRATEMAE) -> dict:
    """What stands in a checkpoint of how the images of `model` are evaluated; nothing where that is not known."""
    return {} if model.transform is None else {TRANSFORM: model.transform._asdict()}


def arguments_of(model: CRATE | CRATEMAE) -> dict:
    """The constructor's arguments of either; raises ValueError where the model was changed after it was built."""
    return changed_arguments(model, CHANGED) if isinstance(model, CRATEMAE) else constructor_arguments(model)


def described(model: CRATE | CRATEMAE) -> tuple[dict, dict[str, Tensor]]:
    """(constructor arguments, state_dict), checked to fit each other; raises as `save_model`."""
    if not isinstance(model, CRATE | CRATEMAE):
        raise TypeError(f"the model is a {type(model).__name__}; it must be a crate_fast.CRATE")
    arguments, weights = arguments_of(model), model.state_dict()
    built: nn.Module = skeleton(arguments, CRATEMAE) if isinstance(model, CRATEMAE) else skeleton(arguments)
    difference = difference_of(built, weights) or _change(built, model)
    if difference:
        raise ValueError(f"{CHANGED}: {difference}")
    return arguments, weights


def _change(built: nn.Module, model: nn.Module) -> str | None:
    """The first thing beside the weights in which `model` computes otherwise than it was `built`, in words; None if nothing."""
    own, expected = (dict(each.named_modules(remove_duplicate=False)) for each in (model, built))
    odd = sorted(own.keys() ^ expected.keys())
    if odd:
        return f"its module {odd[0]!r} is {'new' if odd[0] in own else 'missing'}"
    if type(model).forward is not type(built).forward:
        return f"{type(model).__name__} has a forward of its own"
    for name, module in own.items():
        other, settings = expected[name], vars(module)
        if name and type(module) is not type(other):
            return f"{name!r} is a {type(module).__name__}, not a {type(other).__name__}"
        if "forward" in settings:
            return f"{name or 'the model'!r} has another forward"
        for setting, value in vars(other).items():
            if setting.startswith("_") or setting in FREE:
                continue
            found = settings.get(setting, value)
            if not (found == value or (isinstance(found, list) and tuple(found) == value)):
                return f"{name or 'the model'!r} has {setting} {found!r}; as it is built, {value!r}"
    return None


def load_checkpoint(
    source: str | os.PathLike, *, device: str | torch.device = "cpu", weights: str | None = None, **overrides
) -> Any:
    """The model in `source`, a `CRATE` or a `CRATEMAE`, in evaluation mode, its dtypes as saved; nothing in a file is executed.

    Read are files of `save_model` and `save_checkpoint` (of a training run's the mean of the weights, where it keeps one), and
    those of the published scripts and of others: bare state dicts, or under "state_dict", "model", "net" and the like, part of
    a larger model such as Lightning's, with the names of DataParallel, DistributedDataParallel, FSDP, torch.compile or
    activation checkpointing in theirs; as PyTorch's archives, in which settings and numbers of other packages are passed over,
    as safetensors, or as a folder of `torch.distributed.checkpoint.save`. Names tell a CRATE from a CRATE-MAE. Where there are
    no arguments of the constructor, they are what shapes tell; what they cannot tell (heads, pool, ista, lambd, norm_pix_loss)
    is taken as published, and a line on stderr says so.

    Args:
        source: a file, a folder of `torch.distributed.checkpoint`, which holds all of the weights whatever number of processes
            wrote it, a directory with a model.safetensors or the index of one that is split, or ORGANISATION/NAME of a model
            on the Hugging Face Hub (for that `pip install 'crate-fast[hub]'`).
        device: where the weights shall be.
        weights: of a file that has both, "last" for the weights themselves or "mean" for their mean over the steps; of a file
            with several models the name of one, "student.backbone" where the positions are called
            "student.backbone.pos_embedding"; None: the mean, and a line on stderr says so.
        overrides: keywords of `CRATE` that replace the file's, such as `backend`, or say what it leaves open. With another
            `num_classes` the head is a new one, random, and with another `image_size` position embeddings are resampled, as
            `crate-fast finetune` does; a line on stderr says so.

    Raises:
        CheckpointError: the file is missing or damaged, asks for code to be run, or holds no model, or one of other names or
            shapes.
        MissingPackageError: safetensors, or for the Hub huggingface-hub, is not installed.
        TypeError: `overrides` has a keyword that neither class takes, `source` is no path, or `weights` no text.
        ValueError: `device` is none that PyTorch has here.
    """
    return _load(_file_of(source), _check_device(device), overrides, weights, (CRATE, CRATEMAE))


def load_classifier(
    source: str | os.PathLike, *, device: str | torch.device = "cpu", weights: str | None = None, **overrides
) -> CRATE:
    """`load_checkpoint` where nothing but a CRATE will do; raises CheckpointError for a CRATE-MAE."""
    return load_file(_file_of(source), _check_device(device), overrides, weights)


def _file_of(source: str | os.PathLike) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path or a name, as a str or os.PathLike")
    return model_file(source)


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # RuntimeError, AssertionError or TypeError, as the kind of device has it
        raise ValueError(f"device is {device!r}, which PyTorch does not have here ({first_line(error)})") from error


def load_file(
    path: Path, device: str | torch.device, overrides: dict, wanted: str | None = None, kind: type[CRATE] = CRATE
) -> CRATE:
    """`load_classifier` of a file, as a model of the class `kind`."""
    return _load(path, device, overrides, wanted, (kind,))


def _load(path: Path, device: torch.device | str, overrides: dict, wanted: str | None, kinds: tuple[type, ...]) -> Any:
    """The model in a file, as one of the first of `kinds`, or of a second, CRATEMAE, where it holds such a one."""
    kind, members = kinds[0], (member for each in kinds for member in (MODELS.values() if each is CRATE else (each,)))
    unknown = set.intersection(*(untaken(member, overrides) for member in members))
    if unknown:
        raise TypeError(f"{kind.__name__} takes no {', '.join(sorted(unknown))}")
    if not isinstance(wanted, str | None):
        raise TypeError(f"weights is {shown(wanted)}; allowed are {' and '.join(map(repr, WORDS))}, and the name of a model")
    found = read_model(path, wanted)
    arguments, weights, transform, note, inferred = found
    if note is not None:
        tell(f"{path}: {note}")
    if is_mae(weights):
        if CRATEMAE not in kinds:
            raise CheckpointError(f"{path}: {NO_CLASSES}")
        return load_mae(path, found, overrides).to(device)
    if arguments is None:
        known = {**inferred, **{n: value for n, value in overrides.items() if n in OF_MODELS and n not in RESIZED}}
        arguments = _settle(path, lambda: infer_arguments(weights, known, overrides.get("image_size")))
        model = build(path, arguments, weights, {name: overrides[name] for name in set(overrides) - set(OF_MODELS)}, kind)
    else:
        rest = {name: value for name, value in overrides.items() if name not in RESIZED}
        model = build(path, arguments, weights, _head_width(arguments, rest) | rest, kind)
    model = _resized(path, model, overrides).to(device)
    model.transform = _fitting(path, model, transform, overrides)
    return model


def load_mae(path: Path, found: Model, overrides: dict) -> CRATEMAE:
    """The CRATE-MAE that was `found` in a file; raises CheckpointError where its arguments or weights make none."""
    arguments, weights, transform, *_ = found
    try:
        overrides = mae_keywords(overrides)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = {name: value for name, value in overrides.items() if name != "img_size"}
    if arguments is None:
        transform = None  # by the key under which a classifier's lie
        arguments = _settle(path, lambda: infer_mae(weights, {n: v for n, v in own.items() if n in MAE_ARGUMENTS}))
    model = build(path, arguments, weights, own, CRATEMAE)
    if own != overrides:
        model = _resized_mae(path, model, arguments | overrides)
    model.transform = transform
    return model


def _resized_mae(path: Path, model: CRATEMAE, arguments: dict) -> CRATEMAE:
    """`model`, with other positions where `arguments` have another size of image, which is said."""
    try:
        built = skeleton(arguments, CRATEMAE)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: no CRATEMAE is of these sizes ({first_line(error)})") from error
    if built.image_size == model.image_size:
        return model
    weights, line = resized_mae_weights(model, built.patch_embed.grid_size)
    tell(f"{path}: {line}")
    built.load_state_dict(weights, assign=True)
    return built.eval()


def _head_width(arguments: object, overrides: dict) -> dict:
    """The dim_head of another number of heads than in `arguments`, which shares the same width among them."""
    if not isinstance(arguments, dict) or "dim_head" in overrides:
        return {}
    numbers: list[Any] = [overrides.get("heads"), arguments.get("heads"), arguments.get("dim_head")]
    if not all(type(number) is int for number in numbers) or numbers[0] < 1 or numbers[1] * numbers[2] % numbers[0]:
        return {}
    return {"dim_head": numbers[1] * numbers[2] // numbers[0]}


def _settle(path: Path, infer: Callable[[], tuple[dict, dict]]) -> dict:
    """The arguments that fit weights which come without, as `infer` finds them; says those that nothing tells."""
    try:
        arguments, assumed = infer()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    if assumed:
        words = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        tell(f"{path}: taken as published, since shapes do not tell it: {words}")
    return arguments


def _resized(path: Path, model: CRATE, overrides: dict) -> CRATE:
    """`model`, with another head or other positions where `overrides` have other sizes, which is said."""
    own = constructor_arguments(model)
    wanted = own | {name: overrides[name] for name in RESIZED if name in overrides}
    rest = {name: value for name, value in overrides.items() if name not in OF_MODELS}
    try:
        built = skeleton(wanted | rest, type(model))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: no CRATE is of these sizes ({first_line(error)})") from error
    weights, lines = resized_weights(model, wanted["num_classes"], grid_of(built.image_size, built.patch_size))
    if not lines and built.image_size == model.image_size:
        return model
    if lines:
        tell(f"{path}: {'; '.join(lines)}")
    built.load_state_dict(weights, assign=True)
    return built.requires_grad_(True).eval()


def _fitting(path: Path, model: CRATE, transform: Transform | None, overrides: dict) -> Transform | None:
    """The transform read from `path`; raises CheckpointError where it names more or fewer classes than there are."""
    names, classes = transform and transform.names, model.mlp_head[1].out_features
    if transform is None or names is None or len(names) == classes:
        return transform
    if overrides.get("num_classes") == classes:  # another head than the file's, whose classes are others
        return transform._replace(names=None)
    raise CheckpointError(f"{path}: it has names of {len(names)} classes; the model tells {classes} apart")
