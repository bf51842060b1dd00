"""Weights from anywhere: the published class's checkpoints, files converted both ways, the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

import crate_fast.checkpoint.hub
from crate_fast import CRATE, CheckpointError, CRATE_small, load_checkpoint
from crate_fast.checkpoint import constructor_arguments, save_checkpoint, save_model
from crate_fast.checkpoint.hub_config import ON_HUB
from crate_fast.checkpoint.published import infer_arguments
from crate_fast.checkpoint.save_load import transform_entry
from crate_fast.eval_transform import Transform
from crate_fast.optional import MissingPackageError

MEDIUM = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 96, "depth": 2, "heads": 3, "dim_head": 64}
SMALL = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "channels": 1}
OTHER = {"pool": "mean", "ista": 0.25, "lambd": 0.3, "dropout": 0.1}

SHAPES = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "arch": "CRATE_tiny", "state_dict": weights, "best_acc1": torch.tensor(1.0)},
    "model": lambda weights: {"model": weights, "acc": 71.0, "epoch": 1},
    "module.": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "state_dict, module.": lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    "compiled": lambda weights: {f"_orig_mod.module.{name}": value for name, value in weights.items()},
}


def equal_weights(model, other):
    one, two = model.state_dict(), other.state_dict()
    return list(one) == list(two) and all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)


def small_model(**options):
    torch.manual_seed(0)
    return CRATE(**SMALL | options).eval()


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("wrap", SHAPES.values(), ids=SHAPES)
def test_published_checkpoints_give_the_published_logits(published_class, wrap, legacy, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    published = published_class(**MEDIUM).eval()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(wrap(published.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    model = load_checkpoint(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published(images), rtol=1e-5, atol=1e-5)
    assert constructor_arguments(model)["heads"] == 3 and not model.training
    taken = "heads=3, dim_head=64, pool='cls', ista=0.1, lambd=0.1"
    words = f"crate-fast: {path}: taken as published, since shapes do not tell it: {taken}\n"
    assert capsys.readouterr() == ("", words)
    monkeypatch.setenv("RANK", "1")  # under torchrun the first process says it
    load_checkpoint(path)
    assert capsys.readouterr() == ("", "")


def test_safetensors_without_our_metadata(tmp_path, capsys):
    model = small_model(dim=64, dim_head=64, heads=2, channels=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path, ista=0.5)
    assert equal_weights(loaded, model) and constructor_arguments(loaded) == constructor_arguments(model) | {"ista": 0.5}
    assert "heads=2, dim_head=64, pool='cls', lambd=0.1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, known",
    [
        ({}, {"heads": 2}),
        ({}, {"dim_head": 8}),
        ({"heads": 1, "dim_head": 16}, {}),
        ({"depth": 0}, {"heads": 2, "dim_head": 8}),
        ({"image_size": (8, 12)}, {"image_size": (8, 12), "heads": 2}),
        ({"image_size": (8, 8), "patch_size": (2, 4)}, {"patch_size": (2, 4), "image_size": 8, "heads": 2}),
        ({"channels": 2}, {"channels": 2, "heads": 2}),
    ],
    ids=str,
)
def test_inferred_arguments(options, known):
    model = small_model(**options)
    found, _ = infer_arguments(model.state_dict(), known)
    assert constructor_arguments(CRATE(**found)) == constructor_arguments(model)


@pytest.mark.parametrize(
    "options, known, words",
    [
        ({}, {}, "say heads"),
        ({"image_size": (8, 12)}, {"heads": 2}, "6 patches make no square image; say image_size"),
        ({"patch_size": (2, 4)}, {"heads": 2}, "8 values, of no square patch with 3 or 1 channels; say patch_size"),
        ({}, {"heads": 4, "dim_head": 3}, "has shape"),
        ({}, {"heads": 2, "patch_size": 3}, "patch"),
        ({"image_size": (8, 12)}, {"heads": 2, "image_size": 16}, "6 patches make no square image; say image_size"),
    ],
    ids=str,
)
def test_what_shapes_leave_open_is_asked_for(options, known, words, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(small_model(**options).state_dict(), path)
    with pytest.raises(CheckpointError, match=words) as info:
        load_checkpoint(path, **known)
    assert str(info.value).startswith(f"{path}: ") and "\n" not in str(info.value)


@pytest.mark.parametrize("layout", ["state_dict", "model", "bare"])
@pytest.mark.parametrize("prefix", [[], ["--prefix", "module."]], ids=["plain", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_both_ways_is_lossless(layout, prefix, dtype, tmp_path, capsys):
    options = {"heads": 2, "dim_head": 64} | ({} if layout == "bare" else OTHER)
    model = small_model(**options).to(dtype)
    save_model(model, tmp_path / "a.safetensors")
    archive = tmp_path / "b.pth.tar"
    assert call(capsys, "convert", tmp_path / "a.safetensors", archive, "--layout", layout, *prefix)[0] == 0
    content = torch.load(archive, weights_only=True)
    weights = content if layout == "bare" else content[layout]
    assert list(weights) == ["".join(prefix[1:]) + name for name in model.state_dict()]
    status, out, _ = call(capsys, "convert", archive, tmp_path / "c.safetensors")
    assert status == 0 and out.startswith(f"{tmp_path / 'c.safetensors'}: ")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_the_published_class_reads_what_we_convert(published_class, tmp_path, capsys):
    model = CRATE(**SMALL).eval()
    save_checkpoint(model, tmp_path / "last.pt", step=7)
    assert call(capsys, "convert", tmp_path / "last.pt", tmp_path / "x.pth")[0] == 0
    published = published_class(**SMALL).eval()
    published.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"])
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published(images), rtol=1e-5, atol=1e-5)


def test_a_run_with_means_is_loaded_as_it_is_evaluated(tmp_path):
    model, mean = small_model(), small_model()
    with torch.no_grad():
        mean.cls_token.add_(1)
    save_checkpoint(model, tmp_path / "last.pt", ema=mean.state_dict())
    assert equal_weights(load_checkpoint(tmp_path / "last.pt"), mean)


WRONG = {
    "{a} {here}/b.txt": "its ending must be",
    "{a} {a}": "is there already",
    "{a} {here}/no/b.pth": "there is no directory",
    "{here}/absent.pth {here}/b.pth": "absent.pth: No such file",
    "{here}/cut.safetensors {here}/b.pth": "cut.safetensors: damaged",
    "{here}/cut.pth {here}/b.pth": "cut.pth: damaged",
    "{here}/hostile.pth {here}/b.pth": "hostile.pth: damaged, or neither .* asks for posix.mkdir",
    "{here}/empty.pth {here}/b.pth": "no weights of a CRATE",
    "{here}/text.pth {here}/b.pth": "text.pth: damaged",
    "{a} {here}/b.pth --layout bare": "bare weights do not tell .*number of heads.*use another --layout",
    "{b} {here}/b.pth --layout bare": "bare weights do not tell pool='mean', ista=0.25, lambd=0.3; use another --layout",
    "{a} {here}/b.pth --layout tar": "--layout",
    "{a} {here}/b.pth --prefix x.": "--prefix",
    "{a} {here}/b.safetensors --layout bare": "--layout and --prefix are of archives",
    "{a} {here}/c.pth --ista nan": "its argument ista is nan",
    "{a} {here}/b.pth --heads 3": "shape",
    "{a}": "TARGET",
    "{here} {here}/b.pth": "no model.safetensors in it",
}


class Hostile:
    """Makes a folder when unpickled by anything that executes."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(line, tmp_path, capsys):
    save_model(small_model(**OTHER), tmp_path / "a.safetensors")
    save_model(small_model(**OTHER, dim_head=64), tmp_path / "b.safetensors")
    torch.save(small_model().state_dict(), tmp_path / "whole.pth")
    for name, whole in (("cut.safetensors", "a.safetensors"), ("cut.pth", "whole.pth")):
        (tmp_path / name).write_bytes((tmp_path / whole).read_bytes()[:5000])
    torch.save({"state_dict": {"pos_embedding": Hostile(tmp_path / "mark")}}, tmp_path / "hostile.pth")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello")
    before = sorted(tmp_path.iterdir())
    status, out, err = call(
        capsys, "convert", *line.format(a=tmp_path / "a.safetensors", b=tmp_path / "b.safetensors", here=tmp_path).split()
    )
    assert (status, out, err.count("\n")) == (2, "", 1) and "Traceback" not in err
    assert re.search(WRONG[line], err), err
    assert sorted(tmp_path.iterdir()) == before  # no mark, no target


