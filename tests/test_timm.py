"""CRATE in timm: the contract of timm's own tests/test_models.py, CRATE's numbers and kernels, weights from anywhere."""

import importlib
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3, dispatch_clip_grad

import crate_fast
import crate_fast.timm
from crate_fast import CRATE, CheckpointError, load_checkpoint
from crate_fast.checkpoint import save_model
from crate_fast.checkpoint.timm_config import ALPHA_ARCHITECTURES, ARCHITECTURES, IN21K
from crate_fast.eval_transform import MEAN, STD, Transform
from crate_fast.kernels import runtime
from crate_fast.optional import MissingPackageError
from crate_fast.reference import CRATE as Published
from crate_fast.sizes import SIZES
from crate_fast.timm.__main__ import main as run_script

NAME = "crate_tiny_patch16_224"
OWN = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=3, heads=2, dim_head=16)
TINY = dict(img_size=8, patch_size=4, num_classes=5, embed_dim=32, depth=3, num_heads=2, head_dim=16)
POOLS = {"token": "cls", "avg": "mean"}


def create(seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(NAME, **TINY | options).eval()


def images(model, count=2):
    return torch.randn(count, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(7))


def launches(run):
    """Names of the kernels that `run()` launches, in order."""
    seen = []
    with runtime.observed(lambda kernel, *_: seen.append(kernel.fn.__name__)):
        run()
    return seen


def gradients(model, x, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_published_size_is_in_timms_registry_under_a_name_of_its_own():
    known = {*ARCHITECTURES, *ALPHA_ARCHITECTURES}
    assert set(timm.list_models("crate_*")) == known == set(timm.list_models(module="crate"))
    others = [name for name in timm.list_models() if name not in known]
    assert len(others) > 1000 and not any("crate" in name for name in others)
    for size in SIZES:
        model = timm.create_model(f"crate_{size}_patch16_224", device="meta")
        with torch.device("meta"):
            own = getattr(crate_fast, f"CRATE_{size}")()
        shapes = {name: value.shape for name, value in own.state_dict().items()}
        assert {name: value.shape for name, value in model.state_dict().items()} == shapes
        assert model.transformer.heads == own.transformer.heads
    for name, heads in {"small_21k": 6, "base_21k": 12, "base_demo": 6}.items():
        model = timm.create_model(f"crate_{name}_patch8_224", device="meta")
        sizes = (model.num_classes, model.patch_size, model.pos_embedding.shape[1], model.transformer.heads)
        assert sizes == (IN21K, (8, 8), 785, heads)
        assert model.transformer.layers[0][0].fn.qkv.weight.shape == (model.embed_dim, model.embed_dim)


def test_crate_alpha_is_there_in_its_sizes_and_patches_with_timms_contract(tmp_path):
    assert {f"crate_alpha_base_patch{n}_224" for n in (8, 16, 32)} | {"crate_alpha_large_patch14_224"} <= {*ALPHA_ARCHITECTURES}
    large = timm.create_model("crate_alpha_large_patch14_224", device="meta")
    assert sum(p.numel() for p in large.parameters()) == 253_650_920 and large.default_cfg["first_conv"] == "conv1"
    torch.manual_seed(0)
    model = timm.create_model("crate_alpha_tiny_patch16_224", **TINY, init_values=0.5, drop_path_rate=0.1).eval()
    torch.manual_seed(0)
    own, x = crate_fast.CRATEAlpha(**OWN, init_values=0.5).eval(), images(model)
    assert torch.equal(model(x), own(x)) and model.get_classifier() is model.mlp_head[1]
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), own(x))
    tokens, middle = model.forward_intermediates(x, [0, -1])
    assert tokens.shape == (2, 5, 32) and [y.shape for y in middle] == [(2, 32, 2, 2)] * 2
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert len(groups) >= 5
    save_model(own, tmp_path / "own.safetensors")
    grey = timm.create_model("crate_alpha_tiny_patch16_224", **TINY, in_chans=1, init_values=0.5).eval()
    grey.load_pretrained(tmp_path / "own.safetensors")
    one = x[:, :1]
    torch.testing.assert_close(grey(one), own(one.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("pool, backend", [("token", "torch"), ("avg", "torch"), ("avg", "triton")])
def test_weights_logits_and_gradients_are_those_of_crate_to_the_bit(pool, backend):
    model = create(global_pool=pool, backend=backend, lambd=0.3, depth=1)
    torch.manual_seed(0)
    own = CRATE(**OWN | {"depth": 1}, pool=POOLS[pool], backend=backend, lambd=0.3).eval()
    assert list(model.state_dict()) == list(own.state_dict()) and same(model.parameters(), own.parameters())
    x = images(model)
    assert torch.equal(model(x), own(x)) and same(gradients(model, x), gradients(own, x))
    with torch.no_grad():
        assert torch.equal(model(x), own(x))
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), own(x))
    own.load_state_dict(create(seed=1, depth=1).state_dict())
    model.load_state_dict(own.state_dict())
    assert torch.equal(model(x), own(x))


