"""Packs and images from strangers: right checksums over wrong contents, headers that ask for memory, odd names."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import call
from helpers.pictures import make_folder
from PIL import Image

from crate_fast.data.folder import open_folder
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_file import HEADER, INDEX, JPEG, RAW, Encoded, Pack, PackError, write_pack
from crate_fast.data.pack_folder import Split, open_packs
from crate_fast.data.pack_writer import prepare
from crate_fast.data.pictures import MOST_PIXELS, read_picture
from crate_fast.training.monitor import plot_curves
from crate_fast.training.run_directory import RunDirectory

SMALL = ["--image-size", "16", "--patch-size", "8", "--dim", "16", "--depth", "1", "--heads", "1", "--dim-head", "16"]
QUICK = [*SMALL, "--device", "cpu", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
ANY_NAME = os.fsdecode(b"$caf\xe9$")


def jpeg(side: int) -> bytes:
    """A JPEG of 8×8 pixels whose header says that its side is `side`."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(content)


def png(side: int) -> bytes:
    """A PNG whose header says that its side is `side`."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)


def saved(kind: str, changes: dict[int, bytes]) -> bytes:
    """An image of 8×8 pixels of which the bytes at some places are others."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    content = bytearray(file.getvalue())
    for place, new in changes.items():
        content[place : place + len(new)] = new
    return bytes(content)


