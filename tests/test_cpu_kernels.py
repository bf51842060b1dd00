"""Kernels for CPUs, compiled here: right whatever the sizes, strides and memory; the same bits; refused by name."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from crate_fast import CRATE, BackendError, build_cpu_kernels, functional, reference
from crate_fast.device import Compute
from crate_fast.processes import ALONE
from crate_fast.training import TrainConfig
from crate_fast.training.circumstances import circumstances, warn_of_changes

pytestmark = pytest.mark.usefixtures("cpu_kernels")
HALF = [torch.bfloat16, torch.float16]


def results(attend, w: torch.Tensor, gradient: torch.Tensor, heads: int, scale: float | None = None) -> list[torch.Tensor]:
    """[out, dw] in float64."""
    leaf = w.detach().requires_grad_()
    out = attend(leaf, heads, w.shape[-1] // heads**-0.5 if scale is None else scale)
    return [x.double() for x in (out, *torch.autograd.grad(out, leaf, gradient))]


def ours(w: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    return functional.mssa(w, heads, scale, backend="torch")


def errors(attend, w, gradient, heads, scale) -> list[float]:
    exact = results(reference.mssa, w.double(), gradient.double(), heads, scale)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(results(attend, w, gradient, heads, scale), exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("width", [1, 16, 33, 48, 80, 128])
@pytest.mark.parametrize("tokens", [1, 2, 17, 65, 113, 197, 257, 601])
def test_no_size_is_further_from_float64_than_the_published_operations(tokens, width, dtype):
    """601 tokens do not stay in the cache, and are summed up in parts; 113 leave a block of one row."""
    w, gradient = torch.randn(2, 2, tokens, 3 * width, dtype=dtype)
    found, published = (errors(attend, w, gradient, 3, width**-0.5) for attend in (ours, reference.mssa))
    least = 3e-7 if dtype == torch.float32 else 1e-4  # where they are exact, or one is luckier
    assert all(error <= max(1.05 * theirs, least) for error, theirs in zip(found, published, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-3, 4.0, 300.0])
def test_any_scale_and_scores_of_any_size(scale):
    w, gradient = torch.randn(2, 2, 65, 48)
    for found, expected in zip(*(results(a, w, gradient, 3, scale) for a in (ours, reference.mssa)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * max(1, abs(scale)))


def layouts() -> dict:
    return {
        "tokens first": lambda: torch.randn(17, 2, 48).transpose(0, 1),
        "width first": lambda: torch.randn(48, 2, 17).permute(1, 2, 0),
        "every second": lambda: torch.randn(2, 34, 96)[:, ::2, ::2],
        "some heads": lambda: torch.randn(2, 17, 60)[..., 7:55],
        "one image for all": lambda: torch.randn(1, 17, 48).expand(2, 17, 48),
        "one number for all": lambda: torch.randn(2, 1, 1).expand(2, 17, 48),
        "negative": lambda: torch.randn(2, 17, 48, dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("of", ["w", "gradient"])
def test_strides_are_taken_as_they_come(layout, of):
    odd, plain = layouts()[layout](), torch.randn(2, 17, 48)
    w, gradient = (odd, plain) if of == "w" else (plain, odd)
    expected = results(ours, w.clone().contiguous(), gradient.clone().contiguous(), 3, 0.25)
    assert all(map(torch.equal, results(ours, w, gradient, 3, 0.25), expected))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_memory_of_calls_before_is_never_seen(dtype):
    w, gradient = torch.randn(2, 1, 17, 30, dtype=dtype)
    before = results(ours, w, gradient, 2, 0.25)
    for tokens, width in ((601, 128), (113, 40), (17, 16)):
        poison = torch.full((1, tokens, 2 * width), float("nan"), dtype=dtype)
        assert all(x.isnan().all() for x in results(ours, poison, poison, 2, 0.25))
    assert all(map(torch.equal, results(ours, w, gradient, 2, 0.25), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_has_the_same_bits_on_any_threads_and_beside_any_others(dtype):
    w, gradient = torch.randn(2, 3, 197, 48, dtype=dtype)
    expected = results(ours, w, gradient, 3, 0.25)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(ours, w, gradient, 3, 0.25), expected))
    alone = results(ours, w[1:2], gradient[1:2], 3, 0.25)
    assert all(map(torch.equal, alone, [x[1:2] for x in expected]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_model_evaluates_to_the_bits_it_is_trained_with(cpu_kernels, dtype, monkeypatch):
    calls = []
    for name in ("mssa_forward", "mssa_backward"):
        run = getattr(cpu_kernels, name)
        monkeypatch.setattr(cpu_kernels, name, lambda *of, run=run, name=name: calls.append(name) or run(*of))
    model = CRATE(image_size=16, patch_size=4, num_classes=5, dim=32, depth=3, heads=2, dim_head=16).to(dtype)
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    trained = model(images)
    trained.float().square().sum().backward()
    assert calls == ["mssa_forward"] * 2 + ["mssa_backward"] * 2  # the last layer attends from the class token alone
    with torch.inference_mode():
        evaluated = model.eval()(images)
    assert calls[4:] == ["mssa_forward"] * 2
    if dtype == torch.float32:
        assert torch.equal(evaluated, trained)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_run_tells_whether_it_began_with_them(cpu_kernels, monkeypatch, capsys):
    def now() -> dict:
        return circumstances(TrainConfig(), Compute(torch.device("cpu"), "float32"), ALONE, fused=False)

    compiled = now()
    assert re.fullmatch("[0-9a-f]{16}", compiled["cpu_kernels"])
    monkeypatch.setattr(cpu_kernels, "_used", False)
    assert now()["cpu_kernels"] is None
    warn_of_changes(compiled, now())
    assert f"cpu kernels was {compiled['cpu_kernels']} and is none: " in capsys.readouterr().err


@pytest.fixture
def fresh(cpu_kernels, tmp_path, monkeypatch):
    """As if nobody had compiled them."""
    monkeypatch.setattr(cpu_kernels, "_loaded", None)
    monkeypatch.setattr(cpu_kernels, "_used", None)
    monkeypatch.setenv("CRATE_FAST_CACHE", str(tmp_path / "cache"))
    return cpu_kernels


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("system", "this is win32 on x86_64; they are for Linux on x86-64"),
        ("machine", "on aarch64; they are for Linux on x86-64"),
        ("processor", "takes this processor for DEFAULT; they need AVX2 or AVX-512"),
        ("oneDNN", "oneDNN, whose products they take, is not there or switched off"),
        ("compiler", "need a C\\+\\+ compiler; there is no 'no-such-compiler', which CXX may name, without flags"),
        ("broken compiler", "do not compile with '.*/cxx': "),
        ("place", "have no place .*; CRATE_FAST_CACHE may name another folder"),
        ("source", "do not compile with .*error: .*nonsense"),
    ],
)
def test_where_they_cannot_be_built_one_line_says_why(what, message, fresh, tmp_path, monkeypatch):
    (tmp_path / "wrong.cpp").write_text("nonsense;\n")
    if what == "system":
        monkeypatch.setattr(fresh.sys, "platform", "win32")
    elif what == "machine":
        monkeypatch.setattr(fresh.platform, "machine", lambda: "aarch64")
    elif what == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    elif what == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif what == "broken compiler":
        (tmp_path / "cxx").write_text("#!/bin/sh\nexit 3\n")
        (tmp_path / "cxx").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    elif what == "place":
        (tmp_path / "cache").write_text("")
    elif what == "source":
        monkeypatch.setattr(fresh, "SOURCE", tmp_path / "wrong.cpp")
    with torch.backends.mkldnn.flags(enabled=what != "oneDNN"), pytest.raises(BackendError, match=message) as raised:
        build_cpu_kernels()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").is_dir() or not list((tmp_path / "cache").iterdir())
    assert fresh._used is None


def test_the_environment_asks_for_them(compiled_cpu_kernels, fresh, monkeypatch):
    w = torch.randn(1, 5, 32)
    monkeypatch.setenv(fresh.VARIABLE, "yes")
    with pytest.raises(BackendError, match=r"CRATE_FAST_CPU_KERNELS is 'yes'; it must be 1, .* or 0"):
        functional.mssa(w, 2, backend="torch")
    script = """if True:
        import torch
        from crate_fast import cpu_kernels, functional
        functional.mssa(torch.randn(1, 5, 32), 2)
        print(cpu_kernels.digest())"""
    for asked, digest in (("1", "[0-9a-f]{16}"), ("0", "None"), ("", "None")):
        monkeypatch.setenv(fresh.VARIABLE, asked)
        monkeypatch.setenv("CRATE_FAST_CACHE", str(compiled_cpu_kernels.parent))
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert re.fullmatch(digest, said.stdout.strip())


def test_whatever_was_compiled_and_computes_otherwise_is_refused(compiled_cpu_kernels, fresh, monkeypatch):
    monkeypatch.setattr(fresh, "_library", lambda: compiled_cpu_kernels)
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)  # it is loaded
    monkeypatch.setattr(fresh, "mssa_backward", lambda w, gradient, heads, scale: gradient)
    with pytest.raises(BackendError, match=r"were built and compute something else, in torch\.float32 by"):
        build_cpu_kernels()
    assert not fresh._used


def test_a_library_that_is_cut_or_changed_is_not_loaded(compiled_cpu_kernels, cpu_kernels, tmp_path):
    assert cpu_kernels._is_whole(compiled_cpu_kernels)
    copy, whole = tmp_path / "cpu.so", compiled_cpu_kernels.read_bytes()
    copy.write_bytes(whole)
    assert not cpu_kernels._is_whole(copy)  # killed before its checksum was written
    copy.with_suffix(".sha256").write_text(compiled_cpu_kernels.with_suffix(".sha256").read_text())
    assert cpu_kernels._is_whole(copy)
    for damaged in (whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:], b""):
        copy.write_bytes(damaged)
        assert not cpu_kernels._is_whole(copy)


def test_what_killed_compilations_leave_goes(cpu_kernels, tmp_path):
    for name, age in (("compiling-old", 7200), ("compiling-now", 0), ("other", 7200)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cpu_kernels._remove_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiling-now", "other"]


def test_a_library_of_somebody_elses_is_not_loaded(cpu_kernels):
    for owner in (0, os.getuid()):
        cpu_kernels._check_owner(SimpleNamespace(stat=lambda owner=owner: SimpleNamespace(st_uid=owner)))
    theirs = SimpleNamespace(stat=lambda: SimpleNamespace(st_uid=os.getuid() + 1))
    with pytest.raises(BackendError, match=rf"is user {os.getuid() + 1}'s; CRATE_FAST_CACHE must name a folder of your own"):
        cpu_kernels._check_owner(theirs)


@pytest.mark.parametrize("asked", [dict(heads=2), dict(heads=5)], ids=str)
def test_the_operators_refuse_what_does_not_fit(asked):
    forward = torch.ops.crate_fast_cpu.mssa_forward
    w = torch.randn(2, 5, 32)
    for wrong in (w.double(), w.transpose(1, 2), w[0], w[:0]) if asked["heads"] == 2 else (w,):
        with pytest.raises(RuntimeError):
            forward(wrong, asked["heads"], 0.25, False)
