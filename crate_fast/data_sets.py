"""The data sets that have a name: one table; imports nothing. What opens one is a module of `crate_fast.data`."""

from typing import NamedTuple


class DataSet(NamedTuple):
    """A data set.

    text: what it is, for the help.
    module: of `crate_fast.data`, whose `open_set` opens it.
    images: what its images are, and so what may change them in training: a key of `UNCHANGED`; "" for nothing.
    finetune: its name in the published finetune.py, where it is there.
    """

    text: str
    module: str
    images: str = "photographs"
    finetune: str | None = None


DATA_SETS = {
    "digits": DataSet("1,797 handwritten digits that scikit-learn carries", "digits", images="digits"),
    "cifar10": DataSet("60,000 small photographs of 10 kinds of things", "published_sets", finetune="cifar10"),
    "cifar100": DataSet("60,000 small photographs of 100 kinds of things", "published_sets", finetune="cifar100"),
    "flowers102": DataSet("8,189 photographs of 102 kinds of flowers", "published_sets", finetune="flower"),
    "pets": DataSet("7,349 photographs of 37 breeds of cats and dogs", "published_sets", finetune="pets"),
    "synthetic": DataSet("numbers by chance in ImageNet's shape, to time the loop", "synthetic", images=""),
}
"""By name; any other `--data` is a folder, of photographs."""

UNCHANGED = {
    "photographs": {"augment": "none", "erase": 0.0},
    "digits": {"rotate": 0.0, "zoom": 0.0, "shift": 0.0},
}
"""The settings that change images of a kind at random, and the values with which they change nothing."""


def images_of(data: str) -> str:
    """What the images of `--data` are: see `DataSet.images`."""
    return DATA_SETS[data].images if data in DATA_SETS else "photographs"
