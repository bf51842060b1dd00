"""Shapes of the kernels: every one gives right values; measured ones are stored, found again, and refused when damaged."""

import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from conftest import DTYPES, HALVES

from crate_fast import CRATE, CRATEAlpha, reference
from crate_fast.cache import CACHE_VARIABLE
from crate_fast.commands import tune
from crate_fast.commands.main import main
from crate_fast.device import Compute
from crate_fast.kernels import shapes as kept_shapes
from crate_fast.kernels import tuning
from crate_fast.processes import ALONE
from crate_fast.training import TrainConfig
from crate_fast.training.circumstances import circumstances, warn_of_changes
from ties import recorded, resolved

# 70 tokens: a full block of 64 rows and a narrow one; a head of 80 in two parts; widths that are no multiple of a block
SIZES = {"image_size": (28, 40), "patch_size": 4, "num_classes": 5, "dim": 144, "depth": 2, "heads": 1, "dim_head": 80}
KERNELS = (*tuning.ATTENTION, *tuning.PRODUCTS)  # of CRATE's layers; tests/test_alpha_kernels.py has CRATE-α's


def shapes(kernel: str, dtype: torch.dtype) -> list[tuning.Config]:
    """What the table gives on any architecture and for any width, and what `crate-fast tune` may choose."""
    bits = torch.finfo(dtype).bits
    table = [line.config for line in tuning.TABLE if kernel in line.kernels and line.bits == bits]
    return list(dict.fromkeys([*table, *tuning.candidates(kernel, dtype)]))


