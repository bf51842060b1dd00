"""What is built of the project holds every file once, under the name that it is imported by."""

import os
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
KINDS = (".py", ".toml", ".html", ".cpp")
FILES = [path for folder in ("crate_fast", "kernels") for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
OURS = sorted({path.relative_to(ROOT).as_posix() for path in (*FILES, ROOT / "crate_fast" / "py.typed")
               if not path.is_relative_to(ROOT / "crate_fast" / "kernels")})  # fmt: skip


def project_files() -> list[str]:
    """Names of the project's files: those that git has, or in a source archive those that it lists."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )
    else:
        listed = (ROOT / "crate_fast.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return sorted(name for name in listed if (ROOT / name).is_file() and not name.startswith("crate_fast.egg-info/"))


def copy_sources(copy: Path) -> None:
    """Copies of the project what it is built from: its files, new ones of the packages too, and the link to the kernels."""
    for name in {*project_files(), *OURS}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "crate_fast" / "kernels").symlink_to("../kernels")


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


def test_a_source_archive_holds_what_a_checkout_does(built):
    with tarfile.open(built[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    made = {name for name in members if name.startswith("crate_fast.egg-info")} | {"", "PKG-INFO", "setup.cfg"}
    files = {name for name, member in members.items() if member.isfile()} - made
    assert files == {*project_files(), *OURS} - made
    assert not [name for name, member in members.items() if not (member.isfile() or member.isdir())]  # a link, say


@pytest.mark.slow
def test_a_source_archive_passes_its_own_tests(built, tmp_path):
    """Two of them: of the kernels, which a checkout has behind a link, and of what lies beside the packages."""
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    two = ("test_kernels.py::test_mssa_takes_any_scale", "test_site.py::test_every_page_is_in_the_sites_navigation_and_there")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--quiet",
        "--quick",
        "-p",
        "no:cacheprovider",
        *(f"tests/{name}" for name in two),
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def metadata(built):
    """What the wheel says of itself."""
    with zipfile.ZipFile(built[1]) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(wheel.read(path).decode())


def test_all_is_every_extra_but_those_of_the_project_itself_and_each_is_explained(metadata):
    (own,) = (line for line in metadata.get_all("Requires-Dist") if line.endswith('extra == "all"'))
    extras = set(metadata.get_all("Provides-Extra"))
    assert set(re.search(r"\[(.*)\]", own)[1].split(",")) == extras - {"all", "docs", "test"}
    told = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for cell in told for name in re.findall(r"\w+", cell)} == extras


def test_there_is_one_version(metadata):
    assert metadata["Version"] == crate_fast.__version__
    assert f"\n## {crate_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
