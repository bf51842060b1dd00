"""The config.json beside weights, as on the Hugging Face Hub: what it says of a model whose weights have lost what we say."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..files import check_regular, parse_json, shown
from .constructor import ARGUMENTS

CONFIG_NAME = "config.json"
OF_A_RUN = ("config", "resolved")  # what that of a run's directory has, which tells other things
NEEDED = ("dim", "depth")  # what one that describes a CRATE has at least
PAIRS = ("image_size", "patch_size")


def read_beside(weights: Path) -> dict | None:
    """What the Hub's kind of config.json beside a file of weights says of the model, or None where there is none.

    Raises:
        CheckpointError: it cannot be read, or is no JSON.
    """
    path = weights.with_name(CONFIG_NAME)
    try:
        if not path.is_file():
            return None
        check_regular(path)
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); it says what the weights beside it are") from error
    if not isinstance(content, dict) or any(name in content for name in OF_A_RUN) or not all(n in content for n in NEEDED):
        return None
    return content


def settled(weights: Path, arguments: dict | None) -> tuple[dict | None, dict | None]:
    """(the constructor's arguments, config.json): those of the weights' own `arguments`, else of config.json.

    Raises:
        CheckpointError: both are there and differ, or as `read_beside`.
    """
    content = read_beside(weights)
    if content is None:
        return arguments, None
    stated = {name: content[name] for name in ARGUMENTS if name in content}
    own = arguments if isinstance(arguments, dict) else {}
    for name, value in stated.items():
        if name in own and _plain(name, own[name]) != _plain(name, value):
            raise CheckpointError(
                f"{weights}: {name} is {shown(own[name])} by its metadata and {shown(value)} by {CONFIG_NAME} beside it; "
                "remove the one that is wrong"
            )
    return stated if arguments is None else arguments, content


def _plain(name: str, value: object) -> object:
    """Sizes of squares as pairs, in which both may be written."""
    return [value, value] if name in PAIRS and isinstance(value, int) else list(value) if isinstance(value, tuple) else value