INDEXES = range(max(len(shapes(kernel, dtype)) for kernel in KERNELS for dtype in (torch.float16, torch.float32)))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def results(layers, x: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The result of layers and every gradient."""
    out = layers(x)
    with torch.autocast(x.device.type, enabled=False):
        return [out, *torch.autograd.grad(out, tuple(layers.parameters()), cotangent)]


@cache
def pair(device: torch.device, dtype: torch.dtype, dim: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layers, and the published ones in float64."""
    torch.manual_seed(0)
    sizes = SIZES | {"dim": dim}
    layers = CRATE(**sizes, backend="triton", stream=str(dtype).removeprefix("torch.")).transformer.to(device)
    published = reference.CRATE(**sizes).transformer.to(device).double()
    published.load_state_dict(layers.state_dict())
    return layers, published


@pytest.mark.slow
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize(("device", "dtype"), DTYPES, indirect=["device"])
def test_every_shape_gives_right_values(device, dtype, index):
    with ExitStack() as stack:
        for kernel in KERNELS:
            configs = shapes(kernel, dtype)
            stack.enter_context(tuning.forced(kernel, configs[index % len(configs)]))
        check(device, dtype, SIZES["dim"])


@pytest.mark.parametrize("dim", [160, 192])
@pytest.mark.parametrize(("device", "dtype"), HALVES, indirect=["device"])
def test_widths_with_shapes_or_masks_of_their_own_give_right_values(device, dtype, dim):
    """Blocks of which some quarters are there and others not; three accumulators without a mask."""
    check(device, dtype, dim)


def check(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Results and gradients of layers on tokens of a dtype, against float64."""
    layers, published = pair(device, dtype, dim)
    generator = torch.Generator().manual_seed(1)
    x, cotangent = (torch.randn(1, 70, dim, generator=generator, device="cpu").to(device) for _ in range(2))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype.itemsize == 2), recorded() as sides:
        values = results(layers, x, cotangent)
    with resolved(sides, dtype):
        right = results(published, x.double(), cotangent.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert max(map(relative, values, right)) < tolerance


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 103, 120])
def test_the_table_has_every_kernel_and_says_why(architecture):
    device = torch.device("cpu")
    for dtype in (torch.float16, torch.float32):
        with tuning.assumed(architecture):
            assert all(tuning.attention(name, dtype, width, device) for name in tuning.ATTENTION for width in range(16, 129))
            assert all(tuning.matrix(name, dtype, n, n, device) for name in tuning.MATRIX for n in (384, 33))
    assert all(line.reason for line in tuning.TABLE)
    with pytest.raises(ValueError, match="head width is 129"):
        tuning.attention("mssa_forward", torch.float16, 129, device)


def test_an_architecture_has_its_own_lines(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    own = next(line for line in tuning.TABLE if line[:2] == (("mssa_backward",), 32) and line.architecture == 80)
    for capability in ((8, 6), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        found = tuning.attention("mssa_backward", torch.float32, own.widest, torch.device("cuda"))
        assert (found == own.config) == (capability != (9, 0))
        with tuning.assumed(10 * capability[0] + capability[1]):
            assert tuning.attention("mssa_backward", torch.float32, own.widest, torch.device("cpu")) == found


@pytest.mark.parametrize(
    ("workloads", "kernels", "product"),
    [(tune.workloads, tuning.PRODUCTS, ("ista", 32, 32)), (tune.alpha_workloads, tuning.ODL, ("odl_back", 128, 32))],
    ids=["crate", "alpha"],
)
def test_the_fastest_is_stored_and_found_again(tmp_path, monkeypatch, workloads, kernels, product):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    jobs = workloads(torch.randn(1, 20, 32), 1, 32)
    assert {job.kernel for job in jobs} == {*tuning.ATTENTION, *kernels}
    calls = []

    def clock(run) -> float:
        calls.append(run())
        return -len(calls)  # the last candidate is the fastest

    winners = tune.find_winners(jobs, torch.float32, clock)
    path = tuning.store("some GPU", winners)
    tuning.store("another GPU", {})
    assert path == tmp_path / "cache" / "tuning.json"
    assert list(path.parent.iterdir()) == [path]
    assert tuning.measured("some GPU") == winners
    assert tuning.measured("another GPU") == tuning.measured("no GPU") == {}
    name = tuning.key("mssa_backward", torch.float32, 32)
    assert winners[name] == tuning.candidates("mssa_backward", torch.float32)[-1]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tuning.attention("mssa_backward", torch.float32, 32, torch.device("cuda")) == winners[name]
    assert tuning.attention("mssa_backward", torch.float32, 64, torch.device("cuda")) != winners[name]
    kernel, *size = product
    assert tuning.matrix(kernel, torch.float32, *size, torch.device("cuda")) == tuning.candidates(kernel, torch.float32)[-1]


@pytest.mark.parametrize("kind", [CRATE, CRATEAlpha])
def test_what_a_training_step_looks_up_is_what_is_measured(monkeypatch, kind):
    asked = looked_up(monkeypatch, kind, dim=48, heads=2, dim_head=16)
    layer = tune.workloads if kind is CRATE else tune.alpha_workloads
    jobs = layer(torch.randn(1, 5, 48), 2, 16)
    assert {name.partition(" ")[0] for name in asked} == {job.kernel for job in jobs}
    measured = {tuning.key(job.kernel, torch.float16, *job.sizes) for job in jobs}
    assert measured >= {name for name in asked if " 16 " in name}


def test_every_published_size_may_be_measured_with_its_tokens(monkeypatch):
    found = {}

    def record(tokens, *of):
        found[name] = (tokens.shape, *of)
        return []

    for layer in ("workloads", "alpha_workloads"):
        monkeypatch.setattr(tune, layer, record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr("crate_fast.backend.choose_backend", lambda *_: None)
    monkeypatch.setattr(tuning, "store", lambda *_: "nowhere")
    randn, empty = torch.randn, torch.empty
    monkeypatch.setattr(torch, "randn", lambda *size, **_: randn(*size, device="meta"))
    monkeypatch.setattr(torch, "empty", lambda *size, **_: empty(*size, device="meta"))
    for name in tune.NAMED:
        assert main(["tune", "--size", name]) == 0
    assert found["tiny"] == ((256, 197, 384), 6, 64) and found["alpha-tiny"] == ((256, 197, 192), 3, 64)
    assert found["alpha-huge"] == ((256, 257, 1280), 16, 80) and len(found) == 9


def looked_up(monkeypatch, kind=CRATE, **sizes) -> list[str]:
    """Under what names a training step of such a model asks for shapes, in 16 bit and in float32."""
    names, lookup = {}, tuning._lookup
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_lookup", lambda *of: names.setdefault(of[5]) or lookup(*of))
        kept_shapes.forget()
        for dtype in (torch.float16, None):
            model = kind(image_size=8, patch_size=4, num_classes=2, depth=2, backend="triton", **sizes)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                model(torch.randn(2, 3, 8, 8)).float().square().sum().backward()
        kept_shapes.forget()
    return list(names)


@pytest.mark.parametrize(("kind", "names"), [(CRATE, 10), (CRATEAlpha, 5)])
def test_a_run_tells_whether_it_has_the_measured_shapes_that_it_began_with(tmp_path, monkeypatch, capsys, kind, names):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    settings, compute = TrainConfig(model=kind.__name__, dim=48, heads=2, dim_head=16), Compute(torch.device("cuda"), "float16")

    def now(fused: bool = True) -> dict:
        return circumstances(settings, compute, ALONE, fused=fused)

    before, one, another = now(), tuning.Config(64, 64, 32, 4, 2), tuning.Config(64, 64, 32, 4, 3)
    assert before["measured_shapes"] is None
    tuning.store("another GPU", {tuning.key("ista", torch.float16, 48, 48): one})
    tuning.store("some GPU", {tuning.key("ista", torch.float16, 96, 96): one})  # of a model of another size
    other = ("odl", 48, 192) if kind is CRATE else ("ista", 48, 48)  # of the other member of the family
    tuning.store("some GPU", {tuning.key(other[0], torch.float16, *other[1:]): one})
    assert now() == before
    found = [before["measured_shapes"]]
    for name in looked_up(monkeypatch, kind, dim=48, heads=2, dim_head=16):
        for shape in (one, another):
            tuning.store("some GPU", {name: shape})
            found.append(now()["measured_shapes"])
    assert len(set(found)) == len(found) > 2 * names
    assert now(fused=False) == before  # PyTorch computes
    warn_of_changes(before, before)
    assert capsys.readouterr().err == ""
    warn_of_changes(before, now())
    assert f"measured shapes was none and is {found[-1]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"GPU": 1}', '{"GPU": {"ista 16 8x8": [64, 64]}}', '{"GPU": {"a": [1, 2, 3, 4, "x"]}}']
)
def test_a_damaged_file_is_one_clear_error(tmp_path, monkeypatch, text):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(tuning.TuningError, match=r"tuning\.json is damaged .* delete it"):
        tuning.measured("GPU")
    with pytest.raises(tuning.TuningError):
        tuning.store("GPU", {})
    assert (tmp_path / "tuning.json").read_text() == text


@pytest.mark.slow
def test_tune_without_a_gpu_is_one_line():
    command = [sys.executable, "-m", "crate_fast", "tune"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a real search takes minutes
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "crate-fast: error: tune measures on a GPU, and PyTorch sees none here\n"
