"""What lies beside the weights in a checkpoint, settings and numbers of other packages: marks stand for it, made of nothing.

PyTorch's reader of weights alone refuses a file for one `argparse.Namespace` or NumPy's number in it. Here each name of a class
that a pickle asks for is given a mark, which takes whatever it is called with and keeps none of it. No module is imported and
nothing of a name is called, whatever the name is. Names of functions as only an attack has them are refused all the same, so
that nobody takes the file for a good one.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch.serialization import safe_globals

PICKLES = 4  # at the beginning of an old archive: two numbers, the machine, the content
MOST = 1000  # names in a file
PLAIN = {
    "argparse": ("Namespace",),
    "builtins": ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str", "tuple"),
    "collections": ("defaultdict", "deque", "ChainMap", "UserDict"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "pathlib": ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "types": ("SimpleNamespace",),
    "typing": ("Any", "Optional", "Union"),
    "uuid": ("UUID",),
}
"""Python's own classes that are values: of all others in its library none is taken."""


class Mark:
    """Stands for an object of any class."""

    def __init__(self, *_, **__) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


class Table:
    """Stands for a class of dictionaries, which PyTorch fills only where they are its own."""

    def __new__(cls, *_, **__):
        return OrderedDict()


@contextmanager
def marked(names: set[str], kind: type) -> Iterator[None]:
    """In which PyTorch's reader takes marks for `names`; NumPy has no dictionaries, so that `kind` is of the other names."""
    with safe_globals([(Mark if name.startswith("numpy.") else kind, name) for name in names]):
        yield


def names_of_objects(path: Path, file: BinaryIO, zipped: bool) -> set[str]:
    """The names in the pickle of an archive for which there may be marks; none where it is no pickle that can be followed."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(entry) as part:
                    names = set(_names_in(part, 1))
        else:
            names = set(_names_in(file, PICKLES))
    except Exception:  # whatever is wrong with it, PyTorch's reader says it
        return set()
    return {name for name in names if _is_value(name)} if len(names) <= MOST else set()


def _names_in(file, pickles: int) -> Iterator[str]:
    for _ in range(pickles):
        for operation, argument, _place in pickletools.genops(file):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                yield f"{module}.{name}"


def _is_value(name: str) -> bool:
    """Whether a name is that of a class whose objects may lie in a checkpoint."""
    module, _, last = name.rpartition(".")
    package = module.partition(".")[0]
    if package == "torch":  # its reader takes storages itself, before any mark; the others are a class, or a function
        return last[:1].isupper() and not last.endswith("Storage")
    if package in sys.stdlib_module_names:
        return last in PLAIN.get("pathlib" if package == "pathlib" else module, ())
    return True
