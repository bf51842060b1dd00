"""Packages whose names are imported where they are used (PEP 562), so that what needs no PyTorch does not wait for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, places: dict[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`, whose names come from its modules when they are asked for.

    Args:
        package: its name.
        places: by a module's name, which names come from it; none: the module itself is the name.
    """
    homes = {name: module for module, names in places.items() for name in names or (module,)}

    def get(name: str) -> Any:
        if name not in homes:
            return _submodule(package, name)
        module = import_module(f"{package}.{homes[name]}")
        value = getattr(module, name) if places[homes[name]] else module
        setattr(sys.modules[package], name, value)  # not asked for again
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


def _submodule(package: str, name: str) -> Any:
    """The module `name` of `package`; raises AttributeError where there is none."""
    own = f"{package}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(own)
    except ModuleNotFoundError as error:
        if error.name != own:
            raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
