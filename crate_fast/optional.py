"""Optional packages: which are needed, whether they are there, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MissingPackageError

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "huggingface_hub": "huggingface-hub",
    "lion_pytorch": "lion-pytorch",
    "matplotlib": "matplotlib",
    "ninja": "ninja",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "setuptools": "setuptools",
    "shtab": "shtab",
    "simplejpeg": "simplejpeg",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "transformers": "transformers",
}
"""Import name to package name, for all that the extras bring."""
OTHERS = dict.fromkeys(("cv2", "lion_pytorch", "pydantic", "simplejpeg", "torchvision"), "train") | {
    "huggingface_hub": "hub",
    "ninja": "cpu",
    "setuptools": "cpu",
    "shtab": "completion",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "transformers": "transformers",
}
"""Import name to the extra that brings it, of those that not every training run needs."""
TRAIN = tuple(name for name in DISTRIBUTIONS if name not in OTHERS)


def missing(error: ModuleNotFoundError) -> MissingPackageError | None:
    """What `require` says of the package that could not be imported; None if that is no optional one."""
    name = (error.name or "").partition(".")[0]
    try:
        require(*([name] if name in DISTRIBUTIONS else []))
    except MissingPackageError as needed:
        return needed
    return None


def require(*modules: str) -> None:
    """Raises MissingPackageError, naming all that is missing, unless every one of `modules` can be imported."""
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        extras = ",".join(sorted({OTHERS.get(name, "train") for name in absent}))
        names = ", ".join(DISTRIBUTIONS[name] for name in absent)
        raise MissingPackageError(f"this needs {names}: pip install 'crate-fast[{extras}]'")
