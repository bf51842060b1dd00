"""Checkpoints as people have them: the weights are found wherever they lie, or it is said why not, and nothing is called."""

import argparse
import os
import pathlib
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from conftest import call
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from crate_fast import CRATE, CheckpointError, as_linears, inspection, load_checkpoint, reference
from crate_fast.checkpoint import constructor_arguments, save_model
from crate_fast.checkpoint.read import read_model
from crate_fast.checkpoint.start_from import read_weights, start_from

SMALL = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
DEMO = {"image_size": 16, "patch_size": 8, "num_classes": 768, "dim": 768, "depth": 12, "heads": 6, "dim_head": 128}


def published(seed=0, **options):
    torch.manual_seed(seed)
    return reference.CRATE(**SMALL | options).eval()


def weights(seed=0):
    return published(seed).state_dict()


def under(prefix, values):
    return {prefix + name: value for name, value in values.items()}


def inside(word, values):
    """As modules around others name their weights: before the last word and after the second."""
    return {
        ".".join((*name.split(".")[:2], word, *name.split(".")[2:])) if name.count(".") > 1 else name: value
        for name, value in values.items()
    }


class Lightning(nn.Module):
    """What a LightningModule is to its state dict: a model beside a loss that has weights."""

    def __init__(self):
        super().__init__()
        self.model, self.criterion = published(), nn.Linear(2, 2)


class Attributes(dict):
    """A dictionary of another package, with attributes."""


def counted(model):
    """What thop leaves on a model."""
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    return model


