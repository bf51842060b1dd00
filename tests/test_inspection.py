"""What `crate_fast.inspection` shows, against the reference and against computations the long way."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_module
from scipy.ndimage import binary_fill_holes
from sklearn.decomposition import PCA

from crate_fast import CRATE, CRATE_small, inspection, reference
from crate_fast.inspection import InspectionError
from crate_fast.model.positions import resample_positions

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 10, "dim": 48, "depth": 3, "heads": 3, "dim_head": 16}
VARIANTS = {
    "small": {},
    "mean pool": {"pool": "mean", "channels": 1},
    "no projection back": {"heads": 1, "dim_head": 48},
    "more dimensions than tokens": {"heads": 2, "dim_head": 32, "image_size": 8},
}


def pair(seed=0, **options):
    """A CRATE and its reference with the same weights, both in evaluation mode, and images."""
    torch.manual_seed(seed)
    model = CRATE(**SMALL | options).eval()
    twin = reference.CRATE(**SMALL | options).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin, torch.randn(3, model.channels, *model.image_size)


def watched(twin, images):
    """By layer what the published hooks see: (output of qkv, output of the second module), and Z^{ℓ+1/2}."""
    return watched_layers(twin.transformer.layers, lambda: twin(images))


def watched_layers(layers, run):
    """The same of `layers` while something runs them."""
    seen = []
    hooks = []
    for mssa, ista in layers:
        hooks.append(mssa.fn.qkv.register_forward_hook(lambda _, __, out: seen.append([out])))
        hooks.append(ista.register_forward_hook(lambda _, inputs, out: seen[-1].extend([inputs[0], out])))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def long_rate(tokens):
    """½ logdet(I + p/(m·0.01)·XXᵀ) in float64 with the m×m matrix, by NumPy: PyTorch's logdet errs with some MKLs."""
    x = tokens.double()
    length = x.norm(dim=-1, keepdim=True)
    x = torch.where(length == 0, 0.0, x / length)
    m, p = x.shape[-2:]
    return torch.from_numpy(np.linalg.slogdet(np.eye(m) + p / (m * 0.01) * (x @ x.mT).numpy()).logabsdet / 2)


def assert_measures_are_right(model, twin, images):
    measures = inspection.measure_layers(model, images)
    assert_measures_are_of(measures, twin.transformer.layers, watched(twin, images))
    assert measures.rate.shape == (model.transformer.depth, len(images))


def assert_measures_are_of(measures, layers, seen):
    """`measures` are what the long way makes of what hooks have `seen` of `layers`."""
    for index, (w, z, x) in enumerate(seen):
        mssa, _ = layers[index]
        heads = mssa.fn.heads
        after = mssa.fn.qkv(mssa.norm(z)).detach()
        split = [v.unflatten(-1, (heads, -1)).transpose(1, 2) for v in (w, after)]
        torch.testing.assert_close(measures.subspace_rate[index], long_rate(split[0]).sum(-1), rtol=1e-5, atol=0)
        torch.testing.assert_close(measures.compressed_rate[index], long_rate(split[1]).sum(-1), rtol=1e-5, atol=0)
        torch.testing.assert_close(measures.rate[index], long_rate(x), rtol=1e-5, atol=0)
        assert measures.nonzero[index].tolist() == [(one != 0).double().mean().item() for one in x]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_measures(options, backend):
    model, twin, images = pair(**options)
    for layer in model.transformer.layers:
        layer[0].fn.backend = layer[1].fn.backend = backend
    if backend == "reference":  # the same sums in the same order: the same zeros
        model, twin, images = model.double(), twin.double(), images.double()
        assert_measures_are_right(model, twin, images)
    else:
        assert_measures_are_right(model, model, images)


def test_measures_of_crate_small():
    torch.manual_seed(0)
    model = CRATE_small().eval()
    assert_measures_are_right(model, model, torch.randn(1, 3, 224, 224))


