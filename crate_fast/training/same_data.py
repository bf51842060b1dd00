"""Whether the data of a run are still those that it was started with."""

from __future__ import annotations

import sys

from ..data.pictures import READER_ENTRY
from ..settings import ConfigError
from .run_directory import RunDirectory

CLASS_NAMES = {"class_names": "the classes have other names, or another order"}
COUNTED_ANEW = (
    "; a run begun before this version may have counted hidden files, passed over linked folders and *.jfif, or read images of "
    "16 bits, transparent or turned ones otherwise: go on with --data and a folder of just the images that it had, or begin a "
    "new run from its weights with --init"
)
READ_ANEW = (
    "begun before images of 16 bits, transparent and turned ones were read as they are now; with such images the run does not "
    "go on to the same bits"
)
DATA_IDENTITY = {
    "name": "they are of another kind",
    "classes": "the number of classes is another",
    **CLASS_NAMES,
    "held_out": "the images that are held out for evaluation are others",
    "train_images": "the number of training images is another",
    "test_images": "the number of test images is another",
}
"""What must not differ where a run goes on, by its name in config.json."""


def check_same_data(run: RunDirectory, now: dict, compared: dict[str, str] = DATA_IDENTITY) -> None:
    """Compares data, as they `describe` themselves, with what the run was started with.

    Raises:
        ConfigError: one of the `compared` differs, which are in words beside their names.
    """
    before = run.read_data()
    for name, words in compared.items():
        if name in before and name in now and before[name] != now[name]:
            why = COUNTED_ANEW if before.get(READER_ENTRY) != now.get(READER_ENTRY) else ""
            raise ConfigError(
                f"--data: not what the run in {run.path} was started with: {words} ({now[name]}, not {before[name]}){why}"
            )


def warn_of_reader(run: RunDirectory, now: dict) -> None:
    """Says on stderr where the run was started when images were read otherwise than `now`."""
    if READER_ENTRY in now and run.read_data().get(READER_ENTRY) != now[READER_ENTRY]:
        print(f"crate-fast: warning: {run.path}: {READ_ANEW}", file=sys.stderr)
