"""Model files and checkpoints: bit for bit what was saved, and a refusal of everything else."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crate_fast import CRATE, files, reference
from crate_fast.checkpoint import constructor_arguments, load_checkpoint, save_checkpoint, save_model
from crate_fast.checkpoint.read import CheckpointError, read_checkpoint

SMALL = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "channels": 1}
VARIANTS = {
    "small": {},
    "mean pool, rates": {"pool": "mean", "ista": 0.25, "lambd": 0.3, "dropout": 0.1, "emb_dropout": 0.2},
    "rectangular, colour": {"image_size": (8, 12), "patch_size": (2, 4), "channels": 3},
    "no projection back": {"heads": 1, "dim_head": 16},
    "no layers": {"depth": 0},
}


def small_model(**options):
    torch.manual_seed(0)
    return CRATE(**SMALL | options)


def equal_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(small_model(), path)
    return path


@pytest.mark.parametrize("save", [save_model, save_checkpoint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_round_trip(options, dtype, save, tmp_path):
    model = small_model(**options).to(dtype).eval()
    save(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    weights, back = model.state_dict(), loaded.state_dict()
    assert list(back) == list(weights) and all(equal_bits(back[key], weights[key]) for key in weights)
    assert constructor_arguments(loaded) == constructor_arguments(model)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    image = torch.randn(2, model.channels, *model.image_size, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    assert os.listdir(tmp_path) == ["model"]


def test_file_has_published_keys_and_arguments(saved):
    assert set(load_file(saved)) == set(reference.CRATE(**SMALL).state_dict())
    with safe_open(saved, framework="pt") as file:
        arguments = json.loads(file.metadata()["crate_fast"])
    assert re.fullmatch("[0-9a-f]{64}", arguments.pop("digest"))
    assert arguments == SMALL | {
        "image_size": [8, 8],
        "patch_size": [4, 4],
        "pool": "cls",
        "dropout": 0.0,
        "emb_dropout": 0.0,
        "ista": 0.1,
        "lambd": 0.1,
    }


def test_equal_models_are_equal_files(saved, tmp_path):
    save_model(small_model(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_overrides(saved):
    loaded = load_checkpoint(saved, backend="reference", ista=0.5)
    assert loaded.transformer.backend == "reference"
    assert constructor_arguments(loaded)["ista"] == 0.5
    with pytest.raises(TypeError, match="depht"):
        load_checkpoint(saved, depht=3)
    with pytest.raises(CheckpointError, match=r"head.*shape|qkv.*shape"):
        load_checkpoint(saved, dim_head=4)


def test_loaded_model_does_not_hang_on_its_file(saved):
    loaded = load_checkpoint(saved)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_checkpoint_keeps_state(tmp_path):
    save_checkpoint(small_model(), tmp_path / "last.pt", step=7, optimizer={"state": {0: torch.ones(3)}})
    content = read_checkpoint(tmp_path / "last.pt")
    assert content["step"] == 7
    assert torch.equal(content["optimizer"]["state"][0], torch.ones(3))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.asarray, torch.tensor])
@pytest.mark.parametrize("save", [save_model, save_checkpoint])
def test_numbers_of_other_libraries_are_saved_as_numbers(kind, save, tmp_path):
    models = small_model(ista=kind(0.25), lambd=kind(0.5), dropout=kind(0.125)), small_model()
    for layer in models[1].transformer.layers:
        layer[1].fn.step_size = kind(0.25)
    for model in models:
        save(model, tmp_path / "model")
        assert load_checkpoint(tmp_path / "model").transformer.layers[0][1].fn.step_size == 0.25


@pytest.mark.parametrize("value", [np.float64(1), [{"a": (np.float32(1),)}], {"best": np.zeros(2)}], ids=str)
def test_what_could_not_be_read_again_is_not_written(value, saved):
    before = os.listdir(saved.parent)
    with pytest.raises(
        TypeError, match=r"score holds a (float64|float32|ndarray); a checkpoint holds tensors and Python's own"
    ):
        save_checkpoint(small_model(), saved.parent / "x.pt", score=value)
    assert os.listdir(saved.parent) == before


def test_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(small_model(ista=0.9), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def change_one_layer(model):
    model.transformer.layers[1][1].fn.step_size = 0.7


def widen_head(model):
    model.mlp_head[1] = torch.nn.Linear(16, 3, bias=False)


def ista(model):
    return model.transformer.layers[0][1]


class Doubled(CRATE):
    def forward(self, image):
        return 2 * super().forward(image)


CHANGES = {
    "layers differ": change_one_layer,
    "mlp_head.1.bias": widen_head,
    "has eps 0.5": lambda model: setattr(model.mlp_head[0], "eps", 0.5),
    "has scale 0.9": lambda model: [setattr(layer[0].fn, "scale", 0.9) for layer in model.transformer.layers],
    "has dim 1": lambda model: setattr(model.transformer.layers[0][0].fn.attend, "dim", 1),
    "module 'mlp_head.2' is new": lambda model: model.mlp_head.append(torch.nn.ReLU()),
    "'to_latent' is a ReLU": lambda model: setattr(model, "to_latent", torch.nn.ReLU()),
    "norm' has another forward": lambda model: setattr(ista(model).norm, "forward", lambda x: x),
    "a Sequential is no step of CRATE": lambda model: setattr(ista(model), "fn", torch.nn.Sequential(ista(model).fn)),
    "not subscriptable": lambda model: setattr(model, "mlp_head", torch.nn.Identity()),
    "Doubled has a forward of its own": lambda model: setattr(model, "__class__", Doubled),
}
"""Changes of a model that its weights do not show, and some that they do, by what is said of them."""


@pytest.mark.parametrize("save", [save_model, save_checkpoint])
@pytest.mark.parametrize("words", CHANGES)
def test_save_refuses_what_the_constructor_cannot_build(words, save, tmp_path):
    model = small_model()
    CHANGES[words](model)
    with pytest.raises(ValueError, match=words):
        save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("save", [save_model, save_checkpoint])
def test_shared_layers_and_views_of_one_buffer_are_saved(save, tmp_path):
    model = small_model()
    model.transformer.layers[1] = model.transformer.layers[0]
    ista(model).fn.weight.data = torch.randn(32, 48)[8:24, 3:35:2].t()
    save(model, tmp_path / "model")
    loaded, own = load_checkpoint(tmp_path / "model").state_dict(), model.state_dict()
    assert set(loaded) == set(own) and all(equal_bits(loaded[name].contiguous(), own[name].contiguous()) for name in own)


def test_save_refuses_other_classes(tmp_path):
    with pytest.raises(TypeError, match="Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")


def refused(path, words=None):
    """The message of the refusal: one line that names the file."""
    with pytest.raises(CheckpointError, match=words) as info:
        load_checkpoint(path)
    assert str(info.value).startswith(f"{path}: ") and "\n" not in str(info.value)
    return str(info.value)


def test_missing_file_and_directory(tmp_path):
    refused(tmp_path / "nothing", "No such file")
    refused(tmp_path, "directory")


@pytest.mark.parametrize("save", [save_model, save_checkpoint])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated(save, part, tmp_path):
    path = tmp_path / "model"
    save(small_model(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    refused(path)


@pytest.mark.parametrize("content", [b"hello\n", b"\xff" * 4096, b"PK\x03\x04" + b"\0" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_garbage(content, tmp_path):
    (tmp_path / "model").write_bytes(content)
    refused(tmp_path / "model")


def rewrite(path, *, metadata=None, arguments=None, weights=None):
    """Writes the model file again with other `metadata`, or with `arguments` or `weights` changed, and no digest."""
    with safe_open(path, framework="pt") as file:
        kept = json.loads(file.metadata()["crate_fast"])
    del kept["digest"]
    changed = load_file(path) | (weights or {})
    metadata = {"crate_fast": json.dumps(kept | (arguments or {}))} if metadata is None else metadata
    save_file({key: value for key, value in changed.items() if value is not None}, path, metadata)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"metadata": {"format": "pt"}}, "number of heads open .16 values in all heads.; say heads"),
        ({"metadata": {"crate_fast": "{"}}, "not JSON"),
        ({"metadata": {"crate_fast": "[1]"}}, "arguments of CRATE"),
        ({"arguments": {"backend": "triton"}}, "arguments of CRATE"),
        ({"arguments": {"depth": 10**9}}, "2 layers"),
        ({"arguments": {"depth": "2"}}, "2 layers"),
        ({"arguments": {"dim": "16"}}, "no CRATE"),
        ({"arguments": {"dim": 10**30}}, "no CRATE"),
        ({"arguments": {"image_size": None}}, "no CRATE"),
        ({"arguments": {"image_size": [8]}}, "no CRATE"),
        ({"arguments": {"patch_size": 3}}, "not divisible"),
        ({"arguments": {"pool": "max"}}, "pool"),
        ({"arguments": {"dim": 32}}, "shape"),
        ({"arguments": {"heads": 4}}, "shape"),
        ({"arguments": {"ista": "much"}}, "ista"),
        ({"weights": {"cls_token": None}}, r"1 weights are missing, 'cls_token'"),
        ({"weights": {"cls_tokens": torch.zeros(1)}}, r"1 weights do not belong to the model, 'cls_tokens'"),
        ({"weights": {"cls_token": torch.zeros(1, 1, 17)}}, r"'cls_token' has shape \(1, 1, 17\)"),
        ({"weights": {"cls_token": torch.zeros(1, 1, 16, dtype=torch.int64)}}, "real floating point"),
    ],
    ids=str,
)
def test_foreign_and_inconsistent(saved, changes, words):
    load_checkpoint(saved)
    rewrite(saved, **changes)
    refused(saved, words)


class Hostile:
    """Leaves a mark when it is unpickled by anything that executes."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def as_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


def as_legacy_torch(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, as_legacy_torch, as_pickle])
def test_hostile_pickle_is_not_executed(write, tmp_path):
    path, mark = tmp_path / "model", tmp_path / "mark"
    write({"arguments": {}, "model": {"cls_token": Hostile(mark)}}, path)
    refused(path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not mark.exists()
    as_pickle(Hostile(mark), path)
    pickle.loads(path.read_bytes()).close()
    assert mark.exists()  # the trap itself works


@pytest.mark.parametrize("content", [torch.zeros(3), [1], {"model": {}}, {"arguments": 1, "model": {}}], ids=str)
def test_foreign_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "last.pt")
    refused(tmp_path / "last.pt", "no weights of a CRATE")
    with pytest.raises(CheckpointError, match="no checkpoint of crate-fast"):
        read_checkpoint(tmp_path / "last.pt")


def test_plain_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
        archive.writestr("data.pkl", b"nothing")
    refused(tmp_path / "last.pt", "damaged")
