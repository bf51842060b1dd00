"""CRATE-α: the published class's names, weights and numbers, in fewer passes; its files are read, written and looked into."""

import re

import pytest
import torch
from conftest import call
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import crate_fast
from crate_fast import CRATE, CheckpointError, CRATEAlpha, load_checkpoint, reference_alpha
from crate_fast.checkpoint import constructor_arguments, save_model
from crate_fast.checkpoint.start_from import read_weights, start_from
from crate_fast.inspection import layer_views, measure_layers
from crate_fast.inspection.explore import explore
from crate_fast.modules import OvercompleteISTABlock
from crate_fast.training import ConfigError, resolve
from crate_fast.training.monitor import training_flops
from crate_fast.training.optimizer import build_optimizer

SMALL = dict(image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)
LARGE = {"pos_embedding": (1, 257, 1024), "cls_token": (1, 1, 1024), "conv1.weight": (1024, 3, 14, 14)}
LARGE |= {"conv1.bias": (1024,), "mlp_head.0.weight": (1024,), "mlp_head.0.bias": (1024,)}
LARGE |= {"mlp_head.1.weight": (1000, 1024), "mlp_head.1.bias": (1000,)}
OF_LAYER = {"0.norm.weight": (1024,), "0.norm.bias": (1024,), "0.fn.qkv.weight": (1024, 1024)}
OF_LAYER |= {"0.fn.to_out.0.weight": (1024, 1024), "1.norm.weight": (1024,), "1.norm.bias": (1024,)}
OF_LAYER |= {"1.fn.D": (1024, 4096), "1.fn.D1": (1024, 4096)}


def made(kind=CRATEAlpha, seed=0, **options):
    torch.manual_seed(seed)
    return kind(**SMALL | options)


def both(**options):
    return made(**options), made(reference_alpha.CRATEAlpha, **options)


def images(dtype=torch.float32, size=16, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def gradients(model, batch):
    logits = model(batch)
    logits.square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def test_names_shapes_and_sizes_are_the_published_ones():
    with torch.device("meta"):
        large, base = crate_fast.CRATEAlpha_large(), crate_fast.CRATEAlpha_base()
        sizes = [getattr(crate_fast, f"CRATEAlpha_{name}")(patch_size=8) for name in ("tiny", "small", "huge")]
    layers = {f"transformer.layers.{i}.{name}": shape for i in range(24) for name, shape in OF_LAYER.items()}
    assert {name: tuple(value.shape) for name, value in large.state_dict().items()} == LARGE | layers
    assert [sum(p.numel() for p in model.parameters()) for model in (base, large)] == [72_328_936, 253_650_920]
    assert [(m.transformer.dim, m.transformer.depth, m.transformer.heads) for m in sizes] == [
        (192, 12, 3),
        (576, 12, 12),
        (1280, 32, 16),
    ]
    assert sizes[2].transformer.layers[0][0].fn.scale == 80**-0.5


def test_a_seed_draws_the_published_weights_and_draws_them_again():
    ours, published = (model.state_dict() for model in both())
    assert list(ours) == list(published) and all(torch.equal(ours[name], published[name]) for name in ours)
    model = made(seed=5)
    torch.manual_seed(0)
    model.reset_parameters()
    again = model.state_dict()
    norms = [name for name in again if "norm" in name or name.startswith("mlp_head.0")]
    assert all(torch.equal(again[name], ours[name]) for name in ours if name not in norms)


def test_training_may_start_as_the_published_training_did():
    model = made(dim=64, init_values=0.5)
    model.reset_for_training()
    block = model.transformer.layers[1][1].fn
    assert block.D.abs().max() <= (6 / 64) ** 0.5 < 1.1 * block.D1.abs().max()
    assert 0.015 < model.pos_embedding.std() < 0.025 and model.cls_token.abs().max() < 1e-5
    assert not model.conv1.bias.any() and not model.mlp_head[1].bias.any()
    assert (model.transformer.layers[0][0].scale == 0.5).all()


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 4},
        {"image_size": 16},
        {"image_size": 32},
        {"dim": 80, "heads": 1, "dim_head": 80},
        {"heads": 2, "dim_head": 80},
        {"init_values": 0.7},
        {"ista": 0.3, "lambd": 0.02, "depth": 1},
    ],
    ids=str,
)
def test_logits_and_gradients_are_the_formulas_in_float64(options):
    ours, right = (model.double() for model in both(**options))
    batch = images(torch.float64, options.get("image_size", 16))
    (logits, got), (expected, want) = (gradients(model, batch) for model in (ours, right))
    assert error(logits, expected) < 1e-12
    for (name, _), g, w in zip(ours.named_parameters(), got, want, strict=True):
        assert error(g, w) < 1e-11, name
    with torch.no_grad():
        assert error(ours.eval()(batch), expected) < 1e-12


