"""CIFAR10, CIFAR100, Flowers102 and Oxford-IIIT Pet by torchvision, which unpickles nothing whose published MD5 is another.

Split as the published finetune.py does. CIFAR (Krizhevsky, 2009): 50,000 images to train on and 10,000 to test. Flowers
(Nilsback and Zisserman, 2008): 1,020 of "trnid" and 6,149 of "tstid". Pets (Parkhi et al., 2012): 3,680 of trainval.txt and
3,669 of test.txt. Labels count from 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from ..files import first_line
from ..optional import require
from ..processes import Ranks
from ..settings import ConfigError, DataSettings
from .device_loader import Pictures, Resident
from .download import Source, bring, is_published
from .folder import Photographs
from .loader import Photos

Files = list[tuple[Path, str]]
Names = list[str] | None  # of the classes, in the order of the labels
Parts = tuple[Pictures, Pictures, Names] | tuple[Photographs, Photographs, Names]


class PublishedSet(NamedTuple):
    """A data set: its class in torchvision; the number of its classes; where it comes from; which of its files have an MD5;
    what opens it: training images, test images, names of the classes where torchvision has them; from what its own files count
    labels, where that is not 0, as ours do."""

    kind: str
    classes: int
    sources: Callable[[type], list[Source]]
    checked: Callable[[type, Path], Files]
    open: Callable[[type, Path], Parts]
    first_label: int = 0


class Opened(NamedTuple):
    """Training and test images, the number of classes, and their names in the order of the labels, None where unknown."""

    train: Pictures | Photographs
    test: Pictures | Photographs
    classes: int
    names: Names


def open_set(settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int]) -> Photos | Resident:
    """The data set as `settings` ask for it: where all images have one size, all of them on the device."""
    require("PIL")
    name = settings.data
    train, test, classes, names = _open_in_turn(name, settings.data_dir, ranks)
    if isinstance(train, Pictures) and isinstance(test, Pictures):
        require("cv2")
        return Resident(name, train, test, classes, settings, device, size, names)
    train, test = cast("Photographs", train), cast("Photographs", test)
    return Photos(name, train, test, classes, settings, device, ranks, "a smaller --image-size", names, size)


def _open_in_turn(name: str, directory: str, ranks: Ranks) -> Opened:
    """`open_published`, by the first process before all others, so that it alone downloads, and says what is wrong."""
    opened: list[Opened] = []
    ranks.share(lambda: opened.append(open_published(name, directory)))
    return opened[0] if opened else open_published(name, directory)


def open_published(name: str, directory: str | Path) -> Opened:
    """Training and test images of one of `SETS`, and its classes.

    Args:
        name: the data set.
        directory: where its folder is, or is made from the published files, which are downloaded if they are not there.

    Raises:
        ConfigError: the files are neither there nor to be had, or one is damaged or not the published one.
        MissingPackageError: torchvision is not installed.
    """
    data, directory = SETS[name], Path(directory)
    kind = _find_kind(data.kind)
    try:
        train, test, names = _bring_and_open(name, data, kind, directory)
        for part in (train, test):
            _check_labels(name, data, part)
    except OSError as error:
        raise ConfigError(f"{error.filename or directory}: {error.strerror or error}") from error
    # torchvision takes the names of Pets from the images to train on, of which a breed may have none.
    return Opened(train, test, data.classes, names if names and len(names) == data.classes else None)


def _bring_and_open(name: str, data: PublishedSet, kind: type, directory: Path) -> Parts:
    checked = data.checked(kind, directory)
    if not any(path.parent == directory for path, _ in checked):  # else --data-dir is the folder itself
        for source in data.sources(kind):
            bring(source, directory)
    try:
        return data.open(kind, directory)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged list can raise anything, and torchvision does not tell which file it refuses
        _name_refused(name, checked, directory, {directory / source.made for source in data.sources(kind)})
        raise ConfigError(f"{directory}: the files of {name} are damaged, or others ({first_line(error)})") from error


def _find_kind(name: str) -> type:
    require("torchvision", "scipy")
    try:
        from torchvision import datasets
    except Exception as error:  # beside a PyTorch that it was not made for
        raise ConfigError(f"torchvision cannot be imported: is it the one for this PyTorch? ({first_line(error)})") from error
    return getattr(datasets, name)


def _name_refused(name: str, checked: Files, directory: Path, made: set[Path]) -> None:
    """Raises ConfigError if a file is missing or has another MD5, saying which of `made` is to be removed, to be made anew."""
    for path, md5 in checked:
        removed = path if path in made else path.parent
        again = f"; remove {removed} to have it made anew" if removed != directory else ""  # which is the user's
        if not path.is_file():
            raise ConfigError(f"{path.parent}: {path.name} of {name} is missing{again}")
        if not is_published(path, md5):
            raise ConfigError(f"{path}: not the published file of {name} (its MD5 is another){again}")


def _check_labels(name: str, data: PublishedSet, part: Pictures | Photographs) -> None:
    """Raises ConfigError unless all labels are ones of `data`, whose files count them so, and all photographs are there."""
    first = data.first_label
    for index in range(len(part)):
        if not 0 <= part.label(index) < data.classes:
            where = part.place(index) if isinstance(part, Photographs) else f"image {index}"
            raise ConfigError(
                f"{where} has the label {part.label(index) + first}; {name} has {first} to {data.classes - 1 + first}"
            )
        if isinstance(part, Photographs) and not Path(part.place(index)).is_file():
            folder = Path(part.place(index)).parent
            raise ConfigError(f"{part.place(index)} of {name} is missing; remove {folder} to have it made anew")


def _cifar_sources(kind: type) -> list[Source]:
    return [Source(kind.url, kind.tgz_md5, kind.base_folder)]


def _cifar_checked(kind: type, directory: Path) -> Files:
    own = (directory / kind.test_list[0][0]).is_file()
    folder = directory if own else directory / kind.base_folder
    return [(folder / file, md5) for file, md5 in (*kind.train_list, *kind.test_list)]


def _open_cifar(kind: type, directory: Path) -> tuple[Pictures, Pictures, Names]:
    folder = _cifar_checked(kind, directory)[0][0].parent

    class InFolder(kind):
        base_folder, classes = "", None

        def _load_meta(self) -> None:
            """The names of the classes need not be there; another file of that name is not read."""
            if is_published(folder / self.meta["filename"], self.meta["md5"]):
                super()._load_meta()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of dtypes as Python 2 has pickled them
        train, test = (InFolder(folder, train=part) for part in (True, False))
    pictures = [Pictures(np.ascontiguousarray(part.data), part.targets) for part in (train, test)]
    return pictures[0], pictures[1], train.classes


def _flower_sources(kind: type) -> list[Source]:
    made = {"image": "jpg"}  # an archive of that folder
    files = kind._file_dict.items()
    return [Source(kind._download_url_prefix + file, md5, f"flowers-102/{made.get(key, file)}") for key, (file, md5) in files]


def _flower_checked(kind: type, directory: Path) -> Files:
    return [(directory / "flowers-102" / file, md5) for key, (file, md5) in kind._file_dict.items() if key != "image"]


def _open_flowers(kind: type, directory: Path) -> tuple[Photographs, Photographs, Names]:
    train, test = (kind(directory, split) for split in ("train", "test"))
    parts = [_photographs(part._image_files, part._labels) for part in (train, test)]
    return parts[0], parts[1], getattr(kind, "classes", None)  # which older versions lack


def _pet_sources(kind: type) -> list[Source]:
    return [Source(url, md5, f"oxford-iiit-pet/{url.rsplit('/', 1)[-1].partition('.')[0]}") for url, md5 in kind._RESOURCES]


def _pet_checked(kind: type, directory: Path) -> Files:
    return []  # only the archives have an MD5


def _open_pets(kind: type, directory: Path) -> tuple[Photographs, Photographs, Names]:
    train, test = (kind(directory, split) for split in ("trainval", "test"))
    parts = [_photographs(part._images, part._labels) for part in (train, test)]
    return parts[0], parts[1], train.classes


def _photographs(files: list[Path], labels: list[int]) -> Photographs:
    return Photographs([(str(file), label) for file, label in zip(files, labels, strict=True)])


SETS = {
    "cifar10": PublishedSet("CIFAR10", 10, _cifar_sources, _cifar_checked, _open_cifar),
    "cifar100": PublishedSet("CIFAR100", 100, _cifar_sources, _cifar_checked, _open_cifar),
    "flowers102": PublishedSet("Flowers102", 102, _flower_sources, _flower_checked, _open_flowers, first_label=1),
    "pets": PublishedSet("OxfordIIITPet", 37, _pet_sources, _pet_checked, _open_pets, first_label=1),
}
