"""`crate-fast inspect` and `crate-fast segment`: on photographs that scikit-learn carries, and what they refuse."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from sklearn.datasets import load_sample_images
from test_inspection import assert_measures_are_right, watched

from crate_fast import CRATE, inspection, load_checkpoint, reference
from crate_fast.checkpoint import save_model
from crate_fast.commands.main import main
from crate_fast.data.digits import Digits
from crate_fast.eval_transform import LUMA
from crate_fast.inspection import figures, photos

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 3, "heads": 3, "dim_head": 16}
RUN = [
    *("--epochs", "1", "--dim", "32", "--depth", "2", "--heads", "2", "--dim-head", "16"),
    *("--device", "cpu", "--num-threads", "1"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model for colour, and photographs; one of them is not as wide as patches are."""
    folder = tmp_path_factory.mktemp("views")
    torch.manual_seed(0)
    save_model(CRATE(**SMALL), folder / "colour.safetensors")
    save_model(CRATE(**SMALL | {"channels": 2}), folder / "two.safetensors")
    save_model(CRATE(**SMALL | {"depth": 0}), folder / "flat.safetensors")
    (folder / "photos" / "in").mkdir(parents=True)
    (folder / "empty").mkdir()
    china, flower = load_sample_images().images
    Image.fromarray(china).resize((90, 60)).save(folder / "photos" / "china.JPG")
    Image.fromarray(flower).resize((64, 48)).save(folder / "photos" / "in" / "flower.png")
    (folder / "broken.png").write_bytes((folder / "photos" / "in" / "flower.png").read_bytes()[:900])
    (folder / "text.jpg").write_text("hello")
    Image.fromarray(flower).resize((5, 50)).save(folder / "narrow.png")
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A miniature run on the digits."""
    torch.set_num_threads(2)
    assert main(["train", *RUN, "--out", str(place / "run")]) == 0
    return place / "run"


def test_inspect_takes_the_batch_that_the_published_hook_takes(place, tmp_path, capsys):
    torch.manual_seed(0)
    batch, model = torch.randn(6, 3, 32, 32), load_checkpoint(place / "colour.safetensors")
    for name, content in (("hook.pt", {"imgs": batch, "labels": [1]}), ("bare.pt", batch.half())):
        torch.save(content, tmp_path / name)
        flags = ["--images", tmp_path / name, "--limit", 5, "--batch-size", 2, "--pdf", "--out", tmp_path / "out"]
        assert call(capsys, "inspect", place / "colour.safetensors", *flags)[::2] == (0, "")
        rows = json.loads((tmp_path / "out" / "layers.json").read_text())["checkpoints"][0]["layers"]
        images = batch[:5] if name == "hook.pt" else batch.half().float()[:5]
        measures = inspection.measure_layers(model, images)
        for row, values, rates in zip(rows, measures.nonzero, measures.rate, strict=True):
            assert row["nonzero_std"] == pytest.approx(np.std(values.numpy()))  # published: NumPy's, of a population
            assert row["rate_std"] == pytest.approx(rates.std().item())  # published: PyTorch's, of a sample
        assert all((tmp_path / "out" / f"{name}.pdf").read_bytes()[:5] == b"%PDF-" for name in ("coding-rate", "sparsity"))
    for content in ({"images": batch}, batch[0], batch.long(), batch * torch.nan, batch[:0], [1]):
        torch.save(content, tmp_path / "wrong.pt")
        status, _, error = call(capsys, "inspect", place / "colour.safetensors", "--images", tmp_path / "wrong.pt", *flags[2:])
        assert (status, error.count("\n"), "wrong.pt" in error) == (2, 1, True), error


def test_inspect_takes_a_folder_whatever_its_name_and_says_what_is_missing(place, tmp_path, capsys):
    folder = shutil.copytree(place / "photos", tmp_path / "photos.pt")
    line = ("inspect", place / "colour.safetensors", "--out", tmp_path / "out", "--images")
    assert call(capsys, *line, folder)[::2] == (0, "")
    for name, words in (
        ("no.pt", "No such file or directory"),
        ("no", "no such directory"),
        ("photos.pt/china.JPG", "a file, no"),
    ):
        status, _, error = call(capsys, *line, tmp_path / name)
        assert status == 2 and error.startswith(f"crate-fast: error: {tmp_path / name}: {words}"), error


def test_components_are_drawn_of_the_layer_facet_and_foreground_asked_for(place, tmp_path, capsys):
    common = ["segment", place / "photos" / "china.JPG", "--checkpoint", place / "colour.safetensors"]
    pictures, one = set(), ["--heads", 1]
    foreground = [["--foreground", "attention"], [*one, "--foreground", "above"]]
    for number, flags in enumerate((one, [*one, "--pca-layer", 1, "--facet", "tokens"], *foreground)):
        out = tmp_path / str(number)
        assert call(capsys, *common, "--components", 4, *flags, "--enlarge", 1, "--out", out)[0] == 0
        assert {f"component-{n}.png" for n in (1, 2, 3, 4)} <= {path.name for path in (out / "china").iterdir()}
        pictures.add((out / "pca-china.png").read_bytes())
    assert len(pictures) == 4
    black = (np.asarray(Image.open(tmp_path / "2" / "pca-china.png")) == 0).all(-1)
    assert np.array_equal(black, np.asarray(Image.open(tmp_path / "2" / "china" / "mean-mask.png")) == 0)
    assert "--pca-layer is 9" in call(capsys, *common, "--pca-layer", 9, "--out", tmp_path / "x")[2]


def test_what_weights_leave_open_can_be_said_to_every_command(place, tmp_path, capsys):
    model = load_checkpoint(place / "colour.safetensors")
    torch.save(model.state_dict(), tmp_path / "bare.pth")  # of 48 values in all heads: 3 heads of 16, or 2 of 24
    photo, bare = place / "photos" / "china.JPG", tmp_path / "bare.pth"
    (tmp_path / "set" / "val").mkdir(parents=True)
    for split, name in ((split, name) for split in ("train", "val") for name in "abcde"):
        (tmp_path / "set" / split / name).mkdir(parents=True)
        Image.open(photo).save(tmp_path / "set" / split / name / "1.png")
    for words, prefix in (
        (["evaluate", bare, "--data", tmp_path / "set", "--device", "cpu"], "--"),
        (["train", "--evaluate", "--init", bare, "--data", tmp_path / "set", "--device", "cpu"], "--"),
        (["predict", bare, photo, "--device", "cpu"], "--"),
        (["inspect", bare, "--images", place / "photos", "--out", tmp_path / "i"], "--"),
        (["segment", photo, "--checkpoint", bare, "--out", tmp_path / "s"], "--model-"),
        (["explore", photo, "--checkpoint", bare, "--out", tmp_path / "e.html"], "--"),
        (["convert", bare, tmp_path / "c.safetensors"], "--"),
    ):
        assert "say heads" in call(capsys, *words)[2], words
        said = [f"{prefix}heads", 2, f"{prefix}pool", "mean", f"{prefix}ista", 0.2, f"{prefix}lambd", 0.3]
        status, _, error = call(capsys, *words, *said)
        assert (status, "taken as published" in error) == (0, False), (words, error)
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert (loaded.transformer.heads, loaded.pool) == (2, "mean")


def test_inspect_on_photographs(place, run, capsys):
    out = place / "inspected"
    paths = [place / "colour.safetensors", run, run / "checkpoints" / "last.pt"]
    status, printed, err = call(capsys, "inspect", "--checkpoint", *paths, "--images", place / "photos", "--out", out)
    assert (status, err) == (0, "")
    assert {path.name for path in out.iterdir()} == {"layers.json", "layers.csv", "coding-rate.png", "sparsity.png"}
    content = json.loads((out / "layers.json").read_text())
    assert [one["label"] for one in content["checkpoints"]] == ["colour.safetensors", "run", "last.pt"]
    assert [one["images"] for one in content["checkpoints"]] == [2, 2, 2]
    assert content["checkpoints"][1]["layers"] == content["checkpoints"][2]["layers"]
    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["checkpoint"], row["layer"]) for row in rows[:4]] == [
        *(("colour.safetensors", str(layer)) for layer in (1, 2, 3)),
        ("run", "1"),
    ]
    written = [float(row["nonzero_mean"]) for row in rows]
    assert written == [row["nonzero_mean"] for one in content["checkpoints"] for row in one["layers"]]
    assert "colour.safetensors: 2 images, normalised by ImageNet's mean" in printed and "by its run's mean" in printed
    for name in ("coding-rate.png", "sparsity.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 600 and len(picture.convert("RGB").getcolors(10**6)) > 10


def test_inspect_measures_what_the_function_measures(place, run, capsys):
    status, _, _ = call(
        capsys, "inspect", "--checkpoint", run, "--images", "digits", "--limit", "40", "--out", place / "digits"
    )
    model = load_checkpoint(run)
    digits = Digits(model.image_size, torch.device("cpu"))
    images = (digits.test_images[:40] - digits.mean) / digits.std
    expected = inspection.measure_layers(model, images).rows()
    (found,) = json.loads((place / "digits" / "layers.json").read_text())["checkpoints"]
    assert status == 0 and found["images"] == 40
    for row, other in zip(found["layers"], expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_measures_of_the_digits_model(run):
    """Against float64 matrices of all tokens, as published, and the reference's matrix of attention."""
    model = load_checkpoint(run)
    digits = Digits(model.image_size, torch.device("cpu"))
    images = (digits.test_images[:8] - digits.mean) / digits.std
    assert_measures_are_right(model, model, images)
    w = watched(model, images)[-1][0].unflatten(-1, (2, -1)).transpose(1, 2)
    rows = reference.attention_probabilities(w)[:, :, 0, 1:]
    torch.testing.assert_close(inspection.attention_maps(model, images, [-1])[0].flatten(-2), rows, rtol=0, atol=1e-6)