def test_kernels_show_the_same():
    """In Triton's interpreter."""
    model, _, images = pair(depth=1)
    plain = inspection.measure_layers(model, images)
    for layer in model.transformer.layers:
        layer[0].fn.backend = layer[1].fn.backend = "triton"
    for one, other in zip(plain, inspection.measure_layers(model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_published_coding_rate(request):
    """Rates and deviation of the published script, where it is at hand; its formula, on two threads of thought, where not."""
    model, _, images = pair()
    measured = inspection.measure_layers(model, images).rows()
    directory = request.config.getoption("published")
    for row, (w, _, _) in zip(measured, watched(model, images), strict=True):
        split = w.unflatten(-1, (3, -1)).transpose(1, 2)
        if directory:
            mean, deviation = load_module(Path(directory) / "vis_utils" / "coding_rate.py").CodingRate()(split)
        else:
            rates = long_rate(split).sum(-1)
            mean, deviation = rates.mean(), rates.std()
        assert row["subspace_rate_mean"] == pytest.approx(mean.item(), rel=1e-5)
        assert row["subspace_rate_std"] == pytest.approx(deviation.item(), rel=1e-3)


def test_one_image_has_no_deviation():
    model, _, images = pair()
    rows = inspection.measure_layers(model, images[:1]).rows()
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert all(row[f"{name}_std"] == 0 for row in rows for name in inspection.Measures._fields)


def test_batches_are_one_set():
    model, _, images = pair()
    whole = inspection.measure_layers(model, images)
    parts = inspection.measure_layers(model, iter([images[:1], images[1:1], images[1:]]))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 5, 3),
        torch.tensor([[0.0, 0.0], [3.0, 4.0]]),
        torch.full((4, 2), 3e38),
        torch.full((4, 2), 1e-45),
        torch.full((4, 2), 1e300, dtype=torch.float64),
        torch.full((4, 2), 5e-324, dtype=torch.float64),
        torch.ones(7, 1),
        torch.randn(3, 4).half(),
        torch.zeros(2, 0, 3),
        torch.zeros(0, 4, 3),
    ],
    ids=[
        "zeros",
        "one zero",
        "float32's largest",
        "float32's least",
        "1e300",
        "float64's least",
        "width 1",
        "half",
        "no tokens",
        "none",
    ],
)
def test_rates_of_any_tokens_are_finite(tokens):
    rate = inspection.coding_rate(tokens)
    assert rate.shape == tokens.shape[:-2] and rate.dtype == torch.float64 and rate.isfinite().all() and (rate >= 0).all()