def test_what_can_be_fused_stays_fused():
    model = create(backend="triton", drop_path_rate=0.5)
    x = images(model)
    fused = launches(lambda: model(x))
    assert fused == launches(lambda: CRATE(**OWN, backend="triton").eval()(x))
    assert launches(lambda: model.forward_features(x)) == fused
    split = launches(lambda: model.forward_intermediates(x, [0]))
    assert sorted(split) == sorted([*fused, "_prepare_kernel", "_enter_kernel"])  # entered again behind the first layer
    features = timm.create_model(NAME, features_only=True, backend="triton", out_indices=[-1], **TINY).eval()
    assert launches(lambda: features(x)) == fused
    model.train()
    # The first layer is never left out; those behind it run by their modules, and both steps of each have their kernel.
    assert launches(lambda: model(x)) == [*fused[:6], *["_mssa_forward_kernel", "_linear_kernel"] * 2]
    model.set_grad_checkpointing()
    model.eval()
    assert launches(lambda: model(x)) == fused


@pytest.mark.parametrize("pool", [*POOLS, ""])
def test_the_contract_of_features_and_heads(pool):
    """As timm's test_model_default_cfgs."""
    model = create(global_pool=pool)
    x, config, weights = images(model), model.default_cfg, model.state_dict()
    assert f"{config['classifier']}.weight" in weights and f"{config['first_conv']}.weight" in weights
    assert model.num_classes == 5 and model.num_features == model.head_hidden_size == model.embed_dim == 32
    assert model.global_pool == pool and model.get_classifier() is model.mlp_head[1]
    features = model.forward_features(x)
    before = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, 5, 32) and before.shape == ((2, 32) if pool else (2, 5, 32))
    torch.testing.assert_close(model.get_classifier()(before), model(x))

    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), torch.nn.Identity)
    torch.testing.assert_close(model(x), before)
    alone = create(num_classes=0, global_pool=pool)
    assert torch.equal(alone(x), model(x)) and list(alone.state_dict()) == list(model.state_dict())
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.global_pool == "avg" and model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 5, 32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_intermediates_are_what_each_layer_gives(backend):
    sizes = dict(depth=3, img_size=(12, 8))
    model = create(backend=backend, **sizes)
    x, given = images(model), []
    hooks = [layer.register_forward_hook(lambda _, __, y: given.append(y)) for layer in model.transformer.layers]
    tokens = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    expected = [y[:, 1:].transpose(1, 2).unflatten(2, (3, 2)) for y in given]
    found, maps = model.forward_intermediates(x)
    torch.testing.assert_close(found, tokens)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(model.forward_intermediates(x, 2, intermediates_only=True), expected[1:])
    pairs = model.forward_intermediates(
        x, [0, -1], return_prefix_tokens=True, norm=True, output_fmt="NLC", stop_early=True, intermediates_only=True
    )
    normed = [model.mlp_head[0](given[index]) for index in (0, -1)]
    torch.testing.assert_close(pairs, [(y[:, 1:], y[:, :1]) for y in normed])
    named = model.forward_intermediates(x, [1], output_dict=True, return_prefix_tokens=True)
    assert list(named) == ["image_intermediates", "image_intermediates_prefix", "image_features"]

    features = timm.create_model(NAME, features_only=True, **TINY | sizes, out_indices=(0, -2)).eval()
    missing = features.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing and features.feature_info.channels() == [32, 32] and features.feature_info.reduction() == [4, 4]
    assert len(features.model.transformer.layers) == 2  # what is behind is taken off
    torch.testing.assert_close(features(x), expected[:2])
    hooked = timm.create_model(NAME, features_only=True, feature_cls="hook", **TINY | sizes).eval()
    assert [y.shape for y in hooked(x)] == [(2, 7, 32)] * 3