def test_segment_on_photographs(place, run, capsys):
    out = place / "segmented"
    images = [place / "photos" / "china.JPG", place / "photos" / "in" / "flower.png", place / "photos" / "china.JPG"]
    status, printed, err = call(
        capsys, "segment", *images, "--checkpoint", place / "colour.safetensors", "--enlarge", 1, "--out", out
    )
    assert (status, err) == (0, "")
    assert f"{images[0]}: 60×90; 56×88 of it seen, in patches of 8×8\n" in printed
    assert f"{images[1]}: 48×64; 48×64 of it seen" in printed
    assert {path.name for path in out.iterdir()} == {
        *("china", "china-2", "flower", "pca-china.png", "pca-china-2.png", "pca-flower.png"),
    }
    kinds = {f"{one}-{kind}.png" for one in ("mean", "head-01", "head-02", "head-03") for kind in ("map", "overlay", "mask")}
    assert {path.name for path in (out / "flower").iterdir()} == kinds | {"image.png", "heads.png"}
    sizes = {Image.open(out / "china" / name).size for name in kinds | {"image.png"}} | {Image.open(out / "pca-china.png").size}
    assert sizes == {(88, 56)}
    assert np.array_equal(Image.open(out / "pca-china.png"), Image.open(out / "pca-china-2.png"))
    assert np.array_equal(Image.open(out / "flower" / "image.png"), Image.open(images[1]))
    # The mask is that of the function.
    model = load_checkpoint(place / "colour.safetensors")
    normalise = photos.Normalisation(model, place / "colour.safetensors")
    maps = inspection.attention_maps(model, normalise(photos.read_photo(images[1])), [-1])[0, 0]
    mask = figures.enlarged(inspection.keep_mass(maps[1], 0.6), (8, 8))
    assert np.array_equal(np.asarray(Image.open(out / "flower" / "head-02-mask.png")) == 255, mask.numpy())


