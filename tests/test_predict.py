"""`crate-fast predict` and `crate_fast.load`: what a model takes photographs for, whatever kind of file it is from."""

import csv
import io
import json
import os
import shutil

import pytest
import torch
from conftest import call
from PIL import Image
from sklearn.datasets import load_sample_images

from crate_fast import CRATE, CheckpointError, load, load_checkpoint
from crate_fast.checkpoint import save_checkpoint, save_model
from crate_fast.eval_transform import Transform

NAMES = ("china", "flower", "grün", "odd\n\x1b[31mred")
ODD = os.fsdecode(b"no-utf8-\xff")


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 4, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
    model = CRATE(**sizes | changes).eval()
    model.transform = Transform(0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), NAMES)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of photographs in train/ and val/, a folder a class, and a model of these classes in it."""
    folder = tmp_path_factory.mktemp("predict")
    images = load_sample_images().images
    for split in ("train", "val"):
        for label, name in enumerate(NAMES):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(3):
                image = Image.fromarray(images[(label + number) % 2][40 * number : 200 + 30 * label, 90 * number :])
                image.resize((90, 60 + 10 * number)).save(folder / "data" / split / name / f"{number}.png")
    save_model(make_model(), folder / "model.safetensors")
    return folder


def predicted(capsys, *words):
    """What `crate-fast predict` prints as JSON."""
    status, out, err = call(capsys, "predict", *words, "--format", "json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("crop", [None, 0.5, 0])
def test_it_sees_what_evaluation_sees(place, capsys, crop):
    flags = [] if crop is None else ["--eval-crop", crop]
    rows = predicted(capsys, place, place / "data" / "val", *flags)
    first = [row["predictions"][0] for row in rows]
    assert all(guess["name"] == NAMES[guess["class"]] for guess in first)
    right = sum(guess["name"] == row["photo"].split(os.sep)[-2] for guess, row in zip(first, rows, strict=True))
    _, out, _ = call(capsys, "evaluate", place / "model.safetensors", "--data", place / "data", "--workers", 0, *flags)
    assert len(rows) == 12
    assert f"({right} of 12)" in out
    assert all(abs(sum(guess["probability"] for guess in row["predictions"]) - 1) < 1e-6 for row in rows)


def test_text_json_and_csv_tell_the_same(place, capsys):
    photos = [place / "data" / "val" / "china", place / "data" / "val" / "flower" / "1.png"]
    rows = predicted(capsys, place, *photos, "--top", 2)
    _, out, err = call(capsys, "predict", place, *photos, "--format", "csv", "--top", 2)
    table = list(csv.DictReader(io.StringIO(out)))
    assert err == ""
    told = [(r["photo"], g["class"], g["name"], g["probability"]) for r in rows for g in r["predictions"]]
    assert [(r["photo"], int(r["class"]), r["name"], float(r["probability"])) for r in table] == told
    _, out, err = call(capsys, "predict", place, *photos, "--top", 2)
    assert [line.partition(": ")[0] for line in out.splitlines()] == [row["photo"] for row in rows]
    assert "\x1b" not in out
    assert err == ""


def test_names_come_along_in_every_kind_of_file(place, capsys):
    save_checkpoint(make_model(), place / "checkpoint.pt")
    assert call(capsys, "convert", place / "model.safetensors", place / "published.pth.tar")[0] == 0
    photo = place / "data" / "val" / "grün" / "2.png"
    first = predicted(capsys, place, photo)
    for name in ("checkpoint.pt", "published.pth.tar"):
        assert load_checkpoint(place / name).transform == make_model().transform
        assert predicted(capsys, place / name, photo) == first


def test_load_gives_model_transform_and_names(place):
    model, transform, names = load(place)
    photo = place / "data" / "val" / "flower" / "0.png"
    assert names == NAMES
    assert transform(photo).shape == (3, 32, 32)
    with Image.open(photo) as image:
        assert torch.equal(transform(image), transform(str(photo)))
    assert model(transform(photo)[None]).shape == (1, 4)


def test_where_nothing_names_the_classes_they_are_numbered_or_imagenets(place, capsys):
    model = make_model()
    model.transform = None
    save_model(model, place / "nameless.safetensors")
    assert load(place / "nameless.safetensors").names == ("class 0", "class 1", "class 2", "class 3")
    model = make_model(num_classes=1000)
    torch.save({"state_dict": model.state_dict()}, place / "imagenet.pth.tar")
    loaded = load(place / "imagenet.pth.tar", heads=2)
    assert (loaded.names[0], loaded.names[999], loaded.transform.crop) == ("tench", "toilet tissue", 0.875)
    assert "taken as ImageNet's, since it has 1000 classes" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("a", "b"), "abcd", ("a", "b", "c", 4), (), {"a": 1}])
def test_names_that_are_none_are_refused_in_a_line(place, names):
    model = make_model()
    model.transform = model.transform._replace(names=names)
    save_model(model, place / "false.safetensors")
    with pytest.raises(CheckpointError, match=r"false\.safetensors: .*names") as caught:
        load(place / "false.safetensors")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_told_and_the_rest_is_answered(place, capsys):
    (place / "photos").mkdir()
    shutil.copy(place / "data" / "val" / "china" / "0.png", place / "photos" / f"{ODD}.png")
    (place / "photos" / "text.jpg").write_text("hello")
    status, out, err = call(capsys, "predict", place, place / "photos")
    assert status == 2
    assert out.count("\n") == 1
    assert "1 of 2 photographs cannot be read" in err
    assert call(capsys, "predict", place, place / "nowhere")[::2] == (
        2,
        f"crate-fast: error: {place / 'nowhere'}: no such file or folder\n",
    )


def test_a_run_that_has_not_ended_is_its_newest_checkpoint(place, capsys):
    folder = place / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (
        "step-00000009.pt",
        "step-00000010.pt",
        "step-100000000.pt",
        ".step-00000011.pt.tmp",
        "step-00000012.damaged-1",
    ):
        save_checkpoint(make_model(), folder / name)
    photo = place / "data" / "val" / "grün" / "2.png"
    status, out, err = call(capsys, "predict", place / "run", photo)
    assert (status, out) == (0, call(capsys, "predict", place, photo)[1])
    assert err == f"crate-fast: {place / 'run'}: the run has not ended; taken: {folder / 'step-100000000.pt'}\n"
