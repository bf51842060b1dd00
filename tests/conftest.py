"""The kernels run in Triton's interpreter, on the CPU; `--published=DIR` adds the published code as a second judge.

`python -m pytest -m gpu tests` runs the tests marked "gpu" instead, on a CUDA GPU; `make gpu` does, and more. Neither needs
the package installed. Triton reads TRITON_INTERPRET once, when it is imported, so here nothing of ours is on top.
"""

import os

# One thread a process, of which `make test` starts several: the sums are then the same on every machine too.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import importlib.util
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KERNELS = BENCHMARKS.parent / "crate_fast" / "kernels"
if KERNELS.parent.is_dir() and not KERNELS.exists():  # in a source archive, which holds no links
    KERNELS.symlink_to(os.path.join("..", "kernels"), target_is_directory=True)


def on_gpu(*values):
    """A case of a test that takes `device` first, for a GPU."""
    return pytest.param("cuda", *values, marks=pytest.mark.gpu)


HALVES = [("cpu", torch.float16), on_gpu(torch.float16), on_gpu(torch.bfloat16)]
DTYPES = [("cpu", torch.float32), on_gpu(torch.float32), *HALVES]
"""(device, dtype) of kernels: the interpreter's bfloat16 products are wrong."""


def pytest_make_parametrize_id(config, val, argname):
    """dtypes by their names."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_addoption(parser):
    parser.addoption("--published", metavar="DIR", help="a checkout of the published repository, compared with as well")
    parser.addoption(
        "--seed", type=int, default=0, metavar="N", help="other numbers: 1000 N more for a test's torch.manual_seed"
    )
    parser.addoption("--quick", action="store_true", help="the first case of every test that is not marked slow, and no other")
    parser.addoption("--threads", type=int, default=1, metavar="N", help="threads of the process that runs a test")


def pytest_configure(config):
    """Asked for "gpu" and nothing else, the kernels are compiled; else they are interpreted, and a GPU is not seen."""
    if importlib.util.find_spec("hypothesis"):  # which a machine lent for its GPU has not
        import hypothesis

        hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no mistake
        hypothesis.settings.load_profile("busy")
    os.environ.setdefault("TRITON_INTERPRET", "0" if config.option.markexpr == "gpu" else "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        obstacle = interpreter_obstacle(version("triton"), version("numpy"))
        if obstacle:
            raise pytest.UsageError(obstacle)


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    """With --quick, the first case of every test that is not marked "slow"."""
    if config.option.quick:
        quick = [item for item in items if not item.get_closest_marker("slow")]
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(quick)}.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        items[:] = [item for item in items if item in first]


def interpreter_obstacle(triton: str, numpy: str) -> str | None:
    """Why these versions cannot interpret kernels, in a line; None where they can."""
    older, newer = (tuple(map(int, text.split(".")[:2])) for text in (triton, numpy))
    if older >= (3, 7) or newer < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton} needs NumPy below 2.4, and NumPy {numpy} is here; "
        "on a GPU `python -m pytest -m gpu tests` runs the kernels themselves"
    )


def pytest_generate_tests(metafunc):
    """`published_class`: the transcription in crate_fast.reference, and the published class itself where it is at hand."""
    if "published_class" in metafunc.fixturenames:
        from crate_fast import reference

        directory = metafunc.config.getoption("published")
        classes = {"reference": reference.CRATE}
        if directory:
            classes["published"] = load_module(Path(directory) / "model" / "crate.py").CRATE
        metafunc.parametrize("published_class", list(classes.values()), ids=list(classes))
    if "published_mae" in metafunc.fixturenames:  # the same of CRATE-MAE
        from crate_fast import reference

        directory = metafunc.config.getoption("published")
        classes = {"reference": reference.CRATEMAE} | ({"published": load_mae(Path(directory))} if directory else {})
        metafunc.parametrize("published_mae", list(classes.values()), ids=list(classes))


def load_module(path: Path):
    """The module at `path`, which is no part of a package."""
    specification = importlib.util.spec_from_file_location(f"_loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def load_mae(published: Path):
    """The published CRATE-MAE, encoder and decoder of one size."""
    sys.path.insert(0, str(published))
    mae = importlib.import_module("model.crate_ae.crate_ae")

    def build(**options):
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        decoder = {f"decoder_{name}": options[name] for name in ("embed_dim", "depth", "num_heads")}
        return mae.MaskedAutoencoderViT(mae.CRATEEncoderBlock, mae.CRATEDecoderBlock, norm_layer=norm, **options, **decoder)

    return build


def call(capsys, *argv):
    """(exit status, stdout, stderr) of `crate-fast argv`."""
    from crate_fast.commands.main import main

    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def no_group_stays():
    """A process group that a test leaves would be taken by the next one that is run in this process."""
    yield
    left = torch.distributed.is_initialized()
    if left:
        torch.distributed.destroy_process_group()
    assert not left, "this test, or what it tests, leaves a process group"


@pytest.fixture
def gpu():
    """The GPU, on which the kernels themselves run."""
    from crate_fast.kernels import INTERPRETED

    assert torch.cuda.is_available() and not INTERPRETED, "tests marked gpu need a CUDA GPU and TRITON_INTERPRET=0"
    return torch.device("cuda", 0)


@pytest.fixture(params=["cpu", on_gpu()])
def device(request):
    """Where tensors are made and kernels run: on the CPU, in the interpreter, or on a GPU."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    place = request.getfixturevalue("gpu")
    with place:
        yield place


@pytest.fixture(scope="session")
def precision():
    """benchmarks/precision.py as a module."""
    return load_module(BENCHMARKS / "precision.py")


@pytest.fixture(scope="session")
def compiled_cpu_kernels(request):
    """The library of kernels for this CPU, compiled once for all tests and runs of them, and used by none yet."""
    from crate_fast import cpu_kernels

    obstacle = cpu_kernels._obstacle()
    if obstacle or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip(obstacle or "there is no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_FAST_CACHE", str(request.config.cache.mkdir("cpu-kernels")))
        patch.setattr(cpu_kernels, "_used", False)
        library = cpu_kernels.build_cpu_kernels()
        patch.setattr(cpu_kernels, "_used", False)
        yield library


@pytest.fixture
def cpu_kernels(compiled_cpu_kernels, monkeypatch):
    """Attention on the CPU by the kernels compiled for it."""
    from crate_fast import cpu_kernels

    monkeypatch.setattr(cpu_kernels, "_used", True)
    return cpu_kernels


@pytest.fixture(autouse=True)
def threads(request):
    """As every test found them, whatever the one before has set."""
    torch.set_num_threads(request.config.getoption("threads"))


@pytest.fixture(scope="session", autouse=True)
def other_numbers(request):
    """Tests, and fixtures of any scope, draw those that `--seed` asks for. A run that a test starts has its own --seed, here as
    in another process."""
    shift, original, here = 1000 * request.config.getoption("seed"), torch.manual_seed, str(Path(__file__).parent)

    def seed(value):
        return original(value + shift if sys._getframe(1).f_code.co_filename.startswith(here) else value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", seed)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever the one before has drawn, and others with another `--seed`."""
    torch.manual_seed(0)
