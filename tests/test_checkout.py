"""A bare checkout on a machine with a GPU: nothing is installed, some packages are not there, and others are too new."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BENCHMARKS, interpreter_obstacle

ROOT = BENCHMARKS.parent
ABSENT = ("lion_pytorch", "nbclient", "nbformat", "simplejpeg")
COLLECT = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT})
import pytest
status = pytest.main(["-q", "-m", "gpu", "--collect-only", "tests"])
import crate_fast.kernels
print(crate_fast.kernels.__file__)
sys.exit(status)
"""


@pytest.mark.slow
def test_gpu_tests_are_collected_from_a_checkout_that_is_not_installed(tmp_path):
    for name in ("benchmarks", "crate_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    *tests, kernels = done.stdout.splitlines()
    assert Path(kernels).is_relative_to(tmp_path)
    assert sum("[cuda" in test or "test_gpu" in test for test in tests) > 100
    assert not any("[cpu" in test for test in tests)


@pytest.mark.parametrize(
    ("triton", "numpy", "fits"),
    [("3.6.0", "2.5.5", False), ("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.8.0", "2.5.5", True)],
)
def test_an_interpreter_that_cannot_take_this_numpy_says_so_in_a_line(triton, numpy, fits):
    obstacle = interpreter_obstacle(triton, numpy)
    assert (obstacle is None) == fits
    if not fits:
        assert f"triton {triton} needs NumPy below 2.4, and NumPy {numpy} is here" in obstacle
        assert "\n" not in obstacle


@pytest.mark.slow
def test_importing_the_package_does_not_import_the_compiler():
    """torch._dynamo takes as long to import as torch itself."""
    late = ("torch._dynamo", "matplotlib", "PIL", "pydantic")
    script = f"import sys, crate_fast; sys.exit(sum(name in sys.modules for name in {late}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_who_looks_for_the_other_project_called_kernels_registers_no_operator_again():
    """As transformers does; a second registration would take the operators away from whoever has them."""
    code = (
        "import sys, crate_fast.kernels, kernels\n"
        "assert not hasattr(kernels, 'ISTA') and not [name for name in sys.modules if name.startswith('kernels.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_import_each_other_in_one_circle_alone():
    """A model is saved as the Hub's mixin has it, and loaded by its own class: nothing else may need what needs it."""
    grimp = pytest.importorskip("grimp")  # with import-linter, which the oldest versions are tested without
    graph = grimp.build_graph("crate_fast")
    needed = {module: graph.find_upstream_modules(module) for module in graph.modules}
    circles = {frozenset({module} | {other for other in needed[module] if module in needed[other]}) for module in needed}
    (circle,) = (circle for circle in circles if len(circle) > 1)
    assert {"crate_fast.model.crate", "crate_fast.checkpoint.hub"} <= circle
    assert {name.split(".")[1] for name in circle} == {"model", "checkpoint"}
