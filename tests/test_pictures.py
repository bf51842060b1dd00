"""Which files of a folder are images, and what each becomes: the same in training, packs, inspection and evaluation."""

import io
import json
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from crate_fast.data import samples
from crate_fast.data.folder import open_folder
from crate_fast.data.open import open_data
from crate_fast.data.pack_encoding import Settings, encode
from crate_fast.data.pictures import find_pictures, read_picture
from crate_fast.inspection.photos import find_photos, read_photo
from crate_fast.processes import ALONE
from crate_fast.settings import ConfigError
from crate_fast.training.resolve import resolve
from crate_fast.training.run_directory import RunDirectory
from crate_fast.training.same_data import check_same_data, warn_of_reader

SIDE = 8
GREY = np.linspace(0, 255, SIDE * SIDE).round().reshape(SIDE, SIDE)  # a ramp from black to white


def rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def clear_palette():
    image = Image.fromarray(GREY.astype(np.uint8)).convert("P")
    image.info["transparency"] = int(image.getpixel((0, 0)))
    return image


def with_alpha(mode):
    image = Image.fromarray(GREY.astype(np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.array([0, 255] * (SIDE // 2), np.uint8), (SIDE, 1))))
    return image


def first_white(grey):
    return np.where(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) == 0, 255, grey)


ON_WHITE = np.where(np.arange(SIDE) % 2 == 0, 255, GREY)
SIXTEEN = (GREY * 257).astype(np.uint16)
KINDS = {
    "L.png": (Image.fromarray(GREY.astype(np.uint8)), GREY),
    "16-bit.png": (Image.fromarray(SIXTEEN), GREY),
    "16-bit.tif": (Image.fromarray(SIXTEEN), GREY),
    "32-bit.tif": (Image.fromarray(SIXTEEN.astype(np.int32)), GREY),
    "32-bit, of 8.tif": (Image.fromarray(GREY.astype(np.int32)), GREY),
    "float.tif": (Image.fromarray((GREY / 255).astype(np.float32)), GREY),
    "palette.png": (Image.fromarray(GREY.astype(np.uint8)).convert("P"), GREY),
    "clear palette.png": (clear_palette(), first_white(GREY)),
    "LA.png": (with_alpha("L"), ON_WHITE),
    "RGBA.png": (with_alpha("RGB"), ON_WHITE),
    "RGBA.webp": (with_alpha("RGB"), ON_WHITE),
    "CMYK.tif": (Image.fromarray(GREY.astype(np.uint8)).convert("CMYK"), GREY),
    "1.png": (Image.fromarray(GREY >= 128), np.where(GREY >= 128, 255, 0)),
}
TAGS = {"width": 256, "bits": 258, "photometric": 262, "samples": 339}  # numbers of entries in the table of a TIFF


def tiff(image, **changes):
    """The bytes of `image` as TIFF, some entries of its table changed by their numbers."""
    file = io.BytesIO()
    image.save(file, "tiff", tiffinfo={TAGS["samples"]: 1})
    content = file.getvalue()
    for name, value in changes.items():
        entries = [struct.pack("<HHI", TAGS[name], kind, 1) for kind in (3, 4)]  # of 16 and of 32 bits
        place = next(content.index(entry) for entry in entries if entry in content) + 8
        content = content[:place] + struct.pack("<H", value) + content[place + 2 :]
    return content


def packed_png(bits):
    """Grey of 2 or 4 bits, of which the value 1 is transparent: (the bytes, how it looks)."""
    values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2**bits
    rows = np.packbits(np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(SIDE, -1), axis=1)
    header = b"IHDR" + struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0)
    parts = [header, b"tRNS\0\1", b"IDAT" + zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND"]
    content = b"".join(struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + content, np.where(values == 1, 255, values * 255 // (2**bits - 1))


def twelve_bits():
    """Grey of 12 bits, packed as TIFF packs it."""
    values = (GREY * 4095 / 255).round().astype(np.uint16)
    rows = np.packbits(
        np.unpackbits(values.astype(">u2").view(np.uint8), axis=1).reshape(SIDE, SIDE, 16)[..., 4:].reshape(SIDE, -1), axis=1
    )
    return tiff(Image.fromarray(rows), width=SIDE, bits=12)


WRITTEN = {
    "16-bit, 0 is white.tif": (tiff(Image.fromarray(65535 - SIXTEEN), photometric=0), GREY),
    "float, 0 is white.tif": (tiff(Image.fromarray((1 - GREY / 255).astype(np.float32)), photometric=0), GREY),
    "8-bit, 0 is white.tif": (tiff(Image.fromarray((255 - GREY).astype(np.uint8)), photometric=0), GREY),
    "16-bit with a sign.tif": (tiff(Image.fromarray(SIXTEEN // 2), samples=2), GREY),
    "12-bit.tif": (twelve_bits(), GREY),
    "2-bit, one clear.png": packed_png(2),
    "4-bit, one clear.png": packed_png(4),
}
"""What Pillow reads, and does not write."""
OPTIONS = {".webp": {"lossless": True, "exact": True}}


def everywhere(path):
    """The pixels of a file as training, packs and the views read it."""
    root = path.parent / "set"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        (root / split / "a" / path.name).write_bytes(path.read_bytes())
    train, val, _ = open_folder(root)
    whole = samples.TestSamples(val, val.read(0).size[::-1], 0.0)[0].pixels
    packed = encode(str(path), path.name, 0, True, Settings(short_side=0, raw=True))
    stored = np.frombuffer(packed.content, np.uint8).reshape(packed.height, packed.width, 3)
    return [np.asarray(train.read(0)), whole, stored, np.asarray(read_photo(path))]


@pytest.mark.parametrize("name", [*KINDS, *WRITTEN])
def test_every_mode_is_read_as_it_looks_by_every_command(name, tmp_path):
    image, expected = (KINDS | WRITTEN)[name]
    path = tmp_path / name
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **OPTIONS.get(path.suffix, {}))
    for pixels in everywhere(path):
        assert np.abs(pixels.astype(int) - rgb(expected)).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_was_held(orientation, suffix, tmp_path):
    """As Pillow's own `exif_transpose` turns them."""
    path, exif = tmp_path / f"x{suffix}", Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(path, exif=exif)
    corner = {1: (0, 0), 2: (0, 2), 3: (1, 2), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (2, 1), 8: (2, 0)}[orientation]
    for seen in everywhere(path):
        assert seen.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
        blocks = seen.reshape(seen.shape[0] // 8, 8, -1, 8, 3).mean(axis=(1, 3, 4))
        assert np.unravel_index(blocks.argmax(), blocks.shape) == corner


@pytest.mark.parametrize(
    "values", [np.full((4, 4), 1.5, np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), 70_000, np.int32)]
)
def test_numbers_without_a_known_white_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="what is white is known of 0 to"):
        read_picture(tmp_path / "x.tif")


def test_an_image_with_damaged_exif_is_read(tmp_path):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffdamaged")
    assert read_picture(tmp_path / "x.jpg").size == (4, 6)


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with the classes cat and dog, an image in each, and all that people's folders have besides."""
    root, picture = tmp_path / "data", Image.new("RGB", (9, 9), "red")
    for split in ("train", "val"):
        for name in ("cat", "dog", ".ipynb_checkpoints"):
            (root / split / name).mkdir(parents=True)
            picture.save(root / split / name / "1.png")
        (root / split / ".DS_Store").write_bytes(b"x")
    cat = root / "train" / "cat"
    (cat / "._1.png").write_bytes(b"x")
    (cat / "notes.txt").write_text("x")
    picture.save(cat / "2.jfif", format="JPEG")
    (tmp_path / "more").mkdir()
    picture.save(tmp_path / "more" / "3.png")
    (cat / "more").symlink_to(tmp_path / "more")
    (cat / "again").symlink_to(cat)
    (cat / "lost.png").symlink_to("/not/mounted/3.png")
    return root


def test_hidden_names_are_ignored_links_followed_and_the_rest_is_counted(folder, capsys):
    train, val, names = open_folder(folder)
    assert names == ["cat", "dog"] and len(val) == 2
    places = [train.place(index).removeprefix(f"{folder}/train/") for index in range(len(train))]
    assert places == ["cat/1.png", "cat/2.jfif", "cat/more/3.png", "dog/1.png"]
    counts = "5 hidden, 1 links to a folder that they lie in, 1 links to nothing, 1 no images by their names"
    assert capsys.readouterr().err == f"crate-fast: {folder}: left out: {counts}\n"
    assert [path.name for path in find_photos(folder / "train" / "cat")] == ["1.png", "2.jfif", "3.png"]
    assert "left out" in capsys.readouterr().out


def test_a_class_that_is_a_link_to_nothing_is_refused(folder):
    (folder / "train" / "emu").symlink_to("/not/mounted/emu")
    with pytest.raises(ConfigError, match="emu is a link to nothing"):
        open_folder(folder)


def test_linked_folders_are_found_under_each_name(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "1.PNG")
    (tmp_path / "b").symlink_to("a")
    assert [place.removeprefix(f"{tmp_path}/") for place in find_pictures(tmp_path, Counter())] == ["a/1.PNG", "b/1.PNG"]


def test_a_run_begun_when_folders_were_counted_otherwise_says_how_to_go_on(folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run, now = RunDirectory(tmp_path / "run"), open_data(resolve({"data": str(folder)}), torch.device("cpu"), ALONE).describe()
    before = {name: value for name, value in now.items() if name != "reader"} | {"train_images": 7}
    run.config.write_text(json.dumps({"data": before}))
    with pytest.raises(ConfigError, match=r"training images is another \(4, not 7\).*--data and a folder of just the images"):
        check_same_data(run, now)
    warn_of_reader(run, now)
    assert "does not go on to the same bits" in capsys.readouterr().err
    run.config.write_text(json.dumps({"data": now | {"train_images": 7}}))
    warn_of_reader(run, now)
    assert not capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"\(4, not 7\)$"):
        check_same_data(run, now)


def test_packs_begun_before_are_not_mixed_with_others(folder, tmp_path, capsys):
    command = ["prepare", "imagenet", folder, tmp_path / "packs", "--workers", "1"]
    assert call(capsys, *command)[0] == 0
    settings = tmp_path / "packs" / "prepare.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in content.items() if name != "reader"}))
    status, _, err = call(capsys, *command)
    assert status == 2 and "was begun before images of 16 bits" in err
    assert open_data(resolve({"data": str(tmp_path / "packs"), "workers": 0}), torch.device("cpu"), ALONE).train_count == 4
