"""What `inspect`, `segment` and `explore` show of a CRATE-MAE is what the published encoder computes of whole images."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import call
from helpers.pictures import photographs
from PIL import Image
from test_inspection import assert_measures_are_of, watched_layers
from test_mae import LARGER, SMALL, drawn, far, moved

from crate_fast import CRATEMAE, inspection, load_checkpoint, reference
from crate_fast.checkpoint import save_model
from crate_fast.commands.main import main
from crate_fast.inspection.photos import Normalisation, cut_to_patches, photo_batches, read_photo
from crate_fast.model.positions import resample_positions

NAME = "the encoder of a CRATE-MAE, no patch masked"
KINDS = ["bare", "model", "folder", "run"]
MODEL = SMALL | {"lambd": 5.0, "decoder_depth": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the same weights in files of several kinds, a run, and two photographs."""
    folder = tmp_path_factory.mktemp("mae")
    model = moved(drawn(CRATEMAE, **MODEL))
    torch.save(model.state_dict(), folder / "bare")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "model")
    (folder / "folder").mkdir()
    save_model(model, folder / "folder" / "model.safetensors")
    sizes = ["--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8", "--decoder-depth", "1"]
    words = ["pretrain", *sizes, "--epochs", "1", "--device", "cpu", "--num-threads", "1", "--watch-rates"]
    assert main([*words, "--out", str(folder / "run")]) == 0
    (folder / "photos").mkdir()
    for name, photo in zip(("china", "flower"), photographs().values(), strict=False):
        photo.resize((45, 34)).save(folder / "photos" / f"{name}.png")
    return folder


@pytest.mark.parametrize("options", [SMALL, LARGER], ids=["17", "65"])
def test_measures_and_maps_are_those_of_the_published_encoder_in_float64(published_mae, options):
    theirs = moved(drawn(published_mae, **options)).double().eval()
    images = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    layers = [block.layers[0] for block in theirs.blocks]
    seen = watched_layers(layers, lambda: theirs(images, 0.0))
    for backend in ("torch", "reference"):
        ours = CRATEMAE(**options, backend=backend).double()
        ours.load_state_dict(theirs.state_dict())
        assert_measures_are_of(inspection.measure_layers(ours, images), layers, seen)
        for view, watched, maps in zip(
            inspection.layer_views(ours, images), seen, inspection.attention_maps(ours, images), strict=True
        ):
            assert all(far(a, b) < 1e-12 for a, b in zip(view[1:], watched, strict=True))
            w = watched[0].unflatten(-1, (2, -1)).transpose(1, 2)
            assert far(maps.flatten(-2), reference.attention_probabilities(w)[:, :, 0, 1:]) < 1e-12
    assert ours.training and inspection.patch_projections(ours, images).shape == (2, *maps.shape[-2:], options["embed_dim"])


