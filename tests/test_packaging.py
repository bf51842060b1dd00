"""What is built of the project holds every file once, under the name that it is imported by."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import crate_fast.kernels

ROOT = Path(__file__).parent.parent
KINDS = (".py", ".toml", ".html")
FILES = [path for folder in ("crate_fast", "kernels") for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
OURS = sorted({path.relative_to(ROOT).as_posix() for path in (*FILES, ROOT / "crate_fast" / "py.typed")
               if not path.is_relative_to(ROOT / "crate_fast" / "kernels")})  # fmt: skip


def copy_sources(copy: Path) -> None:
    """Copies of the project what it is built from."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("crate_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, copy)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source archive, wheel), of a copy of the project."""
    copy = tmp_path_factory.mktemp("built") / "copy"
    copy_sources(copy)
    build = "import setuptools.build_meta as b; print(b.build_sdist('out'), b.build_wheel('out'), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True)
    return [copy / "out" / name for name in done.stdout.splitlines()[-2:]]


@pytest.mark.slow
def test_a_checkout_has_its_kernels_without_being_installed():
    command = [sys.executable, "-c", "import crate_fast.kernels; print(crate_fast.kernels.__file__)"]
    found = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).resolve() == (ROOT / "kernels" / "__init__.py").resolve() == Path(crate_fast.kernels.__file__).resolve()


def test_a_script_beside_a_clone_of_the_packages_name_finds_the_package(tmp_path):
    mode = re.search(r"editable_mode=(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    clone = tmp_path / "crate_fast"
    copy_sources(clone)
    build = f"import setuptools.build_meta as b; print(b.build_editable('out', {{'editable_mode': {mode!r}}}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(clone / "out" / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    script = "import crate_fast, importlib.util as u; print(crate_fast.__file__, u.find_spec('crate_fast.kernels').origin)"
    start = f"import site, sys; site.addsitedir('site'); sys.path.insert(0, {str(tmp_path)!r}); {script}"
    command = [sys.executable, "-S", "-c", start]
    found = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(clone / "crate_fast" / "__init__.py"), str(clone / "crate_fast" / "kernels" / "__init__.py")]


def test_a_wheel_holds_every_file_of_the_packages_once_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(f"crate_fast/{name}" if name.startswith("kernels/") else name for name in OURS)


def test_a_source_archive_holds_them_as_the_checkout_does_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    assert sorted(name for name in names if name.startswith(("crate_fast/", "kernels/"))) == OURS
    assert not [name for name in names if name.startswith("tests")]
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= set(names)


def test_there_is_one_version(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(wheel.read(path).decode())
    assert metadata["Version"] == crate_fast.__version__
    assert f"\n## {crate_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