LAYOUTS = {
    "net": lambda: {"net": weights(), "acc": 71.0, "epoch": 3},
    "model_state_dict": lambda: {"model_state_dict": weights(), "optimizer_state_dict": {}, "loss": 0.5},
    "a shelf that nobody knows": lambda: {"student": under("module.", weights()), "step": 3},
    "a shelf on a shelf": lambda: {"checkpoint": {"model": weights()}},
    "Lightning": lambda: {"epoch": 1, "pytorch-lightning_version": "2.0", "state_dict": Lightning().state_dict()},
    "compiled within": lambda: {"state_dict": inside("_orig_mod", weights())},
    "checkpointed layers": lambda: inside("_checkpoint_wrapped_module", weights()),
    "FSDP1": lambda: {"model": under("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module._fpw_module", weights()))},
    "all around": lambda: under("module._orig_mod.model.", inside("_checkpoint_wrapped_module", weights())),
    "AveragedModel": lambda: {"swa": AveragedModel(published()).state_dict()},
    "AveragedModel, bare": lambda: AveragedModel(published()).state_dict(),
    "counted operations": lambda: counted(published()).state_dict(),
    "mean beside": lambda: {"state_dict": weights(1), "state_dict_ema": weights()},
    "model_ema": lambda: {"model": weights(1), "model_ema": under("module.", weights()) | {"n_averaged": torch.tensor(3)}},
    "mean in one dictionary": lambda: {**under("online_model.", weights(1)), **under("ema_model.", weights())},
    "mean in a callback": lambda: {"state_dict": under("model.", weights(1)), "callbacks": {"EMA": {"w": weights()}}},
    "an older one beside": lambda: {"state_dict": weights(), "best_state_dict": weights(1)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_where_people_have_them(layout, tmp_path, capsys):
    torch.save(LAYOUTS[layout](), tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth", heads=2).state_dict()
    expected = weights()
    assert list(loaded) == list(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)
    said = capsys.readouterr().err
    for word, seen in (("mean", "--weights last"), ("beside", "'best_state_dict'"), ("Lightning", "'criterion.weight'")):
        assert seen in said or word not in layout or (layout == "mean beside" and word == "beside")


OBJECTS = {
    "Namespace": lambda: argparse.Namespace(lr=1e-3, arch="CRATE_tiny", sizes=[1, 2], nested=argparse.Namespace(a=None)),
    "SimpleNamespace": lambda: types.SimpleNamespace(lr=1e-3),
    "NumPy's numbers": lambda: [np.float64(71.5), np.float32(1), np.int64(3), np.bool_(True)],
    "NumPy's arrays": lambda: {"curve": np.arange(12.0).reshape(3, 4), "names": np.array(["a", "b"]), "state": np.zeros(0)},
    "a random state": lambda: ("MT19937", np.arange(624, dtype=np.uint32), 5, 0, 0.0),
    "a path": lambda: pathlib.PurePosixPath("runs") / "mine",
    "a dictionary of its own": lambda: Attributes(lr=1e-3, inner=Attributes(a=1), score=np.float64(3)),
    "a dictionary with a default": lambda: defaultdict(list, a=[1]),
    "a class": lambda: {"kind": float, "model": Attributes},
    "an optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9).defaults,
    "a version": lambda: torch.__version__,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("what", OBJECTS)
def test_what_others_put_beside_weights_is_passed_over(what, legacy, tmp_path):
    content = {"args": OBJECTS[what](), "state_dict": weights(), "again": OBJECTS[what](), "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(tmp_path / "x.pth", heads=2).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights().items())


class Caller:
    """Stored as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, exec, open, getattr, __import__, torch.load, torch.save])
def test_what_would_call_something_is_refused_beside_whole_weights(function, tmp_path):
    mark = str(tmp_path / "mark")
    caller = Caller(function, {eval: f"open({mark!r}, 'w')", exec: f"open({mark!r}, 'w')"}.get(function, mark))
    torch.save({"args": argparse.Namespace(a=caller), "state_dict": weights()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: .*it asks for \S+, and only tensors and plain values are read"):
        load_checkpoint(tmp_path / "x.pth", heads=2)
    assert os.listdir(tmp_path) == ["x.pth"]


def test_no_class_of_a_file_is_imported_or_made(tmp_path, monkeypatch):
    """Whatever it is called: the name alone is looked at."""
    module = types.ModuleType("stranger")
    exec("class Config:\n def __setstate__(self, state): open(state['mark'], 'w')", module.__dict__)
    module.Config.__module__ = "stranger"
    monkeypatch.setitem(__import__("sys").modules, "stranger", module)
    settings = module.Config()
    settings.mark = str(tmp_path / "mark")
    torch.save({"args": settings, "model": weights()}, tmp_path / "x.pth")
    load_checkpoint(tmp_path / "x.pth", heads=2)
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"student": weights(), "teacher": weights(1)}, r"several models \('student', 'teacher'\)"),
        (lambda: {**under("a.", weights()), **under("b.", weights())}, r"several models \('a', 'b'\)"),
        (lambda: {f"{number}.pos_embedding": torch.zeros(1) for number in range(2000)}, "2000 models"),
        (lambda: weights() | under("module.", weights()), r"'.*' twice"),
        (lambda: argparse.Namespace(model=weights()), "it asks for argparse.Namespace"),
        (lambda: {"conv1.weight": torch.zeros(3), "epoch": 1}, "no weights of a CRATE in it$"),
        (lambda: {"model": {name: value.numpy() for name, value in weights().items()}}, "it asks for numpy"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_in_a_line(content, words, tmp_path):
    torch.save(content(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=words) as info:
        load_checkpoint(tmp_path / "x.pth", heads=2)
    assert str(info.value).startswith(f"{tmp_path / 'x.pth'}: ") and "\n" not in str(info.value)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["archive", "safetensors"])
def test_weights_under_any_prefix_are_found_and_of_several_the_one_that_is_named(save, tmp_path, capsys):
    named = {"student.backbone": weights(), "teacher.backbone": weights(1), "head.0": {"bias": torch.zeros(3)}}
    flat = {f"{prefix}.{name}": value for prefix, values in named.items() for name, value in values.items()}
    save({name: value for name, value in flat.items() if not name.startswith("teacher")}, tmp_path / "one")
    assert torch.equal(load_checkpoint(tmp_path / "one", heads=2).cls_token, weights()["cls_token"])
    assert "left out, not of the model: 1 entries, 'head.0.bias' first" in capsys.readouterr().err
    save(flat, tmp_path / "both")
    for name, values in list(named.items())[:2]:
        assert torch.equal(load_checkpoint(tmp_path / "both", heads=2, weights=name).cls_token, values["cls_token"])
    status, _, err = call(capsys, "convert", tmp_path / "both", tmp_path / "x.pth", "--heads", "2")
    assert status == 2 and "('student.backbone', 'teacher.backbone'), and nothing tells which is meant; say which" in err
    line = ("convert", tmp_path / "both", tmp_path / "x.pth", "--heads", "2", "--overwrite", "--weights")
    assert call(capsys, *line, "teacher.backbone")[0] == 0
    status, _, err = call(capsys, *line, "backbone")
    assert status == 2 and "--weights is 'backbone'; there are 'student.backbone', 'teacher.backbone' in it" in err


def test_a_name_of_weights_that_have_none_is_refused(tmp_path):
    save_model(CRATE(**SMALL), tmp_path / "x.safetensors")
    torch.save(weights(), tmp_path / "x.pth")
    for file, words in (("x.safetensors", "one model in it, which has no name"), ("x.pth", "weights without a name")):
        with pytest.raises(CheckpointError, match=f"--weights is 'student'; there .*{words}"):
            load_checkpoint(tmp_path / file, heads=2, weights="student")


def test_a_file_that_holds_itself_is_read_once(tmp_path):
    content = OrderedDict(a=None)
    content["a"] = content["b"] = {f"{number}": content for number in range(300)}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no weights of a CRATE"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.fixture(scope="module")
def demo():
    """Weights as those of the segmentation demo, images, the logits, and the notebook's maps: the class token's attention to
    the patches, in the last layer, (images, 6, 4)."""
    torch.manual_seed(0)
    model, seen = reference.CRATE(**DEMO).eval(), []
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for mssa, _ in model.transformer.layers:
            mssa.fn.qkv.weight *= 0.3  # else the class token looks at itself alone
        model.transformer.layers[-1][0].fn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
        logits = model(images)
        w = seen[0].unflatten(-1, (6, 128)).transpose(1, 2)
        return model.state_dict(), images, logits, torch.softmax(w @ w.mT * 128**-0.5, dim=-1)[:, :, 0, 1:]


HEAD = {"head.weight": torch.zeros(21842, 768), "head.bias": torch.zeros(21842)}


@pytest.mark.parametrize("beside", [HEAD, {}], ids=["with the head", "without"])
def test_the_segmentation_demo_has_six_heads(demo, beside, tmp_path, capsys):
    values, images, logits, maps = demo
    torch.save({"model": under("module.", values | beside)}, tmp_path / "demo.pth")
    model = load_checkpoint(tmp_path / "demo.pth")
    assert (model.transformer.heads, model.patch_size, model.transform) == (6, (8, 8), None if beside else model.transform)
    said = capsys.readouterr().err
    assert "heads=6" in said and ("'head' beside 'mlp_head'" in said) == bool(beside)
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    drawn = inspection.attention_maps(model, images, [-1])[0].flatten(-2)
    torch.testing.assert_close(drawn, maps, rtol=1e-4, atol=1e-6)
    assert maps.min() > 0.01  # there is something to see


def test_what_tells_the_demo_from_the_base_model_is_asked_for(demo, tmp_path):
    values = demo[0] | {"mlp_head.1.weight": torch.zeros(21842, 768), "mlp_head.1.bias": torch.zeros(21842)}
    torch.save(values, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="12 heads and of the segmentation demo with 6; say heads"):
        load_checkpoint(tmp_path / "x.pth")
    for heads in (6, 12):
        assert constructor_arguments(load_checkpoint(tmp_path / "x.pth", heads=heads))["dim_head"] == 768 // heads


def test_a_run_of_twelve_heads_does_not_start_from_the_demo(demo, tmp_path):
    save_file(demo[0] | HEAD, tmp_path / "demo.safetensors")
    source = read_weights(tmp_path / "demo.safetensors")
    with torch.device("meta"):
        model = CRATE(**DEMO | {"heads": 12, "dim_head": 64})
    with pytest.raises(CheckpointError, match="heads is 6 in it and 12 in this run, which may start from it with --heads 6"):
        start_from(model, source, "demo.safetensors")
    assert "'head' beside" in read_model(tmp_path / "demo.safetensors").note


def test_a_small_model_of_21842_classes_is_told_by_its_shapes(tmp_path):
    options = {"dim": 384, "depth": 12, "dim_head": 64, "heads": 6, "num_classes": 21842, "patch_size": 8}
    torch.save({"model": published(**options).state_dict()}, tmp_path / "x.pth")
    found = constructor_arguments(load_checkpoint(tmp_path / "x.pth"))
    assert found["heads"] == 6 and found["patch_size"] == [8, 8]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "published"])
def test_head_and_positions_are_made_anew_for_other_sizes(ours, tmp_path, capsys):
    torch.manual_seed(0)
    model = CRATE(**SMALL).eval()
    path = tmp_path / "x.safetensors"
    (save_model if ours else lambda model, path: save_file(model.state_dict(), path))(model, path)
    loaded = load_checkpoint(path, heads=2, num_classes=5, image_size=(16, 24), backend="torch")
    said = capsys.readouterr().err
    assert "a new head, random, for 5 classes, where it has 3" in said and "from 2×2 patches to 4×6" in said
    assert loaded(torch.randn(2, 3, 16, 24)).shape == (2, 5) and loaded.transformer.backend == "torch"
    kept = [name for name in model.state_dict() if not name.startswith("mlp_head") and name != "pos_embedding"]
    assert all(torch.equal(loaded.state_dict()[name], model.state_dict()[name]) for name in kept)
    assert torch.equal(loaded.pos_embedding[:, 0], model.pos_embedding[:, 0]) and not loaded.training
    save_model(loaded, tmp_path / "again.safetensors")
    same = load_checkpoint(tmp_path / "again.safetensors", num_classes=5)
    assert torch.equal(same.mlp_head[1].weight, loaded.mlp_head[1].weight) and capsys.readouterr().err == ""


def test_other_heads_share_the_same_width(tmp_path):
    save_model(CRATE(**SMALL), tmp_path / "x.safetensors")
    assert constructor_arguments(load_checkpoint(tmp_path / "x.safetensors", heads=4))["dim_head"] == 4


def test_a_new_head_is_refused_where_it_is_none(tmp_path, capsys):
    save_model(CRATE(**SMALL), tmp_path / "x.safetensors")
    for sizes in ({"num_classes": "x"}, {"num_classes": -1}, {"image_size": 9}, {"num_classes": 10**15}):
        with pytest.raises((CheckpointError, RuntimeError, MemoryError), match=r"x\.safetensors|memory|allocate"):
            load_checkpoint(tmp_path / "x.safetensors", **sizes)
    assert call(capsys, "convert", tmp_path / "x.safetensors", tmp_path / "y.pth", "--image-size", "9")[0] == 2


def adapted(model):
    """The names that PEFT gives where an adapter of its is on each qkv."""
    own, name = model.state_dict(), ".0.fn.qkv."
    return {key.replace(name, f"{name}base_layer."): value for key, value in own.items()} | {
        f"transformer.layers.0{name}lora_A.default.weight": torch.zeros(2, 16)
    }


REWRITTEN = {
    "merge_and_unload": adapted,
    "remove_parametrizations": lambda model: parametrizations.weight_norm(model.mlp_head[1]) and model.state_dict(),
    "prune.remove": lambda m: prune.l1_unstructured(m.transformer.layers[1][0].fn.qkv, "weight", 0.5) and m.state_dict(),
    "as_linears.*save the model it was made of": lambda model: as_linears(model).state_dict(),
}


@pytest.mark.parametrize(("words", "rewrite"), REWRITTEN.items(), ids=REWRITTEN)
def test_weights_that_stand_for_others_are_told_apart_and_what_to_do_is_said(words, rewrite, tmp_path, capsys):
    torch.save({"state_dict": rewrite(CRATE(**SMALL).eval())}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"is no weight of a CRATE.*{words}"):
        load_checkpoint(tmp_path / "x.pt", heads=2)
    with pytest.raises(CheckpointError, match=words):
        read_weights(tmp_path / "x.pt")
    assert capsys.readouterr().err == ""


def test_a_copy_by_as_linears_is_not_saved_as_a_crate(tmp_path):
    with pytest.raises(ValueError, match=r"as_linears.*save the model it was made of"):
        save_model(as_linears(CRATE(**SMALL).eval()), tmp_path / "x.safetensors")


def test_a_folder_of_an_adapter_alone_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter of PEFT.*merge_and_unload"):
        load_checkpoint(tmp_path)


class Quantised(torch.Tensor):
    """A tensor of another package, as quantised ones are: a class around others."""

    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    __torch_dispatch__ = classmethod(lambda *_: None)


def test_tensors_of_another_packages_class_are_no_damage(tmp_path):
    torch.save(weights() | {"mlp_head.1.weight": Quantised(torch.zeros(3, 16))}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"its tensors are of .*Quantised, as quantised ones are.*save the model"):
        load_checkpoint(tmp_path / "x.pt")


def test_one_head_as_wide_as_a_token_is_not_taken_where_there_is_a_projection_back(tmp_path):
    wide = dict(dim=64, heads=2, dim_head=32)
    torch.save(published(**wide).state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"number of heads open .64 values in all heads.; say heads"):
        load_checkpoint(tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt", heads=2).transformer.heads == 2


def test_a_wrong_argument_is_not_said_to_be_the_files(tmp_path):
    save_model(CRATE(**SMALL), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"with backend='fast', build no CRATE .backend is 'fast'; allowed are"):
        load_checkpoint(tmp_path / "x.safetensors", backend="fast")
