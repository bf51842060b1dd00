"""CRATE-MAE is the published class: keys, draws, loss and gradients; its files are read, and start a CRATE."""

import pytest
import torch
from conftest import call

import crate_fast
from crate_fast import CRATE, CRATEMAE, CheckpointError, load_checkpoint, reference
from crate_fast.checkpoint import save_checkpoint, save_model
from crate_fast.checkpoint.start_from import go_on_from, read_weights, start_from
from crate_fast.kernels import runtime
from crate_fast.model import cuda_graph

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}  # 17 tokens
ONE = SMALL | {"img_size": 4, "embed_dim": 20, "depth": 1, "num_heads": 1}  # 2 tokens, no projection back
LARGER = SMALL | {"img_size": 32, "embed_dim": 36, "norm_pix_loss": True, "lambd": 5.0}  # 65 tokens, heads of 18
SIZES = [ONE, SMALL, LARGER]
CLASSIFIER = {"image_size": 24, "patch_size": 4, "num_classes": 3, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
PARAMETERS = {"tiny": 11_555_328, "small": 25_405_824, "base": 44_638_464}


def drawn(build, **options):
    torch.manual_seed(0)
    return build(**options)


def trained(model, images, mask_ratio=0.75):
    """(loss, pred, mask, gradients) of a model."""
    torch.manual_seed(1)
    loss, pred, mask = model(images, mask_ratio)
    loss.backward()
    return loss, pred, mask, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far(got, want) -> float:
    return ((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def moved(model):
    """The model with all of its norms and biases off what they are made as, in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
    return model


@pytest.mark.parametrize("options", SIZES, ids=["2", "17", "65"])
def test_keys_and_draws_are_the_published_ones(published_mae, options):
    ours, theirs = drawn(CRATEMAE, **options), drawn(published_mae, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same = torch.allclose(p, q, atol=1e-5) if name.endswith("pos_embed") else torch.equal(p, q)
        assert same and p.requires_grad == q.requires_grad, name


@pytest.mark.parametrize("mask_ratio", [0.75, 0.1, 1.0])
@pytest.mark.parametrize("options", SIZES, ids=["2", "17", "65"])
def test_float64_agrees_with_the_published_class(published_mae, options, mask_ratio):
    theirs = moved(drawn(published_mae, **options)).double()
    images = torch.randn(3, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    *wanted, gradients = trained(theirs, images, mask_ratio)
    for backend in ("torch", "reference"):
        ours = CRATEMAE(**options, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        *found, own = trained(ours.double(), images, mask_ratio)
        assert all(far(a, b) < 1e-12 and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
        assert own.keys() == gradients.keys() and all(far(own[name], gradients[name]) < 1e-11 for name in own)


@pytest.mark.parametrize("backend, steps", [("torch", 20), ("triton", 3)])
def test_training_follows_the_published_class(published_mae, backend, steps):
    """In float32, by AdamW, a step's masks being drawn from one seed."""
    losses = []
    for model in (drawn(published_mae, **SMALL), drawn(CRATEMAE, **SMALL, backend=backend)):
        optimizer, draws = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
        losses.append([])
        for step in range(steps):
            torch.manual_seed(step)
            loss = model(torch.randn(4, 3, 16, 16, generator=draws), 0.75)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
def test_whoever_watches_a_layer_is_called():
    ours, seen = drawn(CRATEMAE, **SMALL | {"depth": 1}, backend="triton").eval(), []
    tokens, launched = torch.randn(1, 17, 32), []
    expected = [blocks[0](tokens) for blocks in (ours.blocks, ours.decoder_blocks)]
    ours.decoder_blocks[0].layers[0][0].norm.register_forward_hook(lambda *_: seen.append("norm"))
    ours.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    with runtime.observed(lambda kernel, *_: launched.append(kernel.__name__)):
        found = [blocks(tokens) for blocks in (ours.blocks, ours.decoder_blocks)]
    assert seen == ["block", "norm"] and "_enter_kernel" not in launched
    assert all(far(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_layers_that_keep_only_what_enters_them_give_the_same_gradients():
    ours, tokens, gradients = drawn(CRATEMAE, **SMALL | {"depth": 1}, backend="triton"), torch.randn(1, 3, 32), []
    for enable in (False, True):
        ours.zero_grad()
        ours.set_grad_checkpointing(enable)
        ours.decoder_blocks(tokens).sum().backward()
        gradients.append([p.grad.clone() for p in ours.decoder_blocks.parameters()])
    assert all(map(torch.equal, *gradients))


def test_none_masked_is_a_mean_of_nothing_and_all_masked_sees_no_image():
    ours = drawn(CRATEMAE, **SMALL)
    loss, pred, mask = ours(torch.randn(2, 3, 16, 16), 0.0)
    assert loss.isnan() and pred.isfinite().all() and mask.sum() == 0
    _, pred, mask = ours(torch.randn(2, 3, 16, 16), 1.0)
    assert mask.all() and torch.equal(pred[0], pred[1])
    assert ours(torch.randn(2, 3, 16, 16))[2].sum(1).tolist() == [12.0, 12.0]


@pytest.mark.parametrize(
    ("images", "ratio", "error", "words"),
    [
        (torch.zeros(1, 3, 16, 16), 1.5, ValueError, "mask_ratio is 1.5; it must be from 0 to 1"),
        (torch.zeros(1, 3, 16, 16), "most", TypeError, "mask_ratio is 'most'"),
        (torch.zeros(1, 3, 16, 20), 0.5, ValueError, r"shape \(1, 3, 16, 20\); it must be \(batch, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16).double(), 0.5, TypeError, "must be the same"),
    ],
)
def test_images_and_ratios_that_do_not_fit_are_refused_in_a_line(images, ratio, error, words):
    with pytest.raises(error, match=words):
        CRATEMAE(**SMALL)(images, ratio)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"embed_dim": 30}, ValueError, "embed_dim is 30; it must be a multiple of 4"),
        ({"num_heads": 3}, ValueError, "num_heads is 3; it must divide embed_dim, 32"),
        ({"decoder_embed_dim": 16}, ValueError, "decoder_embed_dim is 16; it must be embed_dim, 32"),
        ({"img_size": (16, 32)}, ValueError, "both must be squares"),
        ({"decoder_depth": 2.0}, TypeError, "decoder_depth is 2.0; it must be an integer"),
        ({"lambd": -1.0}, ValueError, "lambd is -1.0; it must be at least 0"),
        ({"depth": 10**9}, ValueError, "at most"),
        ({"patch_size": 1, "in_chans": 1, "norm_pix_loss": True}, ValueError, "a patch of one value has no deviation"),
    ],
)
def test_what_no_model_is_made_of_is_refused_in_a_line(options, error, words):
    with pytest.raises(error, match=words):
        CRATEMAE(**SMALL | options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: m(x, 0.5, [[0.1]]), TypeError, "noise is a list; it must be a tensor"),
        (lambda m, x: m(x, 0.5, torch.rand(1, 9)), ValueError, r"noise has shape \(1, 9\) on cpu; it must be .* \(1, 16\)"),
        (lambda m, x: m(x, 0.5, torch.rand(1, 16, device="meta")), ValueError, r"on meta; it must be .* on cpu"),
        (lambda m, x: m.patchify(x[..., 1:]), ValueError, r"\(1, 3, 16, 15\), which patches of 4×4 do not divide"),
        (lambda m, x: m.unpatchify(torch.rand(1, 15, 48)), ValueError, r"shape \(1, 15, 48\) make no square image"),
        (lambda m, x: m.unpatchify(torch.rand(1, 16, 47)), ValueError, r"it must be \(batch, side², 16 · channels\)"),
        (lambda m, x: m.get_last_key_enc(x, 1.5), ValueError, "layer is 1.5; it must be a whole number"),
    ],
)
def test_what_a_method_does_not_take_is_refused_in_a_line(call, error, words):
    with pytest.raises(error, match=words):
        call(CRATEMAE(**SMALL), torch.zeros(1, 3, 16, 16))


