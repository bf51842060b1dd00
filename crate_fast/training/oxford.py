"""Flowers102 and Oxford-IIIT Pet in their published files, split as the published finetune.py does: by torchvision's splits.

Flowers (Nilsback and Zisserman, 2008): train on the 1,020 images of "trnid", test on the 6,149 of "tstid"; the labels 1 to 102
of imagelabels.mat are 0 to 101 here. Pets (Parkhi et al., 2012): train on the 3,680 images of trainval.txt, test on the 3,669
of test.txt; the labels 1 to 37 are 0 to 36 here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..extras import require
from .config import ConfigError
from .download import published, unpack
from .folder import Photographs

Split = list[tuple[str, int]]


class Files(NamedTuple):
    """A data set: its folder in --data-dir; (address, MD5) of its files; the folder of its images; what reads its splits."""

    folder: str
    files: tuple[tuple[str, str], ...]
    images: str
    classes: int
    read: Callable[[Path], tuple[Split, Split]]


def open_oxford(name: str, directory: str | Path) -> tuple[Photographs, Photographs, int]:
    """Training and test images of "flowers102" or "pets", and the number of classes.

    Args:
        name: the data set.
        directory: where its folder is, or is made from the published files, which are downloaded if they are not there.

    Raises:
        ConfigError: the files are neither there nor to be had, or one is damaged or holds something else.
    """
    data = SETS[name]
    folder = Path(directory) / data.folder
    if not (folder / data.images).is_dir():
        for url, md5 in data.files:
            file = published(url, md5, folder, data.images)
            if file.suffix in (".gz", ".tgz"):
                unpack(file, folder)
    train, test = data.read(folder)
    for path, label in (*train, *test):
        if not 0 <= label < data.classes:
            raise ConfigError(f"{folder}: {path} has the label {label + 1}; {name} has 1 to {data.classes}")
    absent = next((path for path, _ in (*train, *test) if not Path(path).is_file()), None)
    if absent is not None:
        raise ConfigError(f"{folder}: {absent} of {name} is missing")
    return Photographs(train), Photographs(test), data.classes


def _read_flowers(folder: Path) -> tuple[Split, Split]:
    labels = _read_mat(folder / "imagelabels.mat", "labels")
    splits = []
    for key in ("trnid", "tstid"):
        numbers = _read_mat(folder / "setid.mat", key)
        if not all(1 <= number <= len(labels) for number in numbers):
            raise ConfigError(f"{folder / 'setid.mat'}: {key!r} names images beyond the {len(labels)} that have labels")
        splits.append([(str(folder / "jpg" / f"image_{number:05d}.jpg"), labels[number - 1] - 1) for number in numbers])
    return splits[0], splits[1]


def _read_mat(path: Path, key: str) -> list[int]:
    """The whole numbers called `key` in a MATLAB file."""
    require("scipy")
    from scipy.io import loadmat

    try:
        return [int(number) for number in loadmat(path, variable_names=[key])[key].ravel()]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"{path}: damaged, or without {key!r} ({str(error).strip() or type(error).__name__})") from error


def _read_pets(folder: Path) -> tuple[Split, Split]:
    train, test = (_read_list(folder, folder / "annotations" / name) for name in ("trainval.txt", "test.txt"))
    return train, test


def _read_list(folder: Path, path: Path) -> Split:
    """The images of one list: lines of a name, a class, a species and a breed."""
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if len(words) != 4 or not words[1].isdecimal():
                raise ConfigError(f"{path}: line {number} is {line[:80]!r}; it must be a name and three numbers")
            found.append((str(folder / "images" / f"{words[0]}.jpg"), int(words[1]) - 1))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: damaged ({error.reason})") from error
    return found


_FLOWERS, _PETS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
SETS = {
    "flowers102": Files(
        "flowers-102",
        (
            (f"{_FLOWERS}imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
            (f"{_FLOWERS}setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
            (f"{_FLOWERS}102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
        ),
        "jpg",
        102,
        _read_flowers,
    ),
    "pets": Files(
        "oxford-iiit-pet",
        (
            (f"{_PETS}annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
            (f"{_PETS}images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
        ),
        "images",
        37,
        _read_pets,
    ),
}