@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_the_step_is_its_formula_at_odd_numbers_of_tokens(tokens):
    block = OvercompleteISTABlock(24).double()
    h = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(h)
    want = reference_alpha.odl(h, block.D, block.D1)
    expected = torch.autograd.grad(want, (h, block.D, block.D1), upstream)
    got = block(h.transpose(0, 1).contiguous().transpose(0, 1))
    assert error(got, want) < 1e-12
    for g, w in zip(torch.autograd.grad(got, (h, block.D, block.D1), upstream), expected, strict=True):
        assert error(g, w) < 1e-11
    assert error(block.code(h), reference_alpha.sparse_code(h, block.D)) < 1e-12


def test_the_steps_derivatives_are_those_of_differences():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 4), (4, 16), (4, 16))]
    step = lambda h, d, d1: OvercompleteISTABlock.sparsify(h, (d, d1), None, 0.4, 0.1, "torch")  # noqa: E731
    assert torch.autograd.gradcheck(step, inputs)


def test_the_step_keeps_ten_values_a_token_and_width_and_nothing_for_evaluation():
    block, h, kept = OvercompleteISTABlock(24), torch.randn(2, 17, 24), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        block(h)
        assert sum(t.numel() for t in kept.values()) == 10 * h.numel() + 2 * block.D.numel()
        kept.clear()
        block.requires_grad_(False)(h)
    assert not kept


