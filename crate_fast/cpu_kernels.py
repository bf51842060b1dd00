"""MSSA's kernels for CPUs, in C++: compiled on the machine that runs them, for whoever asks and has a compiler.

`cpu_attention` computes the same by PyTorch's operations, which keep a block's scores, probabilities and their gradients in
memory between one and the next; `cpu_kernels.cpp` keeps a head's in the cache and has scores in float32 whatever w is.
CRATE-tiny's attention on two cores of an Intel Xeon with AMX (torch 2.14), forward and backward, in ms, measured once:

                          published      cpu_attention      here
    bfloat16, 8 images      4.6, 8.8           2.6, 9.2      2.5, 5.1
    bfloat16, 1             0.7, 1.6           0.8, 2.0      0.3, 0.6
    float32, 8              6.6, 12.7         5.7, 12.6      4.1, 9.3
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree, which
from subprocess import SubprocessError
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from . import reference
from .backend import cpu_product_dtype, without_autocast
from .cache import CACHE_VARIABLE, cache_folder
from .errors import BackendError
from .files import write_atomically
from .optional import require

VARIABLE = "CRATE_FAST_CPU_KERNELS"
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",  # NaN and infinity stay what they are
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHE = 3 << 19  # as in the source
COMPILING = "compiling-"  # what folders are called in which it is compiled

_used: bool | None = None  # None until somebody asks
_loaded: Path | None = None


def build_cpu_kernels() -> Path:
    """Compiles the kernels, unless they are there for this processor and PyTorch, and uses them from here on.

    They take the attention of "auto" and "torch" on this CPU, in float16 (computed in float32), bfloat16 and float32, in
    training and evaluation, in this process. The environment variable CRATE_FAST_CPU_KERNELS=1 does the same for every command
    and every process of a run. It takes half a minute, the first time, and a C++ compiler.

    Returns:
        The library that was loaded.

    Raises:
        BackendError: they cannot be built or do not compute here; the message says why.
        MissingPackageError: ninja or setuptools is missing, which compile them.
    """
    global _used, _loaded
    obstacle = _obstacle()
    if obstacle:
        raise BackendError(f"kernels for CPUs cannot be built: {obstacle}")
    if _loaded is None:
        library = _library()
        if _is_whole(library):
            _check_owner(library)
            torch.ops.load_library(library)
        else:
            _compile(library)
        with torch.inference_mode(False), without_autocast("cpu"):  # wherever a first call comes from
            _check()
        _loaded = library
    _used = True
    return _loaded


@contextmanager
def used(on: bool) -> Iterator[None]:
    """While open, whether the kernels, once built, compute attention on this CPU."""
    global _used
    before, _used = _used, on and _loaded is not None
    try:
        yield
    finally:
        _used = before


def take(w: Tensor) -> bool:
    """Whether the kernels compute the attention of w, on a CPU: they were built or are asked for by the environment."""
    if _used is None:
        _ask_environment()
    return bool(_used) and w.dtype in DTYPES and w.numel() > 0


def digest() -> str | None:
    """Of the kernels' source, where they are used on this CPU; else None."""
    if _used is None:
        _ask_environment()
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16] if _used else None