def test_images_of_other_sizes_take_resampled_positions_and_those_of_none_are_refused(tmp_path):
    ours, images = drawn(CRATEMAE, **SMALL).eval(), torch.randn(1, 3, 24, 20)
    first = next(inspection.layer_views(ours, images))
    x = torch.cat((ours.cls_token, ours.patch_embed(images)), dim=1)
    mssa, _ = ours.blocks[0].layers[0]
    expected = mssa.fn.qkv(mssa.norm(x + resample_positions(ours.decoder_pos_embed, (4, 4), (6, 5))))
    assert torch.equal(first.projection, expected.detach())
    with pytest.raises(ValueError, match="the images are 24×18, which patches of 4×4 do not divide"):
        inspection.attention_maps(ours, images[..., :18])
    with pytest.raises(TypeError, match=r"the images are torch\.float64 and the model torch\.float32"):
        inspection.measure_layers(ours, images.double())
    with pytest.raises(ValueError, match="the images are on meta and the model on cpu"):
        inspection.measure_layers(ours, images.to("meta"))
    save_model(ours, tmp_path / "x.safetensors")
    grown = load_checkpoint(tmp_path / "x.safetensors", image_size=32)
    assert grown.image_size == (32, 32) and not grown.decoder_pos_embed.requires_grad
    assert torch.equal(grown.decoder_pos_embed, resample_positions(ours.decoder_pos_embed, (4, 4), (8, 8)))
    assert grown(torch.randn(2, 3, 32, 32))[0].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_measures_the_encoder_wherever_its_weights_lie(place, tmp_path, capsys, kind):
    said = ["--heads", 2, "--lambd", 5.0] if kind in ("bare", "model") else []
    images = ["digits", "--limit", 20] if kind == "run" else [place / "photos"]
    status, printed, error = call(capsys, "inspect", place / kind, *said, "--images", *images, "--out", tmp_path)
    assert status == 0, error
    (found,) = json.loads((tmp_path / "layers.json").read_text())["checkpoints"]
    assert found["model"] == NAME and f"{kind}, {NAME}: mean over {found['images']} images" in printed
    if kind == "run":
        rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(rows[-1]["rate"]) == len(found["layers"]) == 2  # what --watch-rates saw of them
        return
    model = load_checkpoint(place / "folder")
    normalise = Normalisation(model, place / "folder")
    paths = sorted((place / "photos").iterdir())
    expected = inspection.measure_layers(model, photo_batches(paths, model, normalise, 2)).rows()
    assert found["images"] == 2
    for row, other in zip(found["layers"], expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_segment_and_explore_show_the_encoder(place, tmp_path, capsys, kind):
    photo, said = place / "photos" / "china.png", []
    if kind in ("bare", "model"):
        said = [["--model-heads", 2, "--model-lambd", 5.0], ["--heads", 2, "--lambd", 5.0]]
    segment, explore = said or ([], [])
    words = ["--checkpoint", place / kind, "--out"]
    status, printed, error = call(capsys, "segment", photo, *words, tmp_path / "s", *segment, "--enlarge", 1)
    assert status == 0 and f"layer 2 of 2 of {NAME}" in printed, error
    page = tmp_path / "page.html"
    assert call(capsys, "explore", photo, *words, page, *explore, "--size", 34)[0] == 0
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert f"{kind}, {NAME}: 2 layers, 2 heads" in data["title"]
    model = load_checkpoint(place / ("run" if kind == "run" else "folder"))
    encoder, image = model.encoder(), cut_to_patches(read_photo(photo), model.encoder().patch_size)
    pixels = Normalisation(model, place / kind)(image)
    maps = inspection.attention_maps(model, pixels, [-1])[0, 0]
    mask = inspection.keep_mass(maps[1], 0.6).repeat_interleave(encoder.patch_size[0], 0)
    drawn_mask = np.asarray(Image.open(tmp_path / "s" / "china" / "head-02-mask.png")) == 255
    assert np.array_equal(drawn_mask, mask.repeat_interleave(encoder.patch_size[1], 1).numpy())
    measures = inspection.measure_layers(model, pixels)
    for layer, stored in enumerate(data["photos"][0]["layers"]):
        told = [stored[name] for name in ("before", "after", "nonzero", "rate")]
        assert told == pytest.approx([float(part[layer, 0]) for part in measures], rel=1e-5)


def test_what_tells_no_classes_apart_predicts_none_and_says_what_to_do(place, capsys):
    for words in (["predict", place / "run", place / "photos"], ["evaluate", place / "run"]):
        status, _, error = call(capsys, *words)
        assert status == 2 and error.count("\n") == 1 and "crate-fast train --init fine-tunes a CRATE from its encoder" in error
    for flag in (["--pool", "mean"], ["--ista", 0.2]):
        status, _, error = call(capsys, "inspect", place / "run", *flag, "--images", "digits", "--out", place / "x")
        assert status == 2 and f"it holds a CRATE-MAE, which has no {flag[0][2:]}" in error
    with pytest.raises(TypeError, match=r"the model is a Linear; it must be a crate_fast\.CRATE or CRATEMAE"):
        inspection.attention_maps(torch.nn.Linear(2, 2), torch.zeros(1, 3, 4, 4))


def test_its_weights_are_converted_to_what_reads_them(place, tmp_path, capsys):
    """Under "model" as the codebase of MAE has them, with no word of main.py, which has no such model."""
    status, printed, _ = call(capsys, "convert", place / "folder", tmp_path / "x.pth.tar")
    content = torch.load(tmp_path / "x.pth.tar")
    assert (
        status == 0
        and printed.count("\n") == 1
        and list(content["model"]) == list(load_checkpoint(place / "folder").state_dict())
    )
    status, _, error = call(capsys, "convert", place / "run", tmp_path / "y.pth.tar")
    assert status == 2 and "its model is a CRATE-MAE, which main.py does not have; --layout state_dict" in error
    assert call(capsys, "convert", place / "run", tmp_path / "y.pth.tar", "--layout", "model")[0] == 0