def test_patches_come_back_as_the_image_they_were():
    ours, images = CRATEMAE(**SMALL), torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.patchify(images), reference.Patches(4, 4)(images))
    assert torch.equal(ours.unpatchify(ours.patchify(images)), images)


def test_attention_and_keys_of_images_of_other_sizes():
    ours = CRATEMAE(**SMALL).eval()
    attention = ours.get_selfattention_enc(torch.randn(2, 3, 24, 20), 1)
    assert attention.shape == (2, 2, 31, 31) and torch.allclose(attention.sum(-1), torch.ones(()))
    assert ours.get_last_key_enc(torch.randn(2, 3, 16, 16), 0).shape == (2, 17, 32)
    with pytest.raises(ValueError, match="layer is 2; it must be a whole number from 0 to 1"):
        ours.get_last_key_enc(torch.randn(2, 3, 16, 16), 2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_weights_tell_their_size_by_their_shapes(name, tmp_path, capsys):
    with torch.device("meta"):
        weights = getattr(crate_fast, f"mae_crate_{name}")().state_dict()
    assert sum(value.numel() for value in weights.values()) == PARAMETERS[name] and len(weights) == 206
    torch.save(
        {"model": {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in weights.items()}}, tmp_path / "x.pth"
    )
    loaded = load_checkpoint(tmp_path / "x.pth", lambd=5.0)
    own = crate_fast.sizes.MAE_SIZES[name]
    assert type(loaded) is CRATEMAE and (loaded.heads, loaded.depth) == (own["num_heads"], own["depth"])
    assert loaded.blocks[3].layers[0][1].fn.lambd == 5.0 and not loaded.decoder_pos_embed.requires_grad
    said = capsys.readouterr().err
    assert "taken as published" in said and f"num_heads={own['num_heads']}" in said and "lambd" not in said


@pytest.mark.parametrize("kind", ["bare", "model", "wrapped", "safetensors", "checkpoint"])
def test_weights_are_read_wherever_they_lie(kind, tmp_path):
    ours, path = moved(drawn(CRATEMAE, **SMALL, decoder_depth=1, lambd=5.0)).eval(), tmp_path / "x.pth"
    weights, said = ours.state_dict(), {"heads": 2, "lambd": 5.0}
    if kind in ("safetensors", "checkpoint"):
        path, said = tmp_path / "x.safetensors" if kind == "safetensors" else path, {}
        (save_model if kind == "safetensors" else save_checkpoint)(ours, path)
    else:
        wrapped = {f"module.{key}": value for key, value in weights.items()}
        torch.save({"bare": weights, "model": {"model": weights, "epoch": 1}, "wrapped": {"model": wrapped}}[kind], path)
    loaded, images = load_checkpoint(path, **said), torch.randn(1, 3, 16, 16)
    assert not loaded.training and all(
        torch.equal(a, b) for a, b in zip(trained(loaded, images)[:3], trained(ours, images)[:3], strict=True)
    )


def test_weights_that_make_none_are_refused_in_a_line(tmp_path, capsys):
    weights, path = CRATEMAE(**SMALL).state_dict(), tmp_path / "x.pth"
    changes = {
        "say heads": weights,
        "1 weights are missing, 'norm.bias'": {key: value for key, value in weights.items() if key != "norm.bias"},
        "do not belong to the model, 'blocks.0.attn.qkv.weight'": weights | {"blocks.0.attn.qkv.weight": torch.zeros(2)},
        "no weights of a CRATE-MAE: it has no 'mask_token'": {key: v for key, v in weights.items() if key != "mask_token"},
        "'cls_token' is no tensor of real floating point": weights | {"cls_token": torch.zeros(1, 1, 32, dtype=torch.int64)},
        "make no CRATE-MAE; both must be squares": weights | {"decoder_pos_embed": torch.zeros(1, 18, 32)},
    }
    for words, content in changes.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words) as info:
            load_checkpoint(path, **{} if words == "say heads" else {"heads": 2})
        assert "\n" not in str(info.value)
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match="it holds a CRATE-MAE, which has no pool"):
        load_checkpoint(path, heads=2, pool="mean")
    with pytest.raises(TypeError, match="takes no colour"):
        load_checkpoint(path, colour=2)
    assert call(capsys, "evaluate", path)[0] == 2
    with pytest.raises(CheckpointError, match="tells no classes apart"):
        crate_fast.load(path)