def mssa_forward(w: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(w wᵀ · scale) w for each head, of what `take` has taken: (batch, tokens, heads × head width) to the same."""
    return torch.ops.crate_fast_cpu.mssa_forward(_in_rows(w), heads, scale, _is_narrow(w))


def mssa_backward(w: Tensor, gradient: Tensor, heads: int, scale: float) -> Tensor:
    """The gradient of w, of the `gradient` of what `mssa_forward` gives."""
    return torch.ops.crate_fast_cpu.mssa_backward(_in_rows(w), _in_rows(gradient), heads, scale, _is_narrow(w))


def products_of_backward(tokens: int) -> int:
    """How many products of attention `mssa_backward` takes: five, and two again where a head's matrices leave the cache."""
    return 5 if 3 * tokens * -(-tokens // 16) * 16 * 4 <= CACHE else 7


def _in_rows(x: Tensor) -> Tensor:
    """x, or a copy, whose rows are in one piece and which nothing is still to be done to."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_narrow(w: Tensor) -> bool:
    """Whether products are taken in bfloat16: of tensors of it, where the processor has them."""
    return w.dtype == torch.bfloat16 == cpu_product_dtype(torch.bfloat16) and _capability() == "AVX512"


def _ask_environment() -> None:
    global _used
    asked = os.environ.get(VARIABLE) or "0"
    if asked not in ("0", "1"):
        raise BackendError(f"{VARIABLE} is {asked!r}; it must be 1, for kernels compiled on this machine, or 0")
    if asked == "1":
        build_cpu_kernels()
    else:
        _used = False


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _obstacle() -> str | None:
    """What keeps them from being built here, in words; None if nothing does."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"this is {sys.platform} on {platform.machine()}; they are for Linux on x86-64"
    if _capability() not in ("AVX2", "AVX512"):
        return f"PyTorch takes this processor for {_capability()}; they need AVX2 or AVX-512"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "PyTorch's oneDNN, whose products they take, is not there or switched off"
    return None


def _library() -> Path:
    """The compiled library, by a name of all that it depends on, so that none is taken for another's."""
    facts = [SOURCE.read_text(encoding="utf-8"), *FLAGS, torch.__version__, str(torch.version.git_version), _processor()]
    return cache_folder() / f"cpu-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    """Whether it is there as it was compiled: the system ends a process that runs into a part that is missing."""
    beside = library.with_suffix(".sha256")
    return library.is_file() and beside.is_file() and beside.read_text(errors="replace") == _checksum(library)


def _check_owner(library: Path) -> None:
    """Raises BackendError where somebody else may have written the library, which is code."""
    owner = library.stat().st_uid
    if owner not in (0, os.getuid()):
        instead = f"{CACHE_VARIABLE} must name a folder of your own"
        raise BackendError(f"kernels for CPUs are not taken from {library}, which is user {owner}'s; {instead}")


def _compile(library: Path) -> None:
    """Compiles the source, loads it, and leaves it as `library`, in one step: many processes may do so at once."""
    require("ninja", "setuptools")
    compiler = os.environ.get("CXX", "c++")
    if which(compiler) is None:
        raise BackendError(f"kernels for CPUs need a C++ compiler; there is no {compiler!r}, which CXX may name, without flags")
    logging.getLogger("torch.utils.cpp_extension").addFilter(_says_nothing_of_cuda)
    from torch.utils.cpp_extension import load

    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(library.parent)
        place = TemporaryDirectory(prefix=COMPILING, dir=library.parent)
    except OSError as error:
        raise BackendError(f"kernels for CPUs have no place ({error}); {CACHE_VARIABLE} may name another folder") from error
    print("crate-fast: compiling kernels for this CPU (half a minute, once)", file=sys.stderr, flush=True)
    with place as folder, _ninja_on_path():
        try:
            load("crate_fast_cpu", [str(SOURCE)], extra_cflags=list(FLAGS), build_directory=folder, is_python_module=False)
        except (RuntimeError, OSError, SubprocessError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            first = next((line for line in lines if "error:" in line or "fatal" in line), lines[-1] if lines else "no reason")
            raise BackendError(f"kernels for CPUs do not compile with {compiler!r}: {first}") from error
        made = Path(folder) / "crate_fast_cpu.so"
        checksum = _checksum(made)
        os.replace(made, library)
        write_atomically(library.with_suffix(".sha256"), lambda file: file.write(checksum.encode()))


def _remove_remains(folder: Path) -> None:
    """Of compilations that were killed, an hour ago or longer."""
    for remains in folder.glob(f"{COMPILING}*"):
        if time.time() - remains.stat().st_mtime > 3600:
            rmtree(remains, ignore_errors=True)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """PyTorch asks the shell for ninja, where an environment that is not activated has none."""
    import ninja

    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _says_nothing_of_cuda(record: logging.LogRecord) -> bool:
    return "CUDA" not in record.getMessage()  # which this does not compile for


def _processor() -> str:
    """The processor's maker, model and what it has, as Linux tells of its first core."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    return "\n".join(line for line in text.splitlines() if line.partition("\t")[0].partition(":")[0].strip() in names)


def _check() -> None:
    """Raises BackendError unless what was built computes what the reference does."""
    w = torch.linspace(-1, 1, 2 * 21 * 36).sin_().view(2, 21, 36)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = w.to(dtype)
        with torch.enable_grad():
            leaf = x.double().requires_grad_()
            expected = reference.mssa(leaf, 2, 3.0)
            (of_leaf,) = torch.autograd.grad(expected, leaf, leaf.detach())
        try:
            found = mssa_forward(x, 2, 3.0), mssa_backward(x, x, 2, 3.0)
        except RuntimeError as error:
            raise BackendError(f"kernels for CPUs were built and do not run: {str(error).splitlines()[0]}") from error
        for ours, exact in zip(found, (expected, of_leaf), strict=True):
            error = (ours.double() - exact).norm() / exact.norm()
            if not error <= bound:
                raise BackendError(f"kernels for CPUs were built and compute something else, in {dtype} by {error:.1e}")