def test_rate_by_hand():
    orthogonal = torch.diag(torch.tensor([2.0, 7.0, 0.5]))
    assert inspection.coding_rate(orthogonal).item() == pytest.approx(
        1.5 * torch.tensor(101.0, dtype=torch.float64).log().item()
    )
    same = torch.tensor([[1.0, 2.0]]).expand(5, 2)
    assert inspection.coding_rate(same).item() == pytest.approx(0.5 * torch.tensor(201.0, dtype=torch.float64).log().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_are_refused(bad):
    model, _, images = pair()
    images[0, 0, 0, 0] = bad
    with pytest.raises(InspectionError, match="layer 1: the tokens are not finite"):
        inspection.measure_layers(model, images)


@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was(training):
    model, _, images = pair(dropout=0.5, emb_dropout=0.5)
    model.train(training)
    model.transformer.layers[1].train(not training)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measures = inspection.measure_layers(model, images)
    first = inspection.attention_maps(model, images, [0])
    assert torch.equal(first, inspection.attention_maps(model, images)[:1])  # stopped early the first time
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules()) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters()) and not measures.rate.requires_grad
    again = inspection.measure_layers(model.eval(), images)
    assert all(torch.equal(one, other) for one, other in zip(measures, again, strict=True))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_attention_is_the_reference_matrix(options):
    model, twin, images = pair(**options)
    maps = inspection.attention_maps(model, images)
    heads = model.transformer.heads
    for (w, _, _), shown in zip(watched(twin, images), maps, strict=True):
        split = w.unflatten(-1, (heads, -1)).transpose(1, 2)
        matrix = reference.attention_probabilities(split)
        for token in (0, 2):
            row = inspection.attention_row(w, heads, token=token)
            torch.testing.assert_close(row, matrix[:, :, token], rtol=0, atol=1e-6)
        torch.testing.assert_close(shown.flatten(-2), matrix[:, :, 0, 1:], rtol=0, atol=1e-6)
    assert maps.shape == (3, 3, heads, *(side // 4 for side in model.image_size))


def test_views_of_other_sizes():
    model, _, images = pair()
    larger = torch.randn(2, 3, 24, 32)
    maps = inspection.attention_maps(model, larger, [-1, 0])
    assert maps.shape == (2, 2, 3, 6, 8) and (maps > 0).all() and (maps.sum((-2, -1)) < 1).all()
    grown = CRATE(**SMALL | {"image_size": (24, 32)}).eval()
    weights = model.state_dict()
    weights["pos_embedding"] = resample_positions(weights["pos_embedding"], (4, 4), (6, 8))
    grown.load_state_dict(weights)
    assert torch.equal(inspection.attention_maps(grown, larger, [-1, 0]), maps)
    assert inspection.patch_projections(model, larger).shape == (2, 6, 8, 48)
    with pytest.raises(ValueError, match="24×30"):
        inspection.attention_maps(model, larger[..., :30])
    with pytest.raises(ValueError, match="3, height"):
        inspection.measure_layers(model, images[:, :1])
    with pytest.raises(TypeError, match="int64"):
        inspection.measure_layers(model, images.long())
    with pytest.raises(TypeError, match="the images are a ndarray"):
        inspection.attention_maps(model, images.numpy())
    with pytest.raises(TypeError, match="Linear"):
        inspection.measure_layers(torch.nn.Linear(2, 2), images)
    with pytest.raises(InspectionError, match="layer is 3; the model has 3"):
        inspection.attention_maps(model, images, [3])
    with pytest.raises(InspectionError, match="no images"):
        inspection.measure_layers(model, images[:0])
    with pytest.raises(InspectionError, match="no layers"):
        inspection.measure_layers(pair(depth=0)[0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_resampled_positions(dtype):
    torch.manual_seed(0)
    embedding = torch.randn(1, 13, 5).to(dtype)
    assert resample_positions(embedding, (3, 4), (3, 4)) is embedding
    for grid in ((6, 4), (2, 4), (1, 1), (30, 30)):
        moved = resample_positions(embedding, (3, 4), grid)
        assert moved.shape == (1, 1 + grid[0] * grid[1], 5) and moved.dtype == dtype
        assert torch.equal(moved[:, 0], embedding[:, 0])
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64).view(1, 1, 8).expand(1, 8, 8).reshape(1, 64, 1)
    ramp = torch.cat((torch.zeros(1, 1, 1, dtype=torch.float64), ramp), dim=1)
    moved = resample_positions(ramp, (8, 8), (16, 16))[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(moved, moved[:1].expand(16, 16))  # rows stay rows
    assert (moved[0].diff() > 0).all()
    with pytest.raises(ValueError, match="3×5"):
        resample_positions(embedding, (3, 5), (3, 4))


def test_mask_keeps_the_fewest_patches_of_the_mass():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 4, 5)
    for mass in (0.01, 0.6, 0.95, 1.0):
        kept = inspection.keep_mass(maps, mass)
        assert kept.shape == maps.shape and kept.dtype == torch.bool
        for one, mask in zip(maps.flatten(0, 1), kept.flatten(0, 1), strict=True):
            inside, total = one[mask].double(), one.double().sum()
            assert inside.sum() >= mass * total * (1 - 1e-12)
            assert inside.sum() - inside.min() < mass * total
            assert mask.all() or inside.min() >= one[~mask].max()
    assert not inspection.keep_mass(torch.zeros(2, 2)).any()
    for odd in (torch.ones(4), -maps, maps * float("nan")):
        with pytest.raises(InspectionError, match="each value finite and at least 0"):
            inspection.keep_mass(odd)
    for mass in (0, -1, 1.01, float("nan")):
        with pytest.raises(InspectionError, match=f"mass is {mass}"):
            inspection.keep_mass(maps, mass)


def test_principal_colours():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    drawn = torch.randn(60, 16)
    uncorrelated = torch.linalg.qr(drawn - drawn.mean(0)).Q
    hidden = uncorrelated * torch.tensor([9.0, 6.0, 4.0] + [0.01] * 13)
    images = [(hidden @ axes.T)[:40].view(5, 8, 16), (hidden @ axes.T)[40:].view(4, 5, 16)]
    colours = inspection.principal_colours(images)
    assert [colour.shape for colour in colours] == [(5, 8, 3), (4, 5, 3)]
    found = torch.cat([colour.flatten(0, 1) for colour in colours])
    assert torch.equal(found.amin(0), torch.zeros(3)) and torch.equal(found.amax(0), torch.ones(3).double())
    for index in range(3):
        correlation = torch.corrcoef(torch.stack((found[:, index], hidden[:, index].double())))[0, 1]
        assert abs(correlation) > 0.9999
    assert torch.equal(inspection.principal_colours([torch.ones(2, 2, 4)])[0], torch.full((2, 2, 3), 0.5).double())
    assert inspection.principal_colours([torch.randn(2, 2, 2)])[0].shape == (2, 2, 3)
    with pytest.raises(InspectionError, match="no images"):
        inspection.principal_colours([])
    with pytest.raises(InspectionError, match="not finite"):
        inspection.principal_colours([torch.full((1, 1, 4), float("nan"))])


@pytest.mark.parametrize("masked", [False, True])
def test_principal_components_are_those_of_the_published_views(masked):
    """scikit-learn's, which pca_visualization asks, of all patches or of those that a mask keeps."""
    torch.manual_seed(0)
    images = [torch.randn(5, 8, 12) * torch.arange(1, 13), torch.randn(4, 5, 12) * torch.arange(1, 13)]
    masks = [torch.rand(each.shape[:2]) < 0.6 for each in images] if masked else None
    found = inspection.principal_components(images, 5, masks)
    rows = torch.cat([each.flatten(0, 1) for each in images])
    kept = torch.cat([mask.flatten() for mask in masks]) if masks else torch.ones(len(rows), dtype=torch.bool)
    expected = PCA(5, svd_solver="full").fit_transform(rows[kept].double().numpy())
    flat = torch.cat([each.flatten(0, 1) for each in found])
    assert flat[~kept].isnan().all()
    np.testing.assert_allclose(flat[kept].abs().numpy(), np.abs(expected), rtol=1e-8, atol=1e-8)
    colours = torch.cat([each.flatten(0, 1) for each in inspection.principal_colours(images, masks)])
    assert (colours[~kept] == 0).all() and colours[kept].amax() == 1
    for wrong in ({"count": 0}, {"masks": [torch.zeros(5, 8).bool(), torch.zeros(4, 5).bool()]}, {"masks": [images[0] > 0]}):
        with pytest.raises(InspectionError):
            inspection.principal_components(images, **wrong)


@pytest.mark.parametrize("below", [False, True])
def test_the_foreground_is_that_of_the_published_views(below):
    """Of plot_pca_mask: a side of the middle of the first component, each image's own, its holes filled."""
    torch.manual_seed(0)
    images = [torch.randn(40, 30, 6) * torch.tensor([9.0, 1, 1, 1, 1, 1]), torch.randn(30, 20, 6)]
    masks, holes = inspection.foreground_masks(images, below=below), 0
    for component, mask in zip(inspection.principal_components(images, 1), masks, strict=True):
        share = (component[..., 0] - component.min()) / (component.max() - component.min())
        side = share < 0.5 if below else share > 0.5
        assert np.array_equal(mask.numpy(), binary_fill_holes(side.numpy()))
        holes += int(mask.sum() - side.sum())
    assert holes > 0


@pytest.mark.slow
def test_large_images_fit_in_memory():
    """14,401 tokens; scores and probabilities of all of them for two heads would take 3.3 GB."""
    script = """
import resource, torch
from crate_fast import CRATE, inspection
torch.set_num_threads(2)
model = CRATE(image_size=224, patch_size=8, num_classes=10, dim=128, depth=1, heads=2, dim_head=64)
images = torch.randn(1, 3, 960, 960)
measures = inspection.measure_layers(model, images)
maps = inspection.attention_maps(model, images)
assert maps.shape == (1, 1, 2, 120, 120) and measures.rate.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    assert int(done.stdout) * unit < 3 * 10**9