def test_pretrained_directory(tmp_path, capsys):
    model = small_model(**OTHER)
    assert model.save_pretrained(tmp_path / "here") is None
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"README.md", "config.json", "model.safetensors"} | {
        "preprocessor_config.json"
    }
    said = json.loads((tmp_path / "here" / "config.json").read_text())
    assert said == constructor_arguments(model) | transform_entry(model) | ON_HUB["CRATE"].entries()
    images = json.loads((tmp_path / "here" / "preprocessor_config.json").read_text())
    assert images["size"] == {"height": 8, "width": 8} and (images["crop_pct"], len(images["image_mean"])) == (0.875, 1)
    card = (tmp_path / "here" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: crate-fast" in card and "license: mit" in card
    assert "| `ista` | `0.25` |" in card and f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    loaded = CRATE.from_pretrained(tmp_path / "here", backend="reference")
    assert equal_weights(loaded, model) and constructor_arguments(loaded) == constructor_arguments(model)
    assert loaded.transformer.backend == "reference" and equal_weights(load_checkpoint(tmp_path / "here"), model)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match="depht"):
        CRATE.from_pretrained(tmp_path / "here", depht=1)
    (tmp_path / "here" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        CRATE.from_pretrained(tmp_path / "here")


@pytest.mark.parametrize("image_size", [16, [16, 16]])
def test_weights_that_another_tool_wrote_are_what_config_json_beside_them_says(tmp_path, image_size, capsys):
    model = small_model(**OTHER | {"image_size": 16}).eval()
    model.transform = Transform(0.5, (0.1,) * model.channels, (0.2,) * model.channels)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": image_size, "architectures": ["CRATE"]}))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what other libraries look for
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # our metadata are gone
    for loaded in (CRATE.from_pretrained(tmp_path), load_checkpoint(tmp_path), load_checkpoint(tmp_path / "model.safetensors")):
        assert constructor_arguments(loaded) == constructor_arguments(model) and loaded.transform == model.transform
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": image_size, "heads": 1, "dim_head": 1}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"heads is .* by its metadata and 1 by config.json beside it"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 10_000, "[]", '"dim depth"', '{"dim": 1, "depth": 1, "model_type": "vit"}'])
def test_a_config_json_of_something_else_does_not_stop_weights_that_say_what_they_are(tmp_path, content, capsys):
    model = small_model(**OTHER)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert constructor_arguments(load_checkpoint(tmp_path)) == constructor_arguments(model)
    said = capsys.readouterr().err
    broken = content in ("{", "[" * 10_000)
    assert said.count("\n") == broken and ("taken: what model.safetensors says of itself" in said) == broken
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # our metadata are gone
    with pytest.raises(CheckpointError, match="cannot be read" if broken else "say heads"):
        load_checkpoint(tmp_path)


def test_config_json_is_that_of_weights_called_as_on_the_hub_and_of_those_that_say_nothing(tmp_path):
    save_model(small_model(**OTHER), tmp_path / "best.safetensors")
    small_model(depth=1).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path / "best.safetensors").transformer.depth == 2  # another model's lies beside it
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "best.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"depth is 2 by its metadata and 1 by config\.json"):
        load_checkpoint(tmp_path)
    small_model(**OTHER).save_pretrained(tmp_path)
    save_file(small_model(**OTHER).state_dict(), tmp_path / "last.safetensors")
    assert constructor_arguments(load_checkpoint(tmp_path / "last.safetensors"))["ista"] == OTHER["ista"]


