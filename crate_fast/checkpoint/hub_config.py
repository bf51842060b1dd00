"""What stands beside weights on the Hugging Face Hub: config.json says what the model is, preprocessor_config.json what is done
to a photograph. Both are what huggingface_hub's mixin and transformers read and write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..eval_transform import MAIN, Transform, imagenet_statistics
from ..files import check_regular, parse_json, shown, tell, write_atomically
from .constructor import OF_MODELS, PUBLISHED_MODEL
from .tensor_files import is_of_hub
from .timm_config import as_own

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
OF_A_RUN = ("config", "resolved")  # what that of a run's directory has, which tells other things
NEEDED = ("dim", "depth")  # what one that describes a CRATE has at least
PAIRS = ("image_size", "patch_size")
PROCESSOR = "CrateImageProcessor"
PHOTOGRAPHS = (1, 3)  # channels of what is made of one
BILINEAR = 2  # as Pillow numbers it


class OnHub(NamedTuple):
    """What a member of the family is called on the Hub.

    model_type: to transformers, which chooses its classes by it.
    classifier: the class that transformers is to make of it.
    title, paper: in its card's words, and the paper's address.
    """

    model_type: str
    classifier: str
    title: str
    paper: str

    def entries(self) -> dict:
        """What stands in config.json for transformers."""
        return {"model_type": self.model_type, "architectures": [self.classifier]}


ON_HUB = {
    "CRATE": OnHub(
        "crate",
        "CrateForImageClassification",
        "White-Box Transformers via Sparse Rate Reduction",
        "https://arxiv.org/abs/2306.01129",
    ),
    "CRATEAlpha": OnHub(
        "crate_alpha",
        "CrateAlphaForImageClassification",
        "Scaling White-Box Transformers for Vision",
        "https://arxiv.org/abs/2405.20299",
    ),
}
"""By the name of its class, as the constructor's arguments have it."""
MEMBERS = {each.model_type: name for name, each in ON_HUB.items()}


def on_hub(arguments: dict) -> OnHub:
    """Of the model that the constructor's `arguments` build."""
    return ON_HUB[arguments.get("model", PUBLISHED_MODEL)]


def read_beside(weights: Path) -> dict | None:
    """What the Hub's kind of config.json beside a file of weights says of the model; None where there is none, or another's.

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
    content = as_own(content) or content if isinstance(content, dict) else content
    if not isinstance(content, dict) or any(name in content for name in OF_A_RUN) or not all(n in content for n in NEEDED):
        return None
    if "model_type" not in content:
        return content
    member = MEMBERS.get(content["model_type"]) if isinstance(content["model_type"], str) else None
    return None if member is None else {"model": member} | content


def settled(weights: Path, arguments: dict | None) -> tuple[dict | None, dict | None]:
    """(the constructor's arguments, config.json): those of the weights' own `arguments`, else of config.json.

    Weights that say nothing of themselves are what config.json beside them says, whatever they are called. Those that do are
    held against it where they are called as on the Hub, model.safetensors or a part of it, whose config.json is theirs: a file
    of any other name may lie beside another model's. One that cannot be read is then said on stderr, and passed over.

    Raises:
        CheckpointError: both are there and differ; there is config.json alone, and it cannot be read.
    """
    if arguments is not None and not is_of_hub(weights):
        return arguments, None
    try:
        content = read_beside(weights)
    except CheckpointError as error:
        if arguments is None:
            raise
        tell(f"{error}; taken: what {weights.name} says of itself")
        return arguments, None
    if content is None:
        return arguments, None
    stated = {name: content[name] for name in OF_MODELS if name in content}
    own = arguments if isinstance(arguments, dict) else {}
    named = {"model": PUBLISHED_MODEL} | own if own else {}
    for name, value in stated.items():
        if name in named and _plain(name, named[name]) != _plain(name, value):
            raise CheckpointError(
                f"{weights}: {name} is {shown(named[name])} by its metadata and {shown(value)} by {CONFIG_NAME} beside it; "
                "remove the one that is wrong"
            )
    return stated if arguments is None else arguments, content


def _plain(name: str, value: object) -> object:
    """Sizes of squares as pairs, in which both may be written."""
    return [value, value] if name in PAIRS and isinstance(value, int) else list(value) if isinstance(value, tuple) else value


def preprocessor_config(image_size: Sequence[int], channels: int, transform: Transform | None) -> dict | None:
    """What preprocessor_config.json says of a model's images, for `crate_fast.transformers`: as `crate_fast.load` makes them.

    None where no photograph has the model's channels, or its mean and std are of others.

    Args:
        image_size: height and width.
        channels: of the model.
        transform: how its images are evaluated; what that leaves open is as in main.py, and ImageNet's.
    """
    if channels not in PHOTOGRAPHS:
        return None
    transform = transform or MAIN
    known = transform.mean is not None and transform.std is not None
    mean, std = (transform.mean, transform.std) if known else imagenet_statistics(channels)
    if mean is None or std is None or len(mean) != channels:
        return None
    return {
        "image_processor_type": PROCESSOR,
        "do_resize": True,
        "size": dict(zip(("height", "width"), image_size, strict=True)),
        "crop_pct": transform.crop,
        "resample": BILINEAR,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def write_json(path: Path, values: dict) -> None:
    """Writes `values` to `path`, whole or not at all; raises OSError where it cannot be written."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
