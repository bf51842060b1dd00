"""What the system cannot read for a moment is asked for again, and never taken for damage: no image is left out for it."""

import builtins
import errno
import io
import os

import pytest
import torch
from conftest import call
from helpers.pictures import make_folder
from PIL import Image

from crate_fast import files
from crate_fast.data.open import open_data
from crate_fast.data.order import Plan
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_writer import prepare
from crate_fast.data.pictures import read_or_stop
from crate_fast.processes import ALONE
from crate_fast.training import resolve

NUMBERS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT, errno.ENOENT]
SMALL = dict(image_size=24, patch_size=8, dim=16, depth=1, heads=1, dim_head=16, workers=0, num_threads=1, device="cpu")
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same images as a "folder" and as "packs"."""
    path = tmp_path_factory.mktemp("passing")
    make_folder(path / "folder", train=8, val=4)
    prepare(path / "folder", path / "packs", Settings(short_side=32, raw=True), workers=1)
    return path


class Failing(io.BytesIO):
    """A file that a disk gives the begin of, and not the rest."""

    number = 0

    def read(self, size=-1):
        if size < 0 or self.tell() + size > 300:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(size)


def fail(monkeypatch, number: int, times: float) -> list:
    """Lets the disk fail `times` times, of a photograph 00003.jpg after its begin, and of packs; what has failed so far."""
    real, preadv, failed = open, os.preadv, []

    def opening(name, *arguments, **options):
        if not str(name).endswith("00003.jpg") or len(failed) >= times:
            return real(name, *arguments, **options)
        failed.append(name)
        with real(name, "rb") as file:
            broken = Failing(file.read())
        broken.number = number
        return broken

    def reading(*arguments):
        if len(failed) < times:
            failed.append(arguments)
            raise OSError(number, os.strerror(number))
        return preadv(*arguments)

    monkeypatch.setattr(files, "PAUSES", (0.0,) * len(files.PAUSES))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    return failed


def epoch_of(path) -> torch.Tensor:
    read = open_data(resolve(SMALL | {"data": str(path)}), torch.device("cpu"), ALONE)
    return torch.cat([images for images, _ in read.train_batches(Plan(read.train_count, 4, 0, ranks=ALONE), 1)])


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["folder", "packs"])
def test_an_error_that_passes_changes_no_image(data, monkeypatch, capsys, kind, number):
    before = epoch_of(data / kind)
    with monkeypatch.context() as patch:
        failed = fail(patch, number, 2)
        assert torch.equal(epoch_of(data / kind), before)
    assert len(failed) == 2 and "unreadable" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "packs"])
def test_an_error_that_stays_ends_the_run_in_a_line_that_names_the_file(data, tmp_path, monkeypatch, capsys, kind):
    failed = fail(monkeypatch, errno.EIO, float("inf"))
    status, _, err = call(
        capsys, "train", "--data", data / kind, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 4, *FLAGS
    )
    assert (status, err.count("\n")) == (2, 1) and failed, err
    assert ("00003.jpg" if kind == "folder" else ".pack") in err and os.strerror(errno.EIO) in err


def test_damage_is_told_as_before(data, tmp_path):
    content = next((data / "folder" / "train").rglob("*.jpg")).read_bytes()
    for name, kept in (("short.jpg", content[:300]), ("text.jpg", b"no image"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(kept)
        with pytest.raises(Exception) as raised:
            read_or_stop(tmp_path / name)
        assert not files.is_of_system(raised.value) and "0x" not in str(raised.value)


def test_a_picture_is_not_mapped(tmp_path, monkeypatch):
    """A file that is cut while it is mapped ends the process without a word."""
    Image.new("L", (64, 64), 7).save(tmp_path / "grey.pgm")
    monkeypatch.setattr("mmap.mmap", lambda *_, **__: pytest.fail("it is mapped"))
    assert read_or_stop(tmp_path / "grey.pgm").getpixel((5, 5)) == (7, 7, 7)
