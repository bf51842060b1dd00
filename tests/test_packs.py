"""Packs: what `crate-fast prepare` writes, what it leaves out, what a kill leaves behind, what damage is told."""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call
from helpers.pictures import cut, make_folder, photographs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_fast import files
from crate_fast.data import pack_writer
from crate_fast.data.folder import open_folder
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_file import HEADER_SIZE, INDEX, JPEG, Encoded, Pack, PackError, Unreadable, write_pack
from crate_fast.data.pack_folder import Split, open_packs, verify
from crate_fast.data.pack_writer import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("packs") / "folder", train=36, val=12)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


SMALL = Settings(short_side=24, raw=True, pack_images=5)


def run_until(moment: int, folder: Path, target: Path) -> None:
    """Packs in a process of its own with two workers; the process is killed when its files have been touched `moment` times."""
    context = multiprocessing.get_context("fork")
    touched = context.Value("q", 0)

    def child() -> None:
        own = os.getpid()

        def count(function):
            def counted(*arguments, **options):
                with touched.get_lock():
                    touched.value += 1
                    if touched.value == moment:
                        os.kill(own, signal.SIGKILL)
                return function(*arguments, **options)

            return counted

        pack_writer.encode = count(pack_writer.encode)
        files.os.fsync, files.os.replace = count(os.fsync), count(os.replace)
        prepare(folder, target, SMALL, workers=2)
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """Packs whose making nothing stopped."""
    target = tmp_path_factory.mktemp("packs") / "straight"
    prepare(folder, target, SMALL, workers=1)
    return target


@pytest.mark.parametrize("moment", [1, 3, 40, 51, 64, 77, 90, 103, 121, 129])
def test_a_kill_at_any_moment_leaves_no_trace(folder, straight, tmp_path, moment):
    """129 is in the middle of writing the list of packs, the last of all."""
    run_until(moment, folder, tmp_path / "packs")
    whole = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "packs").glob("*.pack")}
    assert all(content == (straight / name).read_bytes() for name, (_, content) in whole.items())
    if moment < 129:
        with pytest.raises(PackError, match=r"has not come to its end there; the same command goes on|No such file"):
            open_packs(tmp_path / "packs")
    prepare(folder, tmp_path / "packs", SMALL, workers=2)
    assert contents(tmp_path / "packs") == contents(straight)
    assert all((tmp_path / "packs" / name).stat().st_ino == inode for name, (inode, _) in whole.items())