def test_files_say_what_arguments_do_and_nothing_is_written_that_would_not_come_back(tmp_path, capsys):
    save_model(CRATEMAE(**SMALL, norm_pix_loss=True, lambd=5.0), tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors", backend="torch")
    assert (loaded.norm_pix_loss, loaded.blocks.backend, capsys.readouterr().err) == (True, "torch", "")
    assert call(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.pth", "--layout", "model")[0] == 0
    assert load_checkpoint(tmp_path / "b.pth").blocks[0].layers[0][1].fn.lambd == 5.0
    with pytest.raises(ValueError, match="'norm' has eps 1e-05; as it is built, 1e-06"):
        save_model(CRATEMAE(**SMALL, norm_layer=torch.nn.LayerNorm), tmp_path / "c.safetensors")


@pytest.mark.parametrize("bare", [True, False])
def test_a_crate_starts_from_its_encoder_once_the_threshold_is_said(bare, tmp_path):
    mae, path = moved(drawn(CRATEMAE, **SMALL, lambd=5.0)), tmp_path / "x.pth"
    torch.save({"model": mae.state_dict()}, path) if bare else save_checkpoint(mae, path)
    with pytest.raises(CheckpointError, match=r"--lambd 0\.5, as published" if bare else r"--lambd 5\.0"):
        start_from(CRATE(**CLASSIFIER), read_weights(path), path)
    model = CRATE(**CLASSIFIER, lambd=5.0)
    line = start_from(model, read_weights(path), path)
    assert "24 weights loaded, position embeddings resampled; new: the head (4); of a CRATE-MAE: its encoder" in line
    tokens = torch.randn(2, 17, 32)
    assert torch.equal(model.transformer(tokens), mae.blocks(tokens))
    images = torch.randn(1, 3, 16, 16)
    patches = model.to_patch_embedding[0](images)
    torch.testing.assert_close(model.to_patch_embedding[2](patches), mae.patch_embed(images), rtol=1e-5, atol=1e-5)


def test_a_frozen_one_takes_what_it_takes_and_no_graph_is_recorded_of_one(monkeypatch):
    ours, images, noise = drawn(CRATEMAE, **SMALL).eval(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected = ours(images, 0.5, noise)
    assert all(map(torch.equal, crate_fast.freeze(ours)(images, mask_ratio=0.5, noise=noise), expected))
    monkeypatch.setattr(cuda_graph, "record", lambda call, images: call(images))  # as on a GPU, before it records
    for model in (ours, crate_fast.freeze(ours)):
        with pytest.raises(TypeError, match=r"makes one tensor of images; this \w+ makes a tuple"):
            cuda_graph.Graphed(model, images)


def test_an_encoder_that_is_not_whole_or_another_starts_no_crate(tmp_path):
    weights, path = CRATEMAE(**SMALL).state_dict(), tmp_path / "x.pth"
    of_vit = {key: value for key, value in weights.items() if not key.startswith("blocks.")}
    for words, content in {
        "1 weights of its encoder are missing, 'blocks.1.layers.0.1.fn.weight'": {
            key: value for key, value in weights.items() if key != "blocks.1.layers.0.1.fn.weight"
        },
        "weights of its encoder are missing, 'blocks.0.": of_vit | {"blocks.0.attn.qkv.weight": torch.zeros(96, 32)},
        "weights of its encoder are missing, 'blocks.1.": {k.replace("blocks.1", "blocks.3"): v for k, v in weights.items()},
        "1 weights are of no encoder of a CRATE-MAE, 'blocks.0.gamma'": weights | {"blocks.0.gamma": torch.ones(32)},
    }.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words):
            read_weights(path)
    alone = CRATEMAE(**ONE).state_dict()
    torch.save(alone, path)
    assert len(read_weights(path).weights) == 14


@pytest.mark.parametrize("options, words", [({"lambd": 5.0}, r"--lambd 5\.0"), ({"num_heads": 4}, "--heads 4")])
def test_what_a_file_states_and_shapes_do_not_tell_is_not_passed_over(options, words, tmp_path):
    save_model(CRATEMAE(**SMALL | options), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"in this run, which may start from it with {words}"):
        go_on_from(CRATEMAE(**SMALL), tmp_path / "x.safetensors")
    assert "46 weights loaded" in go_on_from(CRATEMAE(**SMALL | options), tmp_path / "x.safetensors")