def test_means_that_cannot_be_read_just_now_are_not_taken_from_elsewhere(run, monkeypatch):
    model = load_checkpoint(run)
    model.transform = None  # of a file of before: its run says how images are normalised
    assert photos.Normalisation(model, run).origin == "its run's"
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        photos.Normalisation(model, run)


def test_segment_flags(place, run, capsys):
    given = ["--layer", "1", "--heads", "2,1", "--mass", "0.3", "--size", "20"]
    image = place / "photos" / "china.JPG"
    status, printed, _ = call(capsys, "segment", image, "--checkpoint", run, *given, "--out", place / "few")
    assert status == 0 and "layer 1 of 2" in printed and "its shorter side scaled to 20; 20×28 of it seen" in printed
    names = {path.name for path in (place / "few" / "china").iterdir()}
    assert {name.partition("-m")[0] for name in names if name.endswith("-mask.png")} == {"head-01", "head-02", "mean"}
    with Image.open(place / "few" / "china" / "mean-mask.png") as mask:
        assert mask.size == (23 * 28, 23 * 20) and 0 < np.asarray(mask).mean() / 255 <= 0.3 + 1 / 35


def test_segment_writes_in_its_folder_alone_whatever_photographs_are_called(place, run, tmp_path):
    names = ["..png", "...png", "....png", ".a.png", "b.png", "b.jpg"]
    for name in names:
        with Image.open(place / "photos" / "china.JPG") as photo:
            photo.resize((16, 16)).save(tmp_path / name, "png")
    assert (
        main(["segment", *(str(tmp_path / name) for name in names), "--checkpoint", str(run), "--out", str(tmp_path / "o")])
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "o"])
    assert sum(path.is_dir() for path in (tmp_path / "o").iterdir()) == len(names)
    assert not (tmp_path / "o" / "image.png").exists()