def test_a_worker_that_is_killed_is_told(folder, tmp_path, monkeypatch):
    started = time.monotonic()
    monkeypatch.setattr(pack_writer, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(pack_writer, "_estimate", lambda *_: 0)
    with pytest.raises(pack_writer.ConfigError, match=r"--workers is 2: one was ended from outside.*the same command goes on"):
        prepare(folder, tmp_path / "packs", SMALL, workers=2)
    monkeypatch.undo()
    prepare(folder, tmp_path / "packs", SMALL, workers=2)
    assert len(open_packs(tmp_path / "packs").train) == 36
    assert time.monotonic() - started < 15  # the others are not waited for


def make_odd(path: Path) -> dict[str, bool]:
    """A folder of images as they are found in the wild, in both splits alike; by name, whether each can be read."""
    photograph = cut(photographs()["china"], 50, np.random.default_rng(0))
    for split in ("train", "val"):
        there = path / split / "class"
        there.mkdir(parents=True)
        photograph.convert("CMYK").save(there / "cmyk.jpg", quality=95)
        photograph.convert("L").save(there / "grey.jpg", quality=95)
        photograph.quantize(200, dither=Image.Dither.NONE).save(there / "palette.png")
        photograph.convert("RGBA").save(there / "alpha.png")
        photograph.save(there / "png.JPEG", format="png")
        photograph.save(there / "plain.jpg", quality=95)
        photograph.save(there / "progressive.jpg", quality=95, progressive=True, subsampling=0)
        photograph.resize((50, 400)).save(there / "long.webp")
        photograph.resize((1, 1)).save(there / "dot.bmp")
        whole = (there / "plain.jpg").read_bytes()
        (there / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (there / "empty.jpg").write_bytes(b"")
        (there / "text.png").write_bytes(b"no image")
    unreadable = ("truncated.jpg", "empty.jpg", "text.png")
    return {file.name: file.name not in unreadable for file in sorted((path / "train" / "class").iterdir())}


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        (("--short-side", "0", "--raw"), {"train", "val"}),
        (("--short-side", "0", "--quality", "95"), {"val"}),
        (("--short-side", "40", "--quality", "95"), {"val"}),
    ],
)
def test_odd_images_are_read_right_or_listed(tmp_path, capsys, flags, exact):
    odd = make_odd(tmp_path / "folder")
    status, out, err = call(capsys, "prepare", "imagenet", tmp_path / "folder", tmp_path / "packs", *flags, "--workers", 1)
    assert (status, f"{sum(odd.values())} train, {sum(odd.values())} val images in 2 packs" in out) == (0, True)
    bad = [f"{split}/class/{name}" for split in ("train", "val") for name, readable in odd.items() if not readable]
    lines = err.splitlines()
    assert len(lines) == len(bad)
    assert all(f"unreadable, left out: {tmp_path / 'folder' / name}: " in line for name, line in zip(bad, lines, strict=True))
    assert [line.split("\t")[0] for line in (tmp_path / "packs" / "unreadable.txt").read_text().splitlines()] == bad
    packs = open_packs(tmp_path / "packs")
    for name, split in (("train", packs.train), ("val", packs.val)):
        assert len(split) == sum(odd.values())
        for index, file in enumerate(name for name, readable in odd.items() if readable):
            with Image.open(tmp_path / "folder" / name / "class" / file) as opened:
                image = opened.convert("RGB")
            if "40" in flags and min(image.size) > 40:
                image = image.resize((40, 40 * image.height // image.width), Image.Resampling.BILINEAR)
            difference = np.abs(split.pixels(index).astype(int) - np.asarray(image))
            assert difference.max() == 0 if name in exact else difference.mean() < 6, file


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, os.strerror(errno.EIO), "00003.jpg"), MemoryError()], ids=["EIO", "memory"]
)
def test_an_image_that_cannot_be_read_just_now_is_not_left_out(folder, tmp_path, monkeypatch, capsys, error):
    """A pack without it would lack it for ever."""
    command = ["prepare", "imagenet", folder, tmp_path / "packs", "--workers", "2"]
    read = Path.read_bytes

    def fails(path):
        if path.name == "00003.jpg":
            raise error
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        status, _, err = call(capsys, *command)
    assert (status, err.count("\n")) == (2, 1), err
    assert "00003.jpg" in err or "out of memory" in err
    assert not (tmp_path / "packs" / "packs.json").exists()
    assert call(capsys, *command)[0] == 0
    assert len(open_packs(tmp_path / "packs").train) == 36 and not list((tmp_path / "packs").glob(".*.tmp"))


def test_a_jpeg_that_is_not_reduced_is_kept_to_the_byte(folder, tmp_path):
    prepare(folder, tmp_path / "packs", Settings(short_side=0), workers=1)
    store, packs = open_folder(folder)[0], open_packs(tmp_path / "packs")
    content = (tmp_path / "packs" / "train-00000.pack").read_bytes()
    for index in range(len(store)):
        assert Path(store.place(index)).read_bytes() in content
        assert np.array_equal(packs.train.pixels(index), np.asarray(store.read(index)))
        assert packs.train.labels[index] == store.label(index)


IMAGES = st.lists(
    st.builds(
        lambda height, width, label, seed: Encoded(
            np.random.default_rng(seed).bytes(3 * height * width), 0, height, width, label, f"{label}/{seed}"
        ),
        *(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.integers(0, 99)),
    ),
    max_size=4,
)


@given(IMAGES, st.data())
def test_any_byte_that_is_not_as_written_is_told(tmp_path_factory, images, data):
    """Of a pack of any images one byte is another: opening it, or reading the image in which it lies, says where."""
    path = tmp_path_factory.mktemp("packs") / "a.pack"
    write_pack(path, [*images, Unreadable("b", "c")])
    content = bytearray(path.read_bytes())
    pack = Pack(path)
    assert (pack.names, pack.unreadable) == ([image.name for image in images], [Unreadable("b", "c")])
    assert [pack.content(number).tobytes() for number in range(len(pack))] == [image.content for image in images]
    starts = [0, *pack.index["offset"].tolist(), *struct.unpack("<QQ", content[16:32])]
    place = data.draw(st.integers(0, len(content) - 1))
    start = max(start for start in starts if start <= place)
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(PackError, match=rf"^{re.escape(str(path))}: damaged at byte {start}: "):
        split = Split([Pack(path)])
        for number in range(len(split)):
            pixels = split.pixels(number)
            assert pixels.tobytes() == images[number].content
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(PackError, match=rf"^{re.escape(str(path))}: damaged at byte \d+: "):
        Pack(path)