def split(model, folder):
    """Writes `model` as the Hub's libraries do a large one: in two files, with an index."""
    model.save_pretrained(folder)
    weights = list(model.state_dict().items())
    parts = {f"model-0000{part}-of-00002.safetensors": dict(weights[part - 1 :: 2]) for part in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    places = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


@pytest.mark.parametrize("missing", [EntryNotFoundError, LocalEntryNotFoundError])
def test_weights_in_several_files_are_one_model(tmp_path, monkeypatch, missing):
    model = small_model(**OTHER)
    split(model, tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = load_checkpoint(source)
        assert loaded.state_dict().keys() == model.state_dict().keys() and loaded.pool == "mean"
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())

    def fetch(repo_id, filename, local_files_only=False, **_):
        assert filename == "model.safetensors" or local_files_only == (missing is LocalEntryNotFoundError)  # not asked again
        if not (tmp_path / filename).is_file():
            raise missing("not there")
        return str(tmp_path / filename)

    monkeypatch.setattr(crate_fast.checkpoint.hub, "hf_hub_download", fetch)
    assert torch.equal(load_checkpoint("somebody/crate").cls_token, model.cls_token)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no model of the Hub that can be had"):
        load_checkpoint("somebody/crate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: "{", "no index of weights"),
        (lambda places: json.dumps({"weight_map": []}), "no index of weights"),
        (lambda places: json.dumps({"weight_map": {}}), "it names no file"),
        (lambda places: json.dumps({"weight_map": places | {"cls_token": "../model-00001-of-00002.safetensors"}}), "it names"),
        (lambda places: json.dumps({"weight_map": places | {"cls_token": 7}}), "it names 7"),
        (lambda places: json.dumps({"weight_map": places | {"x": "model-00001-of-00002.safetensors"}}), "it has no 'x'"),
        (lambda places: json.dumps({"weight_map": places | {"cls_token": "model-00003-of-00002.safetensors"}}), "00003"),
        (lambda places: json.dumps({"weight_map": dict(list(places.items())[1:])}), "weights are missing|no weights of"),
    ],
)
def test_an_index_that_is_wrong_is_told(tmp_path, change, message):
    places = split(small_model(**OTHER), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(change(places))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_subclass_is_loaded_as_itself_and_a_changed_head_is_no_value(tmp_path):
    class Mine(CRATE):
        def probabilities(self, images):
            return self(images).softmax(dim=1)

    Mine(**SMALL | OTHER).save_pretrained(tmp_path)
    loaded = Mine.from_pretrained(tmp_path)
    assert type(loaded) is Mine and type(CRATE.from_pretrained(tmp_path)) is CRATE
    loaded.mlp_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="changed after it was built"):
        loaded.save_pretrained(tmp_path / "other")


def test_push_and_load_by_name(tmp_path, monkeypatch):
    """The Hub itself played by a folder: what is uploaded is what is downloaded."""
    from huggingface_hub import HfApi, RepoUrl, hub_mixin

    stored = tmp_path / "stored"

    def upload(self, *, folder_path, repo_id, **_):
        Path(folder_path).rename(stored)
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = small_model(**OTHER)
    assert model.push_to_hub("somebody/crate") == "https://huggingface.co/somebody/crate/commit/1"

    def fetch(repo_id, filename, **_):
        assert repo_id == "somebody/crate"
        return str(stored / filename)

    monkeypatch.setattr(crate_fast.checkpoint.hub, "hf_hub_download", fetch)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    for loaded in (load_checkpoint("somebody/crate"), CRATE.from_pretrained("somebody/crate", revision="main")):
        assert equal_weights(loaded, model)


def test_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^no/body: no such file or directory, and no model of the Hub that can be had"):
        CRATE.from_pretrained("no/body", local_files_only=True, cache_dir=tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"^runs/mine: No such file"):  # the folder is here: no name on the Hub
        load_checkpoint("runs/mine")
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"^no/body: no such file; .*pip install 'crate-fast\[hub\]'$"):
        load_checkpoint("no/body")
    with pytest.raises(MissingPackageError, match="huggingface-hub"):
        small_model().save_pretrained(tmp_path / "x")


@pytest.mark.slow
def test_import_needs_no_optional_package():
    """The Hub, safetensors, Matplotlib and Pillow are imported when asked for."""
    script = "import sys, crate_fast, crate_fast.inspection; print([n for n in sys.modules if n in {'huggingface_hub', 'PIL'}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_crate_small_is_inferred(tmp_path):
    """The published size whose heads are not 64 wide."""
    torch.manual_seed(0)
    model = CRATE_small(num_classes=10).half()
    torch.save(model.state_dict(), tmp_path / "small.pth")
    assert constructor_arguments(load_checkpoint(tmp_path / "small.pth")) == constructor_arguments(model)