def test_arguments_have_timms_names_or_crates():
    given = dict(in_chans=1, img_size=(8, 12), drop_rate=0.5, pos_drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    model = create(**given, ista=0.3, lambd=0.2, backend="reference")
    layer = model.transformer.layers[-1]
    assert (model.in_chans, model.image_size, model.dropout.p, layer[0].fn.dropout.p) == (1, (8, 12), 0.1, 0.2)
    assert [layer.drop_path for layer in model.transformer.layers] == [0, 0.15, 0.3]
    assert (layer[1].fn.step_size, layer[1].fn.lambd, model.transformer.backend) == (0.3, 0.2, "reference")
    own = timm.create_model(NAME, **{name: value for name, value in OWN.items() if name != "depth"}, depth=1, channels=1)
    assert own.in_chans == 1 and own.image_size == (8, 8) and own.default_cfg["input_size"] == (1, 8, 8)
    cast = create(dtype=torch.float64)
    cast.reset_classifier(3)
    assert cast(images(cast).double()).dtype == torch.float64


@pytest.mark.parametrize("size", [(16, 16), (4, 12)])
@pytest.mark.parametrize("grad", [False, True])
def test_images_of_another_size_are_refused_or_have_positions_resampled(size, grad):
    model, dynamic = create(), create(dynamic_img_size=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))
    with pytest.raises(
        ValueError, match=f"the image is {size[0]}×{size[1]} and this model is for 8×8; make it with that img_size"
    ):
        model(x)
    with torch.set_grad_enabled(grad):
        found = dynamic(x)
        assert torch.equal(dynamic(images(model)), model(images(model)))
        assert dynamic.forward_intermediates(x, 1)[1][0].shape == (2, 32, size[0] // 4, size[1] // 4)
        model.set_input_size(size)
        assert torch.equal(model(x), found)


def test_dropout_before_the_classifier_is_timms():
    model = create(drop_rate=0.5).train()
    x, width = images(model, 64), model.num_features
    torch.manual_seed(0)
    dropped = model.forward_head(model.forward_features(x), pre_logits=True)
    kept = (dropped != 0).float().mean().item()
    assert abs(kept - 0.5) < 5 * 0.5 / (64 * width) ** 0.5
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), model.get_classifier()(dropped))