def test_a_jpeg_that_cannot_be_decoded_is_told(tmp_path):
    path = tmp_path / "a.pack"
    write_pack(path, [Encoded(b"no JPEG", JPEG, 5, 5, 0, "train/a/b.jpg")])
    with pytest.raises(PackError, match=r"a\.pack: damaged at byte 64: image 0, train/a/b\.jpg, .* cannot be decoded \("):
        Split([Pack(path)]).pixels(0)


def test_verify_finds_what_nobody_has_read_yet(straight, tmp_path, folder, capsys):
    assert verify(straight) == 48
    target = tmp_path / "packs"
    target.mkdir()
    for name, content in contents(straight).items():
        (target / name).write_bytes(content)
    pack = target / "val-00001.pack"
    place = int(Pack(pack).index["offset"][2])
    content = bytearray(pack.read_bytes())
    content[place + 7] ^= 16
    pack.write_bytes(content)
    flags = ("--short-side", 24, "--raw", "--pack-images", 5)
    status, _, err = call(capsys, "prepare", "imagenet", folder, target, *flags, "--verify")
    size = Pack(pack).index["size"][2]
    assert status == 2
    assert err == (
        f"crate-fast: error: {pack}: damaged at byte {place}: image 2, {Pack(pack).names[2]}, its {size} bytes from there on, "
        "is not what was written\n"
    )


def test_a_pack_in_anothers_place_is_refused_and_written_anew(folder, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "packs")
    shutil.copy(straight / "train-00000.pack", tmp_path / "packs" / "train-00001.pack")
    with pytest.raises(PackError, match=r"train-00001\.pack: a pack, but not the one that packs\.json lists"):
        open_packs(tmp_path / "packs")
    with pytest.raises(PackError, match="not the one"):
        verify(tmp_path / "packs")
    prepare(folder, tmp_path / "packs", SMALL, workers=1)
    assert "train-00001.pack: a pack, but not the one" in capsys.readouterr().err
    assert contents(tmp_path / "packs") == contents(straight)


def test_what_cannot_be_packed_is_named(folder, straight, tmp_path, capsys, monkeypatch):
    def refused(*words) -> str:
        status, _, err = call(capsys, "prepare", "imagenet", *words)
        assert status == 2
        assert err.count("\n") == 1
        return err

    assert "SRC is" in refused(tmp_path / "absent", tmp_path / "packs")
    assert "which lies in SRC" in refused(folder, folder / "packs")
    assert "prepare.json: packs need a folder of their own" in refused(folder, folder.parent)
    assert f"--raw is False; {straight} was begun with True" in refused(
        folder, straight, "--short-side", 24, "--pack-images", 5
    )
    assert "--short-side is 256; " in refused(folder, straight, "--raw", "--pack-images", 5)
    assert "it must be a whole number from 1 to 100" in refused(folder, tmp_path / "packs", "--quality", 101)
    monkeypatch.setattr(pack_writer, "PATIENCE", 0.2)
    descriptor = os.open(straight, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert f"{straight}: another prepare is in it" in refused(folder, straight)
    os.close(descriptor)
    other = make_folder(tmp_path / "other", train=9, val=3)
    assert "begun with other files" in refused(other, straight, "--raw", "--short-side", 24, "--pack-images", 5)
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    assert re.search(r"where 0\.0 MB are free; about [\d.]+ MB are needed", refused(folder, tmp_path / "packs"))


def test_counts_are_checked_where_the_classes_are_imagenets(monkeypatch):
    counts = {"train": 1_281_166, "val": 50_000}
    assert pack_writer.count_warnings([f"n{number:08d}" for number in range(1000)], counts) == []
    monkeypatch.setattr(pack_writer, "IMAGENET_CLASSES", pack_writer.hashlib.sha256(b"n01440764\nn01443537").hexdigest())
    words = "the classes are ImageNet's, and train has 1,281,166 images; ImageNet has 1,281,167"
    assert pack_writer.count_warnings(["n01440764", "n01443537"], counts) == [words]


def test_the_index_is_as_documented():
    assert (HEADER_SIZE, INDEX.itemsize) == (64, 32)
