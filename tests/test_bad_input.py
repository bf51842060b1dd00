"""Every input has an answer: what cannot work is refused with the value named, NaN stays NaN, nothing is too small."""

import os
import re
import subprocess
import sys

import pytest
import torch

from crate_fast import (
    CRATE,
    BackendError,
    CRATE_tiny,
    choose_backend,
    freeze,
    functional,
    inspection,
    load_checkpoint,
    reference,
)
from crate_fast.model import build
from crate_fast.modules import FeedForward

SMALL = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=1, heads=2, dim_head=16)
BACKENDS = ("torch", "triton", "reference")
W, H, D = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(32, 32)


def image(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED = {
    "patch that does not divide": (lambda: CRATE(**SMALL | {"patch_size": 3}), ValueError, "8.*3"),
    "unknown pool": (lambda: CRATE(**SMALL, pool="max"), ValueError, "'max'.*'cls'.*'mean'"),
    "unknown backend": (lambda: CRATE(**SMALL, backend="cuda"), ValueError, "'cuda'.*'auto'.*'triton'.*'torch'.*'reference'"),
    "unknown stream": (lambda: CRATE_tiny(stream="float8"), ValueError, "'float8'.*'float16'"),
    "unknown size": (lambda: build("huge"), ValueError, "'huge'.*'tiny'.*'large'"),
    "no heads": (lambda: CRATE(**SMALL | {"heads": 0}), ValueError, "heads is 0"),
    "a side with a fraction": (
        lambda: CRATE(**SMALL | {"image_size": 8.0}),
        TypeError,
        "image_size is 8.0.*an integer, or two",
    ),
    "three sides": (lambda: CRATE(**SMALL | {"image_size": (8, 8, 8)}), TypeError, r"image_size is \(8, 8, 8\)"),
    "a truth for a number": (lambda: CRATE(**SMALL | {"depth": True}), TypeError, "depth is True"),
    "no image": (lambda: CRATE(**SMALL | {"image_size": 0}), ValueError, "image_size is 0"),
    "image that patches do not divide": (lambda: CRATE(**SMALL)(image(1, 3, 8, 6)), ValueError, "8×6.*4×4"),
    "image too large": (lambda: CRATE(**SMALL)(image(1, 3, 16, 8)), ValueError, "16×8.*8×8"),
    "wrong channels": (lambda: CRATE(**SMALL)(image(1, 1, 8, 8)), ValueError, r"\(1, 1, 8, 8\).*3"),
    "image without batch": (lambda: CRATE(**SMALL)(image(3, 8, 8)), ValueError, r"\(3, 8, 8\)"),
    "integer image": (lambda: CRATE(**SMALL)(image(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "uint8"),
    "complex image": (lambda: CRATE(**SMALL)(image(1, 3, 8, 8, dtype=torch.complex64)), TypeError, "complex64"),
    "heads that do not fit": (lambda: functional.mssa(W, 5), ValueError, "32.*5"),
    "mssa of a matrix": (lambda: functional.mssa(W[0], 2), ValueError, r"\(5, 32\)"),
    "scale of NaN": (lambda: functional.mssa(W, 2, float("nan")), ValueError, "scale is nan"),
    "integer tokens": (lambda: functional.mssa(W.int(), 2), TypeError, "int32"),
    "complex tokens": (lambda: functional.mssa(W.cfloat(), 2), TypeError, "complex64"),
    "weight not square": (lambda: functional.ista(H, D[:16]), ValueError, r"\(16, 32\)"),
    "weight that does not fit": (lambda: functional.ista(H[..., :16], D), ValueError, r"\(2, 5, 16\).*32"),
    "integer weight": (lambda: functional.ista(H, D.long()), TypeError, "int64"),
    "complex ista": (lambda: functional.ista(H.cfloat(), D), TypeError, "complex64"),
    "mixed dtypes": (lambda: functional.ista(H, D.double()), TypeError, "float32.*float64"),
    "unknown backend of a function": (lambda: functional.mssa(W, 2, backend="fast"), ValueError, "'fast'"),
    "float64 in the kernels": (lambda: functional.mssa(W.double(), 2, backend="triton"), BackendError, "float64"),
    "float64 model in the kernels": (
        lambda: CRATE(**SMALL, backend="triton").double()(image(1, 3, 8, 8, dtype=torch.float64)),
        BackendError,
        "float64",
    ),
    "half image in a float model": (lambda: CRATE(**SMALL)(image(1, 3, 8, 8).half()), TypeError, "float16.*float32.*autocast"),
    "image elsewhere": (lambda: CRATE(**SMALL).to("meta")(image(1, 3, 8, 8)), ValueError, "on cpu.*on meta"),
    "no image but a list": (lambda: CRATE(**SMALL)([1.0]), TypeError, "a list.*a tensor"),
    "depth of a fraction": (lambda: CRATE(**SMALL | {"depth": 1.5}), TypeError, "depth is 1.5"),
    "depth below zero": (lambda: CRATE(**SMALL | {"depth": -1}), ValueError, "depth is -1.*at least 0"),
    "step size of a word": (lambda: CRATE(**SMALL, ista="big"), TypeError, "ista is 'big'"),
    "threshold without end": (lambda: CRATE(**SMALL, lambd=float("inf")), ValueError, "lambd is inf"),
    "threshold below zero": (lambda: CRATE(**SMALL, lambd=-1), ValueError, "lambd is -1.*at least 0"),
    "step size below zero": (lambda: CRATE(**SMALL, ista=-0.1), ValueError, "ista is -0.1.*at least 0"),
    "depth without end": (lambda: CRATE(**SMALL | {"depth": 10**9}), ValueError, "depth is 1000000000; .*at most 10,000"),
    "width for no machine": (lambda: CRATE(**SMALL | {"dim": 10**9}), ValueError, "width 1000000000.*at most 10,000,000,000"),
    "classes for no machine": (lambda: CRATE(**SMALL | {"num_classes": 10**400}), ValueError, "1000.*401 characters.* classes"),
    "heads of all digits": (lambda: CRATE(**SMALL | {"heads": 10**5000}), ValueError, "a number of thousands of digits in all"),
    "head width of all digits": (lambda: CRATE(**SMALL | {"dim_head": 10**5000}), ValueError, "digits in all heads"),
    "side of all digits": (lambda: CRATE(**SMALL | {"image_size": 10**5000}), ValueError, "digits tokens"),
    "channels without end": (lambda: CRATE(**SMALL | {"channels": 10**30}), ValueError, "at most 10,000,000,000"),
    "pool of all digits": (lambda: CRATE(**SMALL, pool=10**5000), ValueError, "pool is a number of thousands of digits"),
    "backend of all digits": (lambda: CRATE(**SMALL, backend=10**5000), ValueError, "backend is a number of thousands"),
    "negative threshold of a function": (lambda: functional.ista(H, D, lambd=-1), ValueError, "lambd is -1.*at least 0"),
    "negative step of a function": (lambda: functional.ista(H, D, -0.1), ValueError, "step_size is -0.1.*at least 0"),
    "threshold of NaN, in a function": (lambda: functional.ista(H, D, lambd=float("nan")), ValueError, "lambd is nan"),
    "negative threshold of a layer": (lambda: FeedForward(32, lambd=-1), ValueError, "lambd is -1.*at least 0"),
    "step of a layer without end": (lambda: FeedForward(32, step_size=float("inf")), ValueError, "step_size is inf"),
    "negative threshold, published": (lambda: reference.ista(H, D, lambd=-1.0), ValueError, "lambd is -1.*at least 0"),
    "step beyond floats, published": (lambda: reference.ista(H, D, 10**5000), ValueError, "step_size is beyond any float"),
    "threshold of NaN, published": (lambda: reference.FeedForward(32, 0.1, float("nan")), ValueError, "lambd is nan"),
    "negative step, published": (lambda: reference.CRATE(**SMALL, ista=-1.0), ValueError, "step_size is -1.*at least 0"),
    "threshold beyond all floats": (lambda: CRATE(**SMALL, lambd=10**400), ValueError, "lambd is larger.*finite"),
    "dropout of NaN": (lambda: CRATE(**SMALL, dropout=float("nan")), ValueError, "dropout is nan"),
    "dropout above all": (lambda: CRATE(**SMALL, emb_dropout=1.5), ValueError, "emb_dropout is 1.5.*from 0 to 1"),
    "checkpoint of nothing": (lambda: load_checkpoint(None), TypeError, "source is a NoneType"),
    "checkpoint of bytes": (lambda: load_checkpoint(b"model.pt"), TypeError, "source is a bytes"),
    "device of a word": (lambda: load_checkpoint("model.pt", device="gpu"), ValueError, "device is 'gpu'"),
    "device that is not there": (lambda: load_checkpoint("model.pt", device="cuda:99"), ValueError, "device is 'cuda:99'"),
    "device of a fraction": (lambda: load_checkpoint("model.pt", device=0.5), ValueError, "device is 0.5"),
    "coding rate up to nothing": (lambda: inspection.coding_rate(W, 0), ValueError, "precision is 0.*above 0"),
    "coding rate up to NaN": (lambda: inspection.coding_rate(W, float("nan")), ValueError, "precision is nan"),
    "coding rate of one token": (lambda: inspection.coding_rate(W[0, 0]), ValueError, r"shape \(32,\)"),
    "row of heads that do not fit": (lambda: inspection.attention_row(W, 5), ValueError, "width 32, which 5 heads"),
    "row of no token": (lambda: inspection.attention_row(W, 2, token=5), ValueError, "no token 5.* has 5"),
    "row of a matrix": (lambda: inspection.attention_row(W[0], 2), ValueError, r"\(5, 32\)"),
    "colours of two widths": (
        lambda: inspection.principal_colours([torch.ones(2, 2, 4), torch.ones(2, 2, 6)]),
        ValueError,
        r"\(2, 2, 6\).*one width",
    ),
    "colours of a matrix": (lambda: inspection.principal_colours([torch.ones(2, 4)]), ValueError, r"\(2, 4\)"),
    "kernels under a transform": (
        lambda: torch.func.vmap(lambda w: functional.mssa(w[None], 2, backend="triton"))(W),
        BackendError,
        "vmap.*PyTorch's operators alone",
    ),
    "frozen in training": (lambda: freeze(CRATE(**SMALL)), ValueError, r"training mode; call model\.eval\(\)"),
    "frozen weights": (lambda: freeze(torch.nn.Linear(2, 2)), TypeError, "a CRATE.*not a Linear"),
    "frozen, then trained": (lambda: freeze(CRATE(**SMALL).eval()).train(), RuntimeError, "frozen.*does not train"),
    "frozen, then learning": (lambda: freeze(CRATE(**SMALL).eval()).requires_grad_(), RuntimeError, "frozen.*does not train"),
    "frozen, then optimized": (lambda: torch.optim.SGD(freeze(CRATE(**SMALL).eval()).parameters()), ValueError, "empty"),
    "frozen, then loaded": (lambda: freeze(CRATE(**SMALL).eval()).load_state_dict({}), RuntimeError, "loads no other weights"),
    "frozen, then moved": (lambda: freeze(CRATE(**SMALL).eval()).half(), RuntimeError, "frozen.*in its dtype"),
    "no tokens but a list": (lambda: functional.mssa([1.0], 2), TypeError, "w is a list"),
    "heads of a fraction": (lambda: functional.mssa(W, 2.0), TypeError, "heads is 2.0"),
    "heads of a truth value": (lambda: functional.mssa(W, True), TypeError, "heads is True"),
    "scale of a word": (lambda: functional.mssa(W, 2, "small"), TypeError, "scale is 'small'"),
    "float8 tokens": (lambda: functional.mssa(W.to(torch.float8_e4m3fn), 2), TypeError, "float8_e4m3fn.*16, 32 or 64 bits"),
    "sparse tokens": (lambda: functional.ista(H.to_sparse(), D), TypeError, "sparse"),
    "step size of NaN": (lambda: functional.ista(H, D, float("nan")), ValueError, "step_size is nan"),
    "weight elsewhere": (lambda: functional.ista(H, D.to("meta")), ValueError, "on cpu.*on meta"),
    "backend of a list": (lambda: choose_backend("auto", [1.0]), TypeError, "x is a list"),
    "head too narrow": (lambda: functional.mssa(W, 4, backend="triton"), BackendError, "width is 8.*16 to 128"),
    "head too wide": (lambda: functional.mssa(torch.randn(1, 2, 129), 1, backend="triton"), BackendError, "129.*16 to 128"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_by_name(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_meta_tensors_give_shapes(backend, training):
    model = CRATE(**SMALL, backend=backend).to("meta").train(training)
    logits = model(torch.empty(3, 3, 8, 8, device="meta"))
    assert logits.shape == (3, 5) and logits.is_meta
    logits.sum().backward()
    assert all(p.grad.is_meta for p in model.parameters())
    with torch.no_grad():
        assert model(torch.empty(3, 3, 8, 8, device="meta")).shape == (3, 5)


@pytest.mark.slow
def test_without_a_gpu_triton_is_refused_and_auto_says_why():
    code = (
        "import torch, crate_fast\n"
        "print(crate_fast.choose_backend('auto', torch.zeros(1)).reason)\n"
        "crate_fast.functional.mssa(torch.zeros(1, 2, 32), 2, backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "on the CPU" in result.stdout
    assert result.returncode == 1
    assert "BackendError: backend='triton' cannot run here: the tensor is on the CPU" in result.stderr


def test_auto_takes_torch_on_a_cpu():
    assert choose_backend("auto", W) == ("torch", choose_backend("auto", W).reason)
    assert choose_backend("triton", W).name == "triton"  # interpreted, in these tests


def test_double_backward_through_the_kernels_raises():
    w, d = W.clone().requires_grad_(), D.clone().requires_grad_()
    model = CRATE(**SMALL, backend="triton")
    outputs = {
        w: functional.mssa(w, 2, backend="triton"),
        d: functional.ista(H, d, backend="triton"),
        model.cls_token: model(torch.randn(1, 3, 8, 8)),
    }
    for x, out in outputs.items():
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("tokens", [[0], [3], [0, 1], slice(None)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_gives_nan_out_forward_and_backward(backend, tokens):
    w = W.clone()
    w[0, tokens, 20] = float("nan")  # second head of the first image
    if backend == "torch":
        with torch.no_grad():
            mapped = torch.func.vmap(lambda image: functional.mssa(image[None], 2, backend=backend)[0])(w)
        assert mapped[0, :, 16:].isnan().all()
        assert not mapped[1].isnan().any()
    w.requires_grad_()
    out = functional.mssa(w, 2, backend=backend)
    out.sum().backward()
    for x in (out, w.grad):
        assert x[0, :, 16:].isnan().all()
        assert not x[1].isnan().any()

    h, d = H.clone(), D.clone().requires_grad_()
    h[0, 3, 20] = float("nan")
    h.requires_grad_()
    out = functional.ista(h, d, backend=backend)
    out.sum().backward()
    assert out[0, 3].isnan().all()
    assert not out[1].isnan().any()
    assert d.grad.isnan().any()


def run_with_nan(backend: str, autocast: bool) -> tuple[torch.Tensor, set[str]]:
    """Logits of two images, NaN in the first, and the names of the parameters whose gradients have a NaN."""
    torch.manual_seed(0)
    model, x = CRATE(**SMALL, backend=backend), torch.randn(2, 3, 8, 8)
    x[0, 1, 2, 3] = float("nan")
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        logits = model(x)
    logits.float().sum().backward()
    return logits, {name for name, p in model.named_parameters() if p.grad.isnan().any()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_in_an_image_gives_nan_logits_and_gradients(backend, autocast):
    logits, poisoned = run_with_nan(backend, autocast)
    assert logits[0].isnan().all()
    assert not logits[1].isnan().any()
    expected = run_with_nan("reference", autocast)[1]
    assert len(expected) > 10
    assert poisoned >= expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 32), (1, 1, 32), (1, 0, 32), (0, 0, 32)])
def test_empty_and_single_inputs_have_answers(shape, backend):
    w, d = torch.randn(shape, requires_grad=True), D.clone().requires_grad_()
    out = functional.mssa(w, 2, backend=backend)
    sparse = functional.ista(w, d, backend=backend)
    assert out.shape == sparse.shape == shape
    (out.sum() + sparse.sum()).backward()
    assert w.grad.shape == shape
    assert d.grad.isfinite().all()
    if w.numel() == 0:
        assert (d.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch, backend):
    model = CRATE(**SMALL, backend=backend)
    logits = model(torch.randn(batch, 3, 8, 8))
    assert logits.shape == (batch, 5)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