@pytest.mark.parametrize("decay", [0.5, 0.75])
def test_learning_rates_fall_from_layer_to_layer_and_embeddings_do_not_decay(decay):
    model = create()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay, verbose=False
    )
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decays = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert scale.keys() == set(names.values())
    depth = {
        "mlp_head.1.weight": 0,
        "mlp_head.0.weight": 1,
        "pos_embedding": 4,
        "cls_token": 4,
        "to_patch_embedding.2.weight": 4,
    }
    depth |= {f"transformer.layers.{i}.1.fn.weight": 3 - i for i in range(3)}
    assert {name: round(scale[name], 9) for name in depth} == {name: round(decay**i, 9) for name, i in depth.items()}
    assert decays == {name for name, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_timms_loop_trains_it_with_all_that_belongs_to_it(optimizer):
    """Layer decay, clipping, mean of the weights, stochastic depth, checkpointing: the loss falls, and every weight moves."""
    model = create(drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    before = [p.detach().clone() for p in model.parameters()]
    mean = ModelEmaV3(model, decay=0.5)
    steps = create_optimizer_v2(model, opt=optimizer, lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    x, labels, losses = images(model, 8), torch.arange(8) % 5, []
    for step in range(25):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        steps.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        steps.step()
        mean.update(model, step=step)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
    assert mean.module(x).shape == (8, 5)


WRAPS = {
    "published": lambda weights: {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}},
    "finetuned": lambda weights: {"model": weights, "acc": 71.0},
    "mean": lambda weights: {"state_dict": {name: 0 * w for name, w in weights.items()}, "state_dict_ema": weights},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_published_files_are_loaded_by_every_way_of_timms(wrap, tmp_path):
    torch.manual_seed(0)
    published = Published(**OWN).eval()
    path = tmp_path / "published.pth.tar"
    torch.save(wrap(published.state_dict()), path)
    by_path = create(seed=1, checkpoint_path=str(path))
    by_file = create(seed=1, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 5})
    by_dict = create(seed=1, pretrained=True, pretrained_cfg_overlay={"state_dict": published.state_dict(), "num_classes": 5})
    by_timm = create(seed=1, pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=5, custom_load=False))
    x = images(by_path)
    for model in (by_path, by_file, by_dict, by_timm):
        torch.testing.assert_close(model(x), published(x), rtol=1e-5, atol=1e-5)


def test_files_go_both_ways_with_how_they_are_evaluated(tmp_path):
    model = create()
    model.transform = Transform(0.0, (0.5,) * 3, (0.25,) * 3, tuple("abcde"))
    model.set_grad_checkpointing()
    model.save_pretrained(tmp_path / "ours")
    x = images(model)
    assert torch.equal(CRATE.from_pretrained(tmp_path / "ours")(x), model(x))
    again = type(model).from_pretrained(tmp_path / "ours")
    assert type(again) is type(model) and torch.equal(again(x), model(x))
    found = create(seed=1, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "ours")})
    assert torch.equal(found(x), model(x)) and found.transform == model.transform
    config = resolve_data_config(model=found)
    assert config["mean"] == (0.5,) * 3 and config["std"] == (0.25,) * 3 and config["crop_mode"] == "squash"
    assert found.pretrained_cfg["label_names"] == tuple("abcde")

    timm.models.save_for_hf(found, tmp_path / "timms", model_args=TINY)
    back = timm.create_model(f"local-dir:{tmp_path / 'timms'}", pretrained=True).eval()
    assert torch.equal(back(x), model(x)) and back.pretrained_cfg["crop_mode"] == "squash"
    torch.save({"state_dict": back.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "last.pth.tar")
    assert torch.equal(load_checkpoint(tmp_path / "last.pth.tar", heads=2)(x), model(x))


def test_weights_of_other_classes_another_size_and_other_channels(tmp_path, caplog):
    source = CRATE(**OWN | {"channels": 3}).eval()
    torch.nn.init.normal_(source.to_patch_embedding[1].weight)
    torch.nn.init.normal_(source.to_patch_embedding[1].bias)
    save_model(source, tmp_path / "source.safetensors")
    overlay = {"file": str(tmp_path / "source.safetensors")}
    with caplog.at_level("INFO", logger="crate_fast.timm"):
        model = create(seed=1, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1, img_size=16)
    assert re.search(r"position embeddings resampled; new: the head \(2\)", caplog.text)
    grey = create(seed=1, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, in_chans=1)
    x = images(grey)
    with torch.no_grad():
        expected = source.mlp_head[0](source._features(x.expand(-1, 3, -1, -1), "cls"))
    torch.testing.assert_close(grey(x), expected)  # exactly what the weights make of a grey image
    for other in (model, grey):
        assert same(other.transformer.parameters(), source.transformer.parameters())
    grey.set_input_size(16)
    assert torch.equal(grey.pos_embedding, model.pos_embedding) and grey.image_size == (16, 16)
    assert grey(images(model)).shape == (2, 32)
    six = create(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=6)
    pairs = images(grey).new_zeros(2, 3, 8, 8).normal_()
    torch.testing.assert_close(six(torch.cat((pairs, pairs), 1)), source(pairs))


@pytest.mark.parametrize("crop", [0.875, 0.0])
def test_timms_evaluation_shows_the_model_the_pixels_that_ours_does(crop, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    source = CRATE(**OWN | {"image_size": 56}).eval()
    source.transform = Transform(crop, MEAN, STD)
    save_model(source, tmp_path / "model.safetensors")
    _, transform, _ = crate_fast.load(tmp_path / "model.safetensors")
    found = create(img_size=56, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")})
    timms = create_transform(**resolve_data_config(model=found))  # of the model's size too
    torch.testing.assert_close(timms(Image.open(tmp_path / "photo.png")), transform(tmp_path / "photo.png"))
    assert resolve_data_config(model=create())["mean"] == MEAN


def test_a_script_of_timms_knows_the_names(tmp_path, monkeypatch, capsys):
    """As `python -m crate_fast.timm SCRIPT WORDS`, which is as `python SCRIPT WORDS`."""
    (tmp_path / "beside.py").write_text("word = 'beside'")
    script = tmp_path / "script.py"
    found = "'crate_tiny_patch16_224' in timm.list_models('crate_*')"
    script.write_text(f"import sys, timm, beside\nprint(__name__, sys.argv[1:], beside.word, {found})")
    monkeypatch.setattr("sys.argv", list(sys.argv))
    monkeypatch.setattr("sys.path", list(sys.path))
    assert run_script([str(script), "--flag", "3"]) == 0
    assert capsys.readouterr().out == "__main__ ['--flag', '3'] beside True\n"
    assert run_script([]) == 2 and run_script(["none.py"]) == 2
    assert re.fullmatch("nothing to run; it must be a script.*\nnone.py: no such file; it must.*\n", capsys.readouterr().err)


def test_without_timm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "crate_fast.timm")
    with pytest.raises(MissingPackageError, match=r"this needs timm: pip install 'crate-fast\[timm\]'"):
        importlib.import_module("crate_fast.timm")


WRONG = {
    "no published weights here": (
        dict(pretrained=True),
        RuntimeError,
        "No pretrained weights exist for crate_tiny_patch16_224",
    ),
    "pooling": (dict(global_pool="max"), ValueError, "global_pool is 'max'; allowed are 'token', 'avg', ''"),
    "share": (dict(drop_rate=1.5), ValueError, "drop_rate is 1.5; it must be from 0 to 1"),
    "drop path": (dict(drop_path_rate=-0.1), ValueError, "drop_path is -0.1; it must be from 0 to 1"),
    "twice": (dict(dim=16), TypeError, "embed_dim and dim are the same argument by two names"),
    "unknown": (dict(mlp_ratio=4), TypeError, "mlp_ratio"),
    "no such layer": (dict(features_only=True, out_indices=(1, 7)), ValueError, r"indices is \(1, 7\); of 3 layers"),
}


@pytest.mark.parametrize("options, kind, words", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(options, kind, words):
    with pytest.raises(kind, match=words) as caught:
        create(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_calls_and_files_are_one_line(tmp_path):
    model = create()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    save_model(CRATE(**OWN | {"lambd": 0.5}), tmp_path / "threshold.safetensors")
    wrong = {
        "num_classes is -1": lambda: model.reset_classifier(-1),
        "global_pool is 'map'": lambda: model.reset_classifier(3, "map"),
        "output_fmt is 'NHWC'": lambda: model.forward_intermediates(images(model), output_fmt="NHWC"),
        "patch_size is 8": lambda: model.set_input_size(16, 8),
        "image_size 9 is not divisible": lambda: model.set_input_size(9),
        "no weights of a CRATE": lambda: model.load_pretrained(tmp_path / "other.pth"),
        "lambd is 0.5 in it and 0.1": lambda: model.load_pretrained(tmp_path / "threshold.safetensors"),
    }
    for words, call in wrong.items():
        with pytest.raises((ValueError, CheckpointError), match=words) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    assert same(model.parameters(), create().parameters())


@pytest.mark.parametrize("form", [True, False], ids=["safetensors", "archive"])
def test_a_folder_for_the_hub_by_timm_is_read_as_what_it_says(form, tmp_path, capsys):
    source = CRATE(**OWN | {"image_size": (8, 12), "heads": 4, "dim_head": 8, "ista": 0.3, "lambd": 0.2, "pool": "mean"}).eval()
    source.transform = Transform(0.8, MEAN, STD, tuple("abcde"))
    save_model(source, tmp_path / "x.safetensors")
    options = dict(img_size=(8, 12), num_heads=4, head_dim=8, ista=0.3, lambd=0.2, global_pool="avg", pretrained=True)
    model = create(**options, pretrained_cfg_overlay={"file": str(tmp_path / "x.safetensors")})
    timm.models.save_for_hf(model, str(tmp_path), model_args=None, safe_serialization=form)
    found = load_checkpoint(tmp_path)
    assert torch.equal(found(images(model)), model(images(model))) and capsys.readouterr().err == ""
    assert found.transform == source.transform and torch.equal(found(images(model)), source(images(model)))
    assert timm.create_model(f"local-dir:{tmp_path}").eval()(images(model)).shape == (2, 5)


def test_weights_of_another_size_of_model_name_timms_arguments(tmp_path):
    save_model(CRATE(**OWN), tmp_path / "model.safetensors")
    options = dict(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path)})
    with pytest.raises(
        CheckpointError, match=r"32 in it and 384 in this model.* with embed_dim=32, depth=3,.* patch_size=4"
    ) as told:
        timm.create_model(NAME, **options)
    words = str(told.value).partition(" with ")[2]
    found = timm.create_model(NAME, **options, **eval(f"dict({words})"), img_size=8)
    assert found.pretrained_cfg["input_size"] == (3, 8, 8)
    found.set_input_size((16, 12))
    assert found.pretrained_cfg["input_size"] == (3, 16, 12)
