"""CIFAR10 and CIFAR100 in their published files (Krizhevsky, 2009): pickles, read without letting them run anything."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ..pickles import AdmittingUnpickler
from .config import ConfigError
from .download import published, unpack

SIDE = 32


class Files(NamedTuple):
    """Where a data set comes from and what is in it."""

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    classes: int


SETS = {
    "cifar10": Files(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "labels",
        10,
    ),
    "cifar100": Files(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        ("train",),
        ("test",),
        "fine_labels",
        100,
    ),
}


class Pictures:
    """Images in memory: `pixels` (n, 32, 32, 3) uint8 and n `labels`; `read(i)` gives the i-th, `label(i)` its class."""

    def __init__(self, pixels: np.ndarray, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return self.labels[index]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def open_cifar(name: str, directory: str | Path) -> tuple[Pictures, Pictures, int]:
    """Training and test images of "cifar10" or "cifar100", and the number of classes.

    Args:
        name: the data set.
        directory: where its folder is, or is made from the published archive, which is downloaded if it is not there.

    Raises:
        ConfigError: the files are neither there nor to be had, or one is damaged or holds something else.
    """
    files, directory = SETS[name], Path(directory)
    folder = directory if (directory / files.test[0]).is_file() else directory / files.folder
    if not folder.is_dir():
        unpack(published(files.url, files.md5, directory, files.folder), directory)
    missing = [part for part in (*files.train, *files.test) if not (folder / part).is_file()]
    if missing:
        raise ConfigError(f"{folder}: {missing[0]} of {name} is missing")
    train, test = (_join(folder, parts, files) for parts in (files.train, files.test))
    return Pictures(*train), Pictures(*test), files.classes


def _join(folder: Path, parts: tuple[str, ...], files: Files) -> tuple[np.ndarray, list[int]]:
    batches = [read_batch(folder / part, files.labels, files.classes) for part in parts]
    return np.concatenate([pixels for pixels, _ in batches]), [label for _, labels in batches for label in labels]


def read_batch(path: Path, key: str, classes: int) -> tuple[np.ndarray, list[int]]:
    """The images, (n, 32, 32, 3) uint8, and labels of one published file.

    Raises:
        ConfigError: the file cannot be read, asks for anything but arrays, or does not hold such images and labels.
    """
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything; nothing in it has been executed
        raise ConfigError(f"{path}: damaged, or no file of CIFAR ({str(error).strip() or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: no file of CIFAR: it holds a {type(content).__name__}")
    named = {word.decode("latin1") if isinstance(word, bytes) else word: value for word, value in content.items()}
    pixels, labels = (v.whole if isinstance(v, _Array) else v for v in (named.get("data"), named.get(key)))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * SIDE**2:
        raise ConfigError(f"{path}: no file of CIFAR: its 'data' is no uint8 array of rows of {3 * SIDE**2}")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_label(label, classes) for label in labels):
        raise ConfigError(f"{path}: no file of CIFAR: its {key!r} are not {len(pixels)} whole numbers below {classes}")
    pixels = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), labels


def _is_label(value: object, classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < classes


class _Dtype:
    """A dtype's code; what a pickle adds to it (byte order, alignment) is that of the code."""

    def __init__(self, code: Any, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in ("u1", "i1", "i2", "i4", "i8", "|u1"):
            raise pickle.UnpicklingError(f"it asks for an array of {code!r}, and only whole numbers are read")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or state[1:2] == (">",):
            raise pickle.UnpicklingError("its arrays have another byte order")


class _Array:
    """What an array was pickled as; `whole` is the array."""

    whole: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.whole = _shaped(content.encode("latin1") if isinstance(content, str) else content, dtype, shape, "CF"[fortran])


def _kind(*_: object) -> None:
    """Stands for the class of arrays, which is only named."""
    raise pickle.UnpicklingError("it asks for something else than an array")


def _reconstruct(kind: object, shape: tuple, code: bytes) -> _Array:
    """An empty array, which its pickled state fills."""
    if kind is not _kind:
        raise pickle.UnpicklingError("it asks for something else than an array")
    return _Array()


def _frombuffer(content: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    found = _Array()
    found.whole = _shaped(content, dtype, shape, order)
    return found


def _shaped(content: bytes, dtype: _Dtype, shape: tuple, order: Any) -> np.ndarray:
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("it has an array that is no bytes of whole numbers")
    return np.frombuffer(content, dtype.code).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it asks for another encoding than latin1")
    return text.encode("latin1")


class _Unpickler(AdmittingUnpickler):
    """Admits arrays of whole numbers, under stand-ins that hold values and do nothing: NumPy's own classes could be told to
    take the file's bytes for addresses."""

    contents = "arrays"
    admitted: ClassVar = {
        ("numpy", "ndarray"): _kind,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in a pickle that Python 2 can read
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    }