WRONG = {
    "inspect --checkpoint {p}/colour.safetensors --images {p}/absent --out {p}/x": "{p}/absent: no such directory",
    "inspect --checkpoint {p}/colour.safetensors --images {p}/empty --out {p}/x": "{p}/empty: no images in it",
    "inspect --checkpoint {p}/colour.safetensors --images digits --out {p}/x": "colour.safetensors: the model takes 3 channels",
    "inspect --checkpoint {p}/two.safetensors --images {p}/photos --out {p}/x": "takes 2 channels",
    "inspect --checkpoint {p}/flat.safetensors --images {p}/photos --out {p}/x": "no layers",
    "inspect --checkpoint {p}/photos --images {p}/photos --out {p}/x": "{p}/photos: a directory with no model.safetensors",
    "inspect --checkpoint {p}/text.jpg --images {p}/photos --out {p}/x": "{p}/text.jpg: damaged",
    "inspect --checkpoint {p}/colour.safetensors --images {p}/photos --out {p}/text.jpg": "--out is {p}/text.jpg",
    "inspect --checkpoint {p}/colour.safetensors --images {p} --out {p}/x": "{p}/broken.png: cannot be read",
    "inspect --checkpoint {p}/colour.safetensors --images {p}/photos --out {p}/x --limit 0": "--limit",
    "inspect --checkpoint {p}/colour.safetensors --images {p}/photos --out {p}/x --device nowhere": "nowhere",
    "inspect --checkpoint {p}/colour.safetensors --images {p}/photos": "--out",
    "segment {p}/text.jpg --checkpoint {p}/colour.safetensors --out {p}/x": "{p}/text.jpg: cannot be read as an image",
    "segment {p}/absent.jpg --checkpoint {p}/colour.safetensors --out {p}/x": "{p}/absent.jpg: .*No such file",
    "segment {p} --checkpoint {p}/colour.safetensors --out {p}/x": "{p}: .*directory",
    "segment {i} {p}/broken.png --checkpoint {p}/colour.safetensors --out {p}/x": "{p}/broken.png: cannot be read",
    "segment {p}/narrow.png --checkpoint {p}/colour.safetensors --out {p}/x": "{p}/narrow.png: the image is 50×5, smaller",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --layer 4": "--layer is 4; the model has layers 1 to 3",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --layer 0": "--layer",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --heads 1,4": "--heads names 4; the model has heads 1 to 3",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --heads 1,,2": "--heads",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --heads 1,1": "twice",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --mass 0": "--mass.*above 0 and at most 1",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --mass nan": "--mass",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --mass much": "--mass",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --size 7": "smaller than a patch",
    "segment {i} --checkpoint {p}/colour.safetensors --out {p}/x --size 99999999999": "china.JPG: ",
    "segment {i} --checkpoint {p}/two.safetensors --out {p}/x": "takes 2 channels",
    "segment {i} --checkpoint {p}/flat.safetensors --out {p}/x": "no layers",
    "segment --checkpoint {p}/colour.safetensors --out {p}/x": "IMAGE",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(place, capsys, line):
    names = {"p": place, "i": place / "photos" / "china.JPG"}
    status, _, err = call(capsys, *line.format(**names).split())
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(WRONG[line].format(p=re.escape(str(place))), err), err
    assert not (place / "x").exists()


def ramp(mode):
    """An 8×8 image in `mode` whose upper left quarter is white."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:4, :4] = 255
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "clear":  # black everywhere, and three quarters of it opaque
        black = np.zeros((8, 8, 4), np.uint8)
        black[..., 3] = 255 - grey
        return Image.fromarray(black)
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "P", "1", "LA", "RGBA", "I;16", "clear", "YCbCr"])
def test_photographs_of_every_mode(mode, tmp_path):
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    ramp(mode).save(path, **{"quality": 100} if path.suffix == ".jpg" else {})
    pixels = np.asarray(photos.read_photo(path)).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[:4, :4] > 245).all() and (pixels[4:, 4:] < 10).all()


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # held upright
    image.save(tmp_path / "x.jpg", exif=exif)
    assert photos.read_photo(tmp_path / "x.jpg").size == (4, 6)


def test_normalisation_of_grey(tmp_path):
    model = CRATE(**SMALL | {"channels": 1})
    normalise = photos.Normalisation(model, tmp_path / "x.safetensors")
    white = normalise(Image.new("RGB", (3, 2), "white"))
    assert white.shape == (1, 1, 2, 3)
    mean, std = (
        sum(w * v for w, v in zip(LUMA, three, strict=True)) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(white, torch.full_like(white, (1 - mean) / std))
