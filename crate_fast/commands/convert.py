"""`crate-fast convert`: the same weights in another kind of file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..files import write_atomically
from .arguments import add_weights, as_path, place, weights_of

if TYPE_CHECKING:
    from ..model.crate import CRATE
    from ..model.mae import CRATEMAE

LAYOUTS = ("main", "state_dict", "model", "bare")
MAIN = ".pth.tar"  # as main.py calls its checkpoints
ARCHIVES = (".pt", ".pth", ".tar")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, DistributedDataParallel and torch.compile


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Reads a model (ours, the published scripts' checkpoints, safetensors, a run directory, a model of the "
        "Hugging Face Hub) and writes it to TARGET: *.safetensors, or with *.pt, *.pth or *.pth.tar what the published scripts "
        "read. Weights keep every bit and their dtype. Of a run, or a checkpoint of one, *.pth.tar has the optimizer's state, "
        "too, and main.py --resume goes on from it."
    )
    parser.add_argument(
        "source", type=place, metavar="SOURCE", help="a file, a run directory, or ORGANISATION/NAME on the Hugging Face Hub"
    )
    parser.add_argument("target", metavar="TARGET", type=as_path, help="the file to write; what it shall be tells its ending")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of an archive: all that main.py saves, with epoch, optimizer and best top-1 (main; *.pth.tar of a run has that), "
        "weights under 'state_dict' as main.py has them (else the default), under 'model' as finetune.py has them (the default "
        "of a CRATE-MAE), or nothing else (bare)",
    )
    parser.add_argument(
        "--prefix",
        choices=(*PREFIXES, "none"),
        help="before every name in an archive (default: module. with main and for *.pth.tar without --layout, as finetune.py "
        "takes none else; otherwise none)",
    )
    add_weights(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is there")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    target = arguments.target
    if target.suffix != ".safetensors" and target.suffix not in ARCHIVES:
        raise CheckpointError(f"{target}: its ending must be .safetensors, {', '.join(ARCHIVES)}")
    if target.suffix == ".safetensors" and (arguments.layout or arguments.prefix):
        raise CheckpointError(f"{target}: --layout and --prefix are of archives ({', '.join(ARCHIVES)}), not of safetensors")
    if target.exists() and not arguments.overwrite:
        raise CheckpointError(f"{target} is there already; --overwrite replaces it")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target}: there is no directory {target.parent}")
    given = weights_of(arguments)
    from ..checkpoint.save_load import load_checkpoint, save_model
    from ..model.crate import CRATE
    from ..model.mae import CRATEMAE
    from ..training.published_run import find_trained, save_main, taken_by_finetune

    trained = find_trained(arguments.source) if _wants_main(arguments, given) else None
    notes = []
    if arguments.layout == "main" and trained is None:
        raise CheckpointError(f"{arguments.source}: no checkpoint of a run, with an optimizer, which --layout main writes")
    if trained is not None:
        prefix = _prefix(arguments.prefix, True)
        model, notes = save_main(trained, target, prefix, arguments.weights)
    else:
        model = load_checkpoint(arguments.source, **given)
        if target.suffix == ".safetensors":
            save_model(model, target)
        else:
            # What main.py and finetune.py have no class for, they take under no name.
            default = arguments.layout is None and target.name.endswith(MAIN) and type(model) is CRATE
            usual = "model" if isinstance(model, CRATEMAE) else "state_dict"  # as the codebase of MAE has them
            save_published(model, target, arguments.layout or usual, _prefix(arguments.prefix, default))
            if default:
                taken = taken_by_finetune(_prefix(arguments.prefix, default))
                notes.append(f"weights alone, {taken}; main.py --resume needs a run's optimizer")
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters in {len(model.state_dict())} tensors")
    for note in notes:
        print(note)


def _wants_main(arguments: argparse.Namespace, given: dict) -> bool:
    """Whether all that main.py saves is asked for; not where `given` arguments make another model than was trained."""
    said = [name for name in given if name != "weights"]
    if arguments.layout == "main":
        if said:
            raise CheckpointError(f"--layout main writes a run as it is; {said[0]} is said")
        return True
    return arguments.layout is None and arguments.target.name.endswith(MAIN) and not said


def _prefix(asked: str | None, wrapped: bool) -> str:
    """What stands before names: as `asked`, else with `wrapped` what DataParallel puts there."""
    return (PREFIXES[0] if wrapped else "") if asked is None else asked.removesuffix("none")


def save_published(model: CRATE | CRATEMAE, path: Path, layout: str = "state_dict", prefix: str = "") -> None:
    """Writes an archive that the published scripts read, and `load_checkpoint`.

    Args:
        model: what to write.
        path: the file.
        layout: "state_dict" or "model": under that name, the constructor's arguments beside it; "bare": weights alone.
        prefix: before every name.

    Raises:
        CheckpointError: bare weights would not tell the model's arguments.
        OSError: `path` cannot be written.
    """
    import torch

    from ..checkpoint.save_load import arguments_of, transform_entry

    arguments, own = arguments_of(model), model.state_dict()
    weights = {prefix + name: value for name, value in own.items()}
    if layout == "bare":
        _check_inferred(arguments, own, path)
    content = weights if layout == "bare" else {layout: weights, "arguments": arguments, **transform_entry(model)}
    write_atomically(path, lambda file: torch.save(content, file))


def _check_inferred(arguments: dict, weights: dict, path: Path) -> None:
    from ..checkpoint.mae import infer_mae, is_mae
    from ..checkpoint.published import infer_arguments

    try:
        inferred, _ = (infer_mae if is_mae(weights) else infer_arguments)(weights, {})
    except ValueError as error:
        raise CheckpointError(f"{path}: bare weights do not tell their model ({error}); use another --layout") from error
    # Dropout leaves what a model computes as it is.
    lost = [name for name, value in arguments.items() if name not in ("dropout", "emb_dropout") and inferred.get(name) != value]
    if lost:
        words = ", ".join(f"{name}={arguments[name]!r}" for name in lost)
        raise CheckpointError(f"{path}: bare weights do not tell {words}; use another --layout")
