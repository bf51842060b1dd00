"""CRATE as a module: the published class's weights and numbers, hooks, caches, and what PyTorch users do with a model."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import crate_fast
from crate_fast import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny, reference
from crate_fast.kernels import runtime
from crate_fast.model import SIZES

SMALL = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)
CONFIGURATIONS = {
    "oblong": SMALL | {"image_size": (12, 8), "patch_size": (3, 4)},
    "one head as wide as the model": SMALL | {"heads": 1, "dim_head": 32},
    "head width 48": SMALL | {"dim": 96, "dim_head": 48},
    "mean": SMALL | {"pool": "mean"},
    "one channel": SMALL | {"channels": 1},
    "another step size": SMALL | {"ista": 0.3},
}
configurations = pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
TRITON = {"backend": "triton"}


def build(cls=CRATE, seed=0, **options):
    torch.manual_seed(seed)
    return cls(**(SMALL | options))


def images(model, count=2, dtype=torch.float32):
    height, width = model.image_size
    return torch.randn(count, model.channels, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def gradients(model, x):
    model.zero_grad()
    model(x).float().square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def launches(run) -> Counter:
    """How often each kernel is launched by `run()`."""
    seen = Counter()
    with runtime.observed(lambda kernel, *_: seen.update([kernel.fn.__name__])):
        run()
    return seen


@configurations
def test_weights_are_the_published_ones_bit_by_bit(published_class, options):
    torch.manual_seed(3)
    published = published_class(**options).state_dict()
    torch.manual_seed(3)
    ours = CRATE(**options).state_dict()
    assert list(ours) == list(published)
    assert all(torch.equal(ours[name], published[name]) for name in published)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [(CRATE_tiny, 6_090_856), (CRATE_small, 13_116_328), (CRATE_base, 22_796_008), (CRATE_large, 77_641_192)],
)
def test_the_published_sizes(factory, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in factory().parameters()) == parameters


def test_a_size_of_the_table_is_built_by_its_name(monkeypatch):
    assert {f"CRATE_{size}" for size in SIZES} <= {*dir(crate_fast)}  # which reads the table when it is imported
    monkeypatch.setitem(SIZES, "micro", dict(dim=192, depth=2, heads=3, dim_head=64))
    assert crate_fast.model.CRATE_micro(num_classes=7, image_size=32).transformer.dim == 192
    for module in (crate_fast, crate_fast.model):
        for name in ("CRATE_nano", "micro", "CRATE"[:4]):
            with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute '{name}'"):
                getattr(module, name)


@configurations
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float64_agrees_with_the_published_class(published_class, options, backend):
    torch.manual_seed(0)
    published = published_class(**options).double()
    torch.manual_seed(0)
    ours = CRATE(**options, backend=backend).double()
    x = images(ours, 3, torch.float64)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-12, atol=1e-13)
    published(x).square().sum().backward()
    ours(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), published.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-12 * q.grad.norm(), name


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_dropout_draws_and_drops_as_published(backend):
    options = SMALL | {"dropout": 0.3, "emb_dropout": 0.2}
    ours, published = build(**options, backend=backend), build(reference.CRATE, **options)
    outputs = []
    for model in (ours, published):
        torch.manual_seed(1)
        outputs.append(model(images(ours)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours(images(ours)), outputs[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_smaller_images_use_the_first_positions(backend):
    ours, published = build(image_size=16, backend=backend), build(reference.CRATE, image_size=16)
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-5, atol=1e-6)


def test_a_layer_is_four_kernels_forward_and_eight_backward():
    model = build(**TRITON)
    x = images(model)
    forward = launches(lambda: model.eval()(x))
    del forward["_prepare_kernel"]
    assert forward.pop("_enter_kernel") == 1  # once a stack
    assert sum(forward.values()) <= 4 * SMALL["depth"]
    loss = model.train()(x).sum()
    backward = launches(loss.backward)
    assert backward.pop("_leave_kernel") == 1  # once a stack
    assert backward.pop("_finish_kernel") == SMALL["depth"]  # on weights alone
    assert sum(backward.values()) <= 8 * SMALL["depth"]
    assert "_prepare_kernel" not in backward


WATCHED = {
    "qkv": lambda m: m.transformer.layers[1][0].fn.qkv,
    "ista block": lambda m: m.transformer.layers[0][1],
    "softmax": lambda m: m.transformer.layers[0][0].fn.attend,
    "transformer": lambda m: m.transformer,
}


@pytest.mark.parametrize("autocast", [None, torch.float16])  # the interpreter does not multiply bfloat16
@pytest.mark.parametrize("watched", WATCHED)
def test_forward_hooks_see_what_the_published_module_gives(watched, autocast):
    ours, published = build(**TRITON), build(reference.CRATE)
    seen = []
    for model in (published, ours):
        handle = WATCHED[watched](model).register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        if watched == "softmax" and model is published:
            seen.append(None)  # the transcription takes its softmax as a function
        else:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                model(images(ours))
        handle.remove()
    expected, got = seen
    if expected is None:
        torch.testing.assert_close(got.float().sum(-1), torch.ones(got.shape[:-1]), rtol=0, atol=2e-2)
        assert got.shape[-1] == got.shape[-2] == 5
        return
    assert got.dtype == expected.dtype
    tolerance = 1e-5 if autocast is None else 3e-2
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_hooks_of_every_kind_leave_the_fused_path_and_their_removal_takes_it_again():
    model = build(**TRITON)
    x, fused = images(model), 2 * 4
    qkv = model.transformer.layers[0][0].fn.qkv

    def token_kernels() -> int:
        counts = launches(lambda: model(x).sum().backward)
        return sum(counts.values()) - sum(counts[name] for name in ("_enter_kernel", "_prepare_kernel", "_finish_kernel"))

    assert token_kernels() == fused
    fired = []
    for register in (
        lambda: qkv.register_forward_hook(lambda *_: fired.append("forward")),
        lambda: qkv.register_forward_pre_hook(lambda *_: fired.append("pre")),
        lambda: qkv.register_full_backward_hook(lambda *_: fired.append("backward")),
        lambda: register_module_forward_hook(lambda module, *_: fired.append("global") if module is qkv else None),
    ):
        handle = register()
        before = len(fired)
        model(x).sum().backward()
        assert len(fired) == before + 1
        handle.remove()
    assert fired == ["forward", "pre", "backward", "global"]
    assert token_kernels() == fused


def test_changed_modules_are_not_passed_by():
    x, plain = images(build()), build()
    expected = plain(x)

    class Doubling(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrised = build(**TRITON)
    parametrize.register_parametrization(parametrised.transformer.layers[0][0].fn.qkv, "weight", Doubling())
    pruned = build(**TRITON)
    prune.l1_unstructured(pruned.transformer.layers[0][1].fn, "weight", 0.5)
    patched = build(**TRITON)
    attention = patched.transformer.layers[0][0].fn
    attention.forward = lambda tokens: torch.zeros_like(tokens)
    for model in (parametrised, pruned, patched):
        assert not torch.allclose(model(x), expected, rtol=1e-3)
    prune.remove(pruned.transformer.layers[0][1].fn, "weight")
    same = build(reference.CRATE)
    same.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(pruned(x), same(x), rtol=1e-5, atol=1e-6)


CHANGES = {
    "in place": lambda m: [p.mul_(1.5) for p in m.transformer.parameters()],
    "data, then eval": lambda m: ([p.data.mul_(1.5) for p in m.transformer.parameters()], m.eval()),
    "load_state_dict": lambda m: m.load_state_dict(build(seed=9).state_dict()),
    "load and assign": lambda m: m.load_state_dict(build(seed=9).state_dict(), assign=True),
    "to and back": lambda m: (m.double(), [p.mul_(1.5) for p in m.parameters()], m.float()),
    "another step size": lambda m: setattr(m.transformer.layers[0][1].fn, "step_size", 0.5),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_evaluation_keeps_is_never_stale(change, backend):
    model = build(backend=backend).eval()
    x = images(model)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        CHANGES[change](model)
        after = model(x)
        fresh = build(reference.CRATE).eval()
        fresh.load_state_dict(model.state_dict())
        fresh.transformer.layers[0][1].fn.step_size = model.transformer.layers[0][1].fn.step_size
        assert not torch.allclose(after, before, rtol=1e-4)
        torch.testing.assert_close(after, fresh(x), rtol=1e-5, atol=1e-6)


@configurations
def test_evaluation_gives_the_same_bits_as_the_differentiated_path(options):
    model = build(**options, backend="torch").eval()
    x = images(model)
    for image in (x, x.transpose(2, 3).contiguous().transpose(2, 3), x[..., : model.patch_size[1]]):
        with torch.inference_mode():
            inside = model(image)
        assert torch.equal(model(image).detach(), inside)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inference_mode_then_gradients(backend):
    model = build(backend=backend).eval()
    x = images(model)
    with torch.inference_mode():
        inside = model(x)
        made_inside = build(backend=backend).eval()
        assert torch.equal(made_inside(x), inside)
        made_inside.transformer.layers[0][1].fn.weight.mul_(2)
        assert not torch.equal(made_inside(x), inside)
    assert torch.equal(model(x).detach(), inside)
    expected = gradients(build(reference.CRATE), x)
    for got, want in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_evaluated_layers_take_strides_and_nan_as_they_come(backend):
    model, published = build(backend=backend).eval(), build(reference.CRATE).eval()
    x = torch.randn(7, 3, 32).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.transformer(x), published.transformer(x), rtol=1e-5, atol=1e-6)
        x[0, 2, 5] = float("nan")
        out = model.transformer(x)
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_copies_and_pickles_compute_the_same(backend):
    model = build(backend=backend).eval()
    x = images(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.transformer.layers[0][1].fn.weight.mul_(2)
        assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_frozen_parameters_accumulation_and_checkpointing(backend):
    model = build(backend=backend)
    x = images(model)
    expected = gradients(model, x)
    model(x).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)

    model.zero_grad()
    forward = model.transformer.run
    model.transformer.run = lambda tokens, pool: checkpoint(forward, tokens, pool, use_reentrant=False)
    for got, want in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(got, want)
    del model.transformer.run

    frozen = model.transformer.layers[1]
    frozen.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    for name, got, want in zip(names, gradients(model, x), expected, strict=True):
        assert got is None if name.startswith("transformer.layers.1.") else torch.equal(got, want)


@pytest.mark.parametrize(
    "backend, pool, autocast",
    [
        ("torch", "cls", None),
        ("torch", "mean", torch.bfloat16),
        ("reference", "cls", torch.bfloat16),
        ("triton", "cls", torch.float16),
    ],
)
def test_checkpointed_layers_give_the_same_gradients_and_keep_what_enters_them(backend, pool, autocast):
    """Whatever is drawn in them is drawn again."""
    drawing = {} if backend == "triton" else {"dropout": 0.2, "drop_path": 0.5}
    model = build(backend=backend, pool=pool, **drawing)
    x, found = images(model), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits, kept = kept_bytes(model, x)
        model.zero_grad()
        logits.float().square().sum().backward()
        found.append(([p.grad.clone() for p in model.parameters()], kept))
    (expected, all_kept), (again, kept) = found
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)) and kept < 0.7 * all_kept
    with torch.no_grad():
        assert torch.equal(model.eval()(x), build(backend=backend, pool=pool).eval()(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_dropped_path_is_a_layer_without_its_step_of_compression(backend):
    """For each image by itself: the last layer of x is ISTA(x), or ISTA(x + MSSA(x) / share kept); less so in layers before."""
    model = build(backend=backend, depth=3, drop_path=0.5).train()
    assert [layer.drop_path for layer in model.transformer.layers] == [0, 0.25, 0.5] and build(depth=1, drop_path=0.5)
    last, count = model.transformer.layers[2], 8
    x = torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(0)
    found = model.transformer.run(x, "cls", [last])
    without, scaled = last[1](x)[:, 0], last[1](last[0](x) / 0.5 + x)[:, 0]
    left_out, kept = ((found - other).abs().amax(1) < 1e-5 for other in (without, scaled))
    assert (left_out ^ kept).all() and 1 < left_out.sum() < count - 1
    last.drop_path = 1.0
    torch.testing.assert_close(model.transformer.run(x, "cls", [last]), without)
    pixels = images(model)
    assert torch.equal(model.eval()(pixels), build(backend=backend, depth=3).eval()(pixels))


@pytest.mark.parametrize("options", [{}, {"heads": 1, "dim_head": 32, "depth": 1}])
def test_weights_are_drawn_anew_as_the_constructor_draws_them(options):
    """Also those of a model that was made without memory."""
    with torch.device("meta"):
        empty = build(**options)
    model = empty.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(torch.nan)
    torch.manual_seed(3)
    model.reset_parameters()
    for got, want in zip(model.parameters(), build(seed=3, **options).parameters(), strict=True):
        assert torch.equal(got, want) and got.requires_grad


def test_embeddings_are_what_need_not_decay():
    model = build()
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "." not in name}


@pytest.mark.parametrize("stream", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_have_the_autocast_dtype_and_gradients_the_parameters(dtype, stream):
    if stream == "bfloat16" or dtype == torch.bfloat16:
        model = build(backend="torch", stream=stream)  # the interpreter does not multiply bfloat16
    else:
        model = build(backend="triton", stream=stream)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(images(model))
    assert logits.dtype == dtype
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert model(images(model)).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_16_bit_gradients_of_any_size_keep_their_precision(size):
    """A loss a 10-millionth or 10 million times as large has the same gradients, scaled: nothing under- or overflows."""
    model = build(**TRITON)
    x = images(model)
    results = []
    for factor in (1.0, size):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            features = model.transformer(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)))
        (features.double() * factor).sum().backward()
        results.append([p.grad.double() / factor for p in model.transformer.parameters()])
    assert x.dtype == torch.float32
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-3 * a.norm()


def kept_bytes(call, x):
    """(what `call` makes of x, bytes of distinct memory that are kept for its backward pass)."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(x), sum(storages.values())


