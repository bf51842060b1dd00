"""What is built of the project holds every file once, under the name that it is imported by."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import crate_fast.kernels

ROOT = Path(__file__).parent.parent
KERNELS = sorted(file.name for file in (ROOT / "kernels").glob("*.py"))


def test_a_checkout_has_its_kernels_without_being_installed():
    command = [sys.executable, "-c", "import crate_fast.kernels; print(crate_fast.kernels.__file__)"]
    found = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).resolve() == (ROOT / "kernels" / "__init__.py").resolve() == Path(crate_fast.kernels.__file__).resolve()


def test_wheel_and_source_archive_hold_the_kernels_once(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("crate_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "import setuptools.build_meta as b; print(b.build_sdist('out'), b.build_wheel('out'), sep='\\n')"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    archive, wheel = (tmp_path / "out" / name for name in built.stdout.splitlines()[-2:])
    with tarfile.open(archive) as source, zipfile.ZipFile(wheel) as package:
        in_source, in_wheel = (sorted(n for n in names if "/kernels/" in n and n.endswith(".py"))
                               for names in (source.getnames(), package.namelist()))  # fmt: skip
    assert [name.split("/")[-2:] for name in in_source] == [["kernels", name] for name in KERNELS]
    assert in_wheel == [f"crate_fast/kernels/{name}" for name in KERNELS]
