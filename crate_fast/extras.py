"""Optional packages: which are needed, whether they are there, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

DISTRIBUTIONS = {
    "PIL": "pillow",
    "lion_pytorch": "lion-pytorch",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}
"""Import name to package name, for all that the extra "train" brings."""


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message says how to install it."""


def require(*modules: str) -> None:
    """Raises MissingPackageError, naming all that is missing, unless every one of `modules` can be imported."""
    missing = [DISTRIBUTIONS[name] for name in modules if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"this needs {', '.join(missing)}: pip install 'crate-fast[train]'")