BOMBS = {
    "jpg": jpeg(60_000),
    "png": png(60_000),
    "png, just above": png(9_460),
    "gif": saved("gif", {6: struct.pack("<HH", 60_000, 60_000)}),
    "bmp": saved("bmp", {18: struct.pack("<ii", 60_000, 60_000)}),
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_headers_that_ask_for_memory_are_refused_before_anything_is_decoded(name, tmp_path, monkeypatch):
    path = tmp_path / f"x.{name[:3]}"
    path.write_bytes(BOMBS[name])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it is decoded"))
    with pytest.raises(ValueError, match=rf"it has [\d,]+ pixels; at most {MOST_PIXELS:,} are read"):
        read_picture(path)


def test_what_starts_programs_is_no_image(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="no image that can be read"):
        read_picture(tmp_path / "x.jpg")


def rewritten(path, change):
    """The pack at `path` with another index, and header if that is changed, under right checksums."""
    content = path.read_bytes()
    values = list(HEADER.unpack(content[: HEADER.size]))
    index = np.frombuffer(content[values[3] : values[4]], INDEX).copy()
    change(index, values)
    body = content[64 : Pack(path).index["offset"][-1] + Pack(path).index["size"][-1]]
    values[6] = zlib.crc32(index.tobytes())
    header = HEADER.pack(*values)
    notes = content[Pack(path)._notes_at :]
    path.write_bytes(header + struct.pack("<I", zlib.crc32(header)) + body + index.tobytes() + notes)


def put(column, value, row=1):
    def change(index, _):
        index[column][row] = value

    return change


def header(place, value):
    def change(_, values):
        values[place] = value

    return change


WRONG = {
    **{f"{column} {value}": put(column, value) for column in ("offset", "size", "height") for value in (0, 7, 2**32 - 1)},
    "kind 7": put("kind", 7),
    "offset beyond all": put("offset", 2**64 - 1),
    "order": lambda index, _: index.__setitem__(slice(None), index[::-1].copy()),
    "overlap": lambda index, _: index.__setitem__(1, index[0]),
    "a raw image that is wide": put("width", 60_000),
    "a JPEG of 60,000²": lambda index, _: index.__setitem__(2, (*index[2].tolist()[:3], 60_000, 60_000, 0, JPEG)),
    "more images": header(2, 2**32 - 1),
    "fewer images": header(2, 1),
    "an index before the images": header(3, 0),
    "an index beyond the end": header(3, 2**63),
    "notes before the index": header(4, 64),
    "notes beyond the end": header(4, 2**64 - 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_contents_under_right_checksums_are_told(what, tmp_path):
    path = tmp_path / "a.pack"
    images = [Encoded(bytes(12 * width), RAW, 4, width, 0, "a") for width in (4, 5)]
    write_pack(path, [*images, Encoded(jpeg(8), JPEG, 8, 8, 0, "c")])
    assert len(Split([Pack(path)])) == 3
    rewritten(path, WRONG[what])
    with pytest.raises(PackError, match=r"a\.pack: damaged at byte \d+: ") as raised:
        Pack(path)
    assert "\n" not in str(raised.value)


def test_a_jpeg_of_another_size_than_the_index_says_is_not_decoded(tmp_path):
    write_pack(tmp_path / "a.pack", [Encoded(jpeg(60_000), JPEG, 8, 8, 0, "a")])
    with pytest.raises(PackError, match=r"cannot be decoded \(it is 60000×60000; 8×8 was"):
        Split([Pack(tmp_path / "a.pack")]).pixels(0)


def test_an_image_too_long_to_be_scaled_is_refused_from_folders_and_packs(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "data" / split / "a" / "1.png")
    Image.new("RGB", (1, 1_000_000)).save(tmp_path / "data" / "val" / "a" / "2.png")
    prepare(tmp_path / "data", tmp_path / "packs", Settings(raw=True), workers=1)
    flags = [*QUICK[:-2], "--workers", "0", "--image-size", "16", "--batch-size", "1"]
    status, _, err = call(capsys, "train", "--data", tmp_path / "data", "--out", tmp_path / "run", *flags)
    assert (status, "2.png: it is 1000000×1, too long to be scaled to" in err) == (0, True)
    status, _, err = call(capsys, "train", "--data", tmp_path / "packs", "--out", tmp_path / "other", *flags)
    assert (status, "2.png, its 3000000 bytes from there on, it is 1000000×1, too long" in err) == (2, True)
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "9" * 5000, '"x"', "[1]", "null", "-1", "0"])
@pytest.mark.parametrize("name", ["step", "epoch", "loss", "top1"])
def test_curves_are_drawn_past_numbers_that_are_none(tmp_path, capsys, name, value):
    run, row = RunDirectory(tmp_path), {"step": 1, "epoch": 1, "split": "train", "loss": 1.0, "top1": 0.5}
    changed = json.dumps(row | {name: "@"}).replace('"@"', value)
    for others in (f"{json.dumps(row)}\n", ""):
        run.metrics.write_text(f"{others}{changed}\n")
        plot_curves(run.read_metrics(), run.curves, "x")
        assert run.curves.is_file()


@pytest.mark.parametrize("word", ["１０", "1_0", "1e1", ""])
def test_whole_numbers_are_ascii_digits(capsys, word):
    status, _, err = call(capsys, "train", "--epochs", word)
    assert (status, "it must be a whole number" in err) == (2, True)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A folder of packs."""
    path = tmp_path_factory.mktemp("hostile")
    prepare(make_folder(path / "folder", train=8, val=4), path / "packs", Settings(short_side=24, raw=True), workers=1)
    return path / "packs"


def test_a_pack_that_is_cut_while_it_is_open_is_told(packs):
    split = open_packs(packs).train
    for index in range(len(split)):
        split.pixels(index)
    path = packs / "train-00000.pack"
    content = path.read_bytes()
    os.truncate(path, 100)
    try:
        with pytest.raises(PackError, match=r"train-00000\.pack: damaged at byte \d+: it ends there, and had"):
            split.pixels(len(split) - 1)
    finally:
        path.write_bytes(content)


LISTS = ["[]", '{"classes": 3}', "1" * 5000, "[" * 200_000, '{"classes": [], "train": {"images": 1e400, "packs": {"/x": 1}}}']


@pytest.mark.parametrize("text", LISTS, ids=range(len(LISTS)))
def test_a_damaged_list_of_packs_is_told_in_a_line(packs, tmp_path, capsys, text):
    (tmp_path / "packs.json").write_text(text)
    status, _, err = call(capsys, "train", "--data", tmp_path, "--out", tmp_path / "run", *QUICK)
    assert (status, err.count("\n")) == (2, 1)
    assert "packs.json: damaged (" in err


@pytest.mark.slow
def test_names_that_are_no_utf8_work_in_every_command(tmp_path):
    """Of folders, classes, photographs, runs and packs; printed in escapes."""
    folder, here = tmp_path / ANY_NAME / "data", tmp_path / ANY_NAME
    for split in ("train", "val"):
        for name in (ANY_NAME, "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), "red").save(str(folder / split / name / f"{ANY_NAME}.png"))
    assert len(open_folder(folder)[0]) == 2
    commands = [
        ["prepare", "imagenet", folder, here / "packs", "--workers", "1", "--verify"],
        ["train", "--data", here / "packs", "--out", here / "run", *QUICK, "--batch-size", "2"],
        ["evaluate", here / "run", "--data", folder],
        ["inspect", "--checkpoint", here / "run", "--images", folder / "val", "--out", here / "views"],
        ["segment", folder / "val" / ANY_NAME / f"{ANY_NAME}.png", "--checkpoint", here / "run", "--out", here / "maps"],
        ["convert", here / "run" / "model.safetensors", here / f"{ANY_NAME}.pth.tar"],
        ["evaluate", here / f"{ANY_NAME}.pth.tar", "--data", folder, "--device", "cpu", "--workers", "0"],
    ]
    code = f"import sys; from crate_fast.commands.main import main\nfor words in {[[str(w) for w in c] for c in commands]!a}:\n"
    code += "    status = main(words)\n    print(words[0], status, file=sys.stderr)\n"
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run([sys.executable, "-c", code], env=strict, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    told = [line.split() for line in result.stderr.splitlines() if "crate-fast:" not in line]
    assert told == [[command[0], "0"] for command in commands], result.stderr