def test_a_layer_keeps_four_activations_and_small_statistics():
    def kept(depth, batch):
        model = build(depth=depth, dim=64, dim_head=32, stream="float16", **TRITON)
        with torch.autocast("cpu", dtype=torch.float16):
            return kept_bytes(model.transformer, torch.randn(batch, 5, 64))[1]

    (a, b), (c, d) = ([kept(depth, batch) for batch in (2, 4)] for depth in (2, 4))
    per_token_and_layer = ((d - c) - (b - a)) / (2 * 5) / 2
    assert 8 * 64 < per_token_and_layer <= 8 * 64 + 4 * 2 + 64


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_takes_the_whole_model(backend, training, dynamic):
    torch._dynamo.reset()
    model = build(backend=backend).train(training)
    x = images(model)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_compile_takes_the_published_model_whole(published_class, autocast):
    """Without a graph break, which would flatter us where compiled models are compared; in the oldest torch, too."""
    torch._dynamo.reset()
    model, x = build(published_class), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, want = compiled(x), model(x)
    assert got.dtype == want.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(got, want)
    got.sum().backward()


@pytest.mark.slow
def test_compiled_layers_notice_what_changes_afterwards():
    torch._dynamo.reset()
    model = build(backend="triton").train()
    compiled = torch.compile(model, backend="aot_eager")
    x = images(model)
    assert torch.equal(compiled(x), compiled(x))
    model.transformer.layers[0][0].fn.dropout.p = 0.5
    assert not torch.equal(compiled(x), compiled(x))
    model.transformer.layers[0][0].fn.dropout.p = 0.0
    expected = model(x)
    model.transformer.layers[1][0].fn.attend = torch.nn.Softmax(dim=-2)
    model.transformer.layers[1][0].fn.qkv = torch.nn.Linear(32, 32)
    assert not torch.allclose(compiled(x), expected)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_are_bit_identical(backend):
    model = build(backend=backend)
    x = images(model)
    for a, b in zip(gradients(model, x), gradients(model, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_distributed_data_parallel_gives_the_same_gradients(backend, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build(backend=backend)
        x = images(model)
        expected = gradients(model, x)
        parallel = torch.nn.parallel.DistributedDataParallel(build(backend=backend))
        for got, want in zip(gradients(parallel, x), expected, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.distributed.destroy_process_group()


def test_importing_all_gives_the_published_names():
    """As `from model.crate import *` did, called as there."""
    names: dict = {}
    exec("from crate_fast import *", names)
    dim, heads, width = 16, 2, 8
    torch.manual_seed(0)
    ours = names["Transformer"](dim, 1, heads, width, 0.0, ista=0.2)
    torch.manual_seed(0)
    attention = names["PreNorm"](dim, names["Attention"](dim, heads=heads, dim_head=width, dropout=0.0))
    step = names["PreNorm"](dim, names["FeedForward"](dim, dim, dropout=0.0, step_size=0.2))
    x = torch.randn(2, 5, dim)
    torch.testing.assert_close(ours(x), step(attention(x) + x))
    assert names["pair"](3) == (3, 3) and names["pair"]((2, 4)) == (2, 4)
    assert {f"CRATE_{size}" for size in ("tiny", "small", "base", "large")} <= set(names)