def test_parts_may_be_frozen_and_float32_is_right_and_the_same_to_the_bit():
    ours, right = both()
    right.double()
    for model in (ours, right):
        for layer in model.transformer.layers:
            layer[1].fn.D.requires_grad_(False)
            layer[0].requires_grad_(False)
    want = [g for g in gradients(right, images(torch.float64))[1] if g is not None]
    runs = []
    for _ in range(2):
        ours.zero_grad()
        runs.append([g for g in gradients(ours, images())[1] if g is not None])
    assert len(runs[0]) == len(want) and all(error(g, w) < 2e-5 for g, w in zip(runs[0], want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_under_autocast_it_errs_no_more_than_its_formula_does():
    options = dict(dim=96, depth=3, dim_head=48, num_classes=64)
    right = made(reference_alpha.CRATEAlpha, **options).double()
    exact, gradient = gradients(right, images(torch.float64, count=16))
    errors = []
    for kind in (CRATEAlpha, reference_alpha.CRATEAlpha):
        model = made(kind, **options)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images(count=16))
        logits.float().square().mean().backward()
        assert logits.dtype == torch.bfloat16
        of_gradients = [((p.grad - g).norm() / g.norm()).item() for p, g in zip(model.parameters(), gradient, strict=True)]
        errors.append((((logits - exact).norm() / exact.norm()).item(), sorted(of_gradients)[len(of_gradients) // 2]))
    assert all(ours < 1.1 * published for ours, published in zip(*errors, strict=True)), errors


def test_a_path_is_dropped_of_each_step_by_itself_in_training_alone():
    model, kept = made(depth=1, drop_path=1.0), made(depth=1)
    assert torch.equal(model.eval()(images()), kept.eval()(images()))
    embedded = kept._embed(images())
    assert torch.equal(model.train()(images()), kept.mlp_head(embedded[:, 0]))
    layer = made(depth=1, drop_path=0.5).transformer.layers[0].train()
    torch.manual_seed(0)
    x = torch.randn(1, 5, 32).expand(64, -1, -1)
    with torch.no_grad():
        made_of = {tuple(row.flatten()[:4].tolist()) for row in layer(x)}
    assert len(made_of) == 4  # neither, one, the other, both


def test_transforms_compilers_and_copies_compute_the_same():
    model = made().eval()
    want = model(images()).detach()
    one = torch.func.vmap(lambda image: model(image[None])[0])(images())
    compiled = torch.compile(model, backend="aot_eager")(images())
    assert all(error(got, want.double()) < 1e-5 for got in (one, compiled, crate_fast.freeze(model)(images())))
    reference = made(backend="reference").eval()
    assert error(reference(images()), want.double()) < 1e-5
    assert training_flops(made()) > 6 * 2 * 17 * 16 * 32 * 32


@pytest.mark.parametrize(("kind", "autocast"), [(CRATE, True), (CRATEAlpha, True), (CRATEAlpha, False)])
def test_a_training_step_of_any_size_is_compiled_whole(kind, autocast):
    torch._dynamo.reset()
    model, found = made(kind, depth=2 - autocast), []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True, dynamic=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sum(run(images(count=count)).float().square().mean() for count in (3, 2))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    off = [error(other, eager.double()) for eager, other in zip(*found, strict=True)]
    assert max(off) < (5e-2 if autocast else 1e-5), off


def test_a_gradient_may_be_differentiated_again_or_stand_for_several():
    results = []
    for model in both(init_values=0.5):
        model.double()
        batch = images(torch.float64).requires_grad_()
        logits = model(batch)
        several = torch.autograd.grad(logits[0], batch, torch.eye(5).double(), retain_graph=True, is_grads_batched=True)
        (gradient,) = torch.autograd.grad(logits.square().sum(), batch, create_graph=True)
        again = torch.autograd.grad(gradient.square().sum(), (batch, *model.parameters()), allow_unused=True)
        results.append([*several, gradient, *(g for g in again if g is not None)])
    assert len(results[0]) == len(results[1]) > 15
    assert all(error(got, want.detach()) < 1e-10 for got, want in zip(*results, strict=True))
    model = made()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    with pytest.raises(RuntimeError, match="differentiated twice without autocast alone, or with backend='reference'"):
        torch.autograd.grad(logits.float().sum(), model.cls_token, create_graph=True)


@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_published_weights_are_read_converted_and_measured(under, tmp_path, capsys):
    published = made(reference_alpha.CRATEAlpha, dim=64, dim_head=32, heads=2).eval()
    weights = published.state_dict()
    torch.save(weights if under is None else {under: weights}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"qkv\.weight.* it must be \(63, 64\)"):
        load_checkpoint(tmp_path / "x.pth", heads=3)
    model = load_checkpoint(tmp_path / "x.pth", heads=2)
    assert type(model) is CRATEAlpha and torch.equal(model(images()), made(dim=64, dim_head=32).eval()(images()))
    assert "ista=0.1, lambd=0.1" in capsys.readouterr().err
    for name in ("y.safetensors", "y.pth", "y.pth.tar"):
        status, said, _ = call(capsys, "convert", tmp_path / "x.pth", tmp_path / name, "--heads", "2")
        assert status == 0 and "main.py" not in said
        again = load_checkpoint(tmp_path / name)
        assert constructor_arguments(again) == constructor_arguments(model)
        assert torch.equal(again(images()), model(images()))
    measures = measure_layers(model, images())
    codes = []
    for layer in published.transformer.layers:
        layer[1].fn.register_forward_pre_hook(lambda fn, args: codes.append(reference_alpha.sparse_code(args[0], fn.D)))
    published(images())
    shares = torch.stack([code.ne(0).double().mean((1, 2)) for code in codes])
    torch.testing.assert_close(measures.nonzero, shares, rtol=0, atol=1e-3)
    page = explore(model, lambda _: images()[:1], [("x", Image.new("RGB", (16, 16)))], "CRATE-α")
    told = [float(share) for share in re.findall(r'"nonzero": ([\d.]+)', page)]
    assert told == pytest.approx(measures.nonzero[:, 0].tolist(), rel=1e-6)


def test_sizes_heads_and_layerscale_are_told_by_shapes_or_asked_for(tmp_path, capsys):
    with torch.device("meta"):
        tiny = crate_fast.CRATEAlpha_tiny(num_classes=768).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in tiny.items()}, tmp_path / "tiny.pth")
    found = constructor_arguments(load_checkpoint(tmp_path / "tiny.pth"))
    assert (found["model"], found["heads"], found["image_size"]) == ("CRATEAlpha", 3, [224, 224])
    save_file(made(init_values=0.3, dim=40, dim_head=20).state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"number of heads open .*; say heads"):
        load_checkpoint(tmp_path / "odd.safetensors")
    model = load_checkpoint(tmp_path / "odd.safetensors", heads=2, num_classes=3, image_size=8)
    assert "a new head" in capsys.readouterr().err and model(images(size=8)).shape == (3, 3)


def test_files_of_ours_say_which_member_it_is(tmp_path):
    model = made(init_values=0.3, lambd=0.2).eval()
    save_model(model, tmp_path / "model.safetensors")
    save_model(made(CRATE), tmp_path / "crate.safetensors")
    for kind in (CRATE, CRATEAlpha):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is CRATEAlpha and torch.equal(loaded(images()), model(images()))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "crate.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="it is a CRATE, and no CRATEAlpha"):
        CRATEAlpha.from_pretrained(tmp_path)


def test_a_keyword_of_another_member_is_refused_by_name(tmp_path):
    save_model(made(), tmp_path / "alpha.safetensors")
    torch.save(made().state_dict(), tmp_path / "alpha.pth")
    save_model(made(CRATE), tmp_path / "crate.safetensors")
    for name in ("alpha.safetensors", "alpha.pth"):
        for keyword in ({"pool": "mean"}, {"stream": "float32"}, {"step": "ista"}):
            with pytest.raises(CheckpointError, match=f"it holds a CRATEAlpha, which has no {next(iter(keyword))}"):
                load_checkpoint(tmp_path / name, heads=2, **keyword)
    with pytest.raises(CheckpointError, match="it holds a CRATE, which has no init_values"):
        load_checkpoint(tmp_path / "crate.safetensors", init_values=0.1)
    with pytest.raises(TypeError, match="CRATE takes no depht"):
        load_checkpoint(tmp_path / "alpha.safetensors", depht=1)
    torch.save(made(init_values=0.1).state_dict(), tmp_path / "scaled.pth")
    assert load_checkpoint(tmp_path / "scaled.pth", heads=2, init_values=0.1).init_values == 0.1


@pytest.mark.parametrize(("own", "other"), [(CRATE, CRATEAlpha), (CRATEAlpha, CRATE)])
def test_a_run_does_not_start_from_another_member(own, other, tmp_path):
    weights = made(other).state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    save_model(made(other), tmp_path / "ours.safetensors")
    for name in ("bare.pth", "ours.safetensors"):
        with pytest.raises(CheckpointError, match=f"it is a {other.__name__}, and the model of this run a {own.__name__}"):
            start_from(made(own), read_weights(tmp_path / name), name)


def test_what_is_looked_into_is_what_the_model_computes():
    model = made(init_values=0.3).eval()
    *_, last = layer_views(model, images())
    torch.testing.assert_close(model.mlp_head(last.tokens[:, 0]), model(images()))


def test_every_product_may_be_a_linear_which_others_quantise():
    model = made(init_values=0.3).eval()
    linears = crate_fast.as_linears(model)
    assert not any(isinstance(module, OvercompleteISTABlock) for module in linears.modules())
    torch.testing.assert_close(linears(images()), model(images()))


def test_a_run_may_start_from_weights_for_other_patches(tmp_path):
    published = made(reference_alpha.CRATEAlpha)
    torch.save(published.state_dict(), tmp_path / "bare.pth")
    save_model(made(), tmp_path / "ours.safetensors")
    for name in ("bare.pth", "ours.safetensors"):
        model, before = made(patch_size=8, seed=3), made(patch_size=8, seed=3).state_dict()
        line = start_from(model, read_weights(tmp_path / name), name)
        assert "new: the embedding of patches, which are of another size there" in line and "resampled" in line
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert {key for key in before if key.startswith(("conv1", "mlp_head"))}.isdisjoint(changed)
        assert torch.equal(model.transformer.layers[1][1].fn.D, published.transformer.layers[1][1].fn.D)


def test_recipes_and_names_of_sizes_make_a_run_of_crate_alpha():
    config = resolve({"data": "DIR", "arch": "CRATEAlpha_base", "patch_size": 8}, "alpha-imagenet21k")
    assert (config.model, config.dim, config.heads, config.patch_size) == ("CRATEAlpha", 768, 12, 8)
    assert config.lr == 5e-5 * config.batch_size / 256 and config.decay == "kernels"
    assert resolve({"data": "DIR"}, "alpha-imagenet").lr == 1e-5 * config.batch_size / 256
    assert resolve({"data": "DIR", "arch": "CRATE_tiny"}, "alpha-imagenet").model == "CRATE"
    assert resolve({"arch": "CRATEAlpha_tiny", "image_size": 224}).patch_size == 16
    for wrong, words in (({"pool": "mean"}, "reads the class token"), ({"model": "CRATE", "layer_scale": 0.1}, "of --model")):
        with pytest.raises(ConfigError, match=words):
            resolve({"model": "CRATEAlpha"} | wrong)


def test_kernels_alone_may_decay():
    model = made(init_values=0.1)
    decaying, other = build_optimizer(model, resolve({"decay": "kernels"})).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernels = {"conv1.weight", "mlp_head.1.weight", *(name for name in names.values() if "qkv" in name or "to_out" in name)}
    assert {names[id(parameter)] for parameter in decaying["params"]} == kernels
    assert other["weight_decay"] == 0 and len(other["params"]) == len(names) - len(kernels)


def test_what_does_not_fit_is_refused_in_a_line():
    block = OvercompleteISTABlock(8)
    with pytest.raises(ValueError, match=r"D has shape \(8, 32\); for h of \(1, 2, 4\) it must be \(4, 16\)"):
        block(torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match=r"h is torch\.float64 and D torch\.float32"):
        block(torch.zeros(1, 2, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match="init_values is 'x'; it must be a number"):
        made(init_values="x")
    with pytest.raises(ValueError, match=r"drop_path is 2\.0; it must be from 0 to 1"):
        made(drop_path=2)
    with pytest.raises(ValueError, match=r"has 30,0.* weights; it must have at most 10,000,000,000"):
        made(dim=2500, depth=600)  # of which CRATE's layers would have a third of that
    changed = made()
    changed.transformer.layers[0][1].fn.residual = False
    changed.transformer.layers[0][0].norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="the model was changed after it was built"):
        save_model(changed, "never.safetensors")
