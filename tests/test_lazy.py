"""Help and errors of the command need no PyTorch, and the packages still give every name that they list."""

import ast
import inspect
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import crate_fast
from crate_fast.called import called
from crate_fast.commands.main import build_parser, main

LINES = ["--help", "train --help", "trian", "train --epoch 1", "train --lr nan", "convert a b", "predict model --top 0"]


@pytest.mark.slow
def test_help_and_errors_of_the_command_wait_for_no_pytorch():
    code = (
        "import contextlib, io, sys\nfrom crate_fast.commands.main import SUMMARIES, build_parser, main\n"
        f"for line in {LINES} + [f'{{name}} --help' for name in SUMMARIES]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        with contextlib.suppress(SystemExit):\n            assert main(line.split()) == 2\n"
        "    assert 'help' in line or err.getvalue().count('\\n') == 1, line\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'triton'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["crate_fast", "crate_fast.training"])
def test_a_package_gives_what_it_lists_and_a_type_checker_sees_the_same(package):
    module = import_module(package)
    tree = ast.parse(inspect.getsource(module))
    seen = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name in module.__all__:
        assert name in dir(module)
        value = getattr(module, name)
        assert value is crate_fast.__version__ or name in seen
        assert not inspect.ismodule(value) or name == "functional"  # no module of its name is in its place
    submodule = "checkpoint" if package == "crate_fast" else "metrics"  # as where they were imported with the package
    assert getattr(module, submodule).__name__ == f"{package}.{submodule}"
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_a_word_that_is_nearly_right_is_asked_about(capsys):
    for line, meant in {"trian": "train", "train --epoch 1": "--epochs", "evaluate x --precision Flaot32": "float32"}.items():
        with pytest.raises(SystemExit):
            main(line.split())
        assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("some where/crate-fast", "'some where/crate-fast'"),
        ("/usr/lib/python3/crate_fast/__main__.py", f"{shlex.quote(sys.executable)} -m crate_fast"),
        ("/usr/bin/pytest", "crate-fast"),
        ("", "crate-fast"),
    ],
)
def test_a_command_that_is_suggested_can_be_pasted(monkeypatch, program, start):
    monkeypatch.setattr("sys.argv", [program])
    assert called("train", "--resume", Path("a run's")) == f"""{start} train --resume 'a run'"'"'s'"""


def test_case_does_not_matter_in_names():
    parse = build_parser().parse_args
    assert parse(["Evaluate", "run", "--precision", "FLOAT32", "--arch", "crate_TINY"]).precision == "float32"
    assert parse(["train", "--augment", "RandAugment", "--arch", "crate_tiny", "--optimizer", "lion"]).augment == "randaugment"
    assert parse(["train", "--arch", "CRATE_Base"]).arch == "CRATE_base"


@pytest.mark.parametrize("words", [["train"], ["finetune"], ["evaluate", "run"]], ids=" ".join)
def test_a_bare_install_names_the_extra_that_a_command_needs(words):
    absent = ("PIL", "numpy", "sklearn", "torchvision")
    code = f"import sys; sys.modules |= dict.fromkeys({absent})\n"
    code += f"from crate_fast.commands.main import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("crate-fast: error: this needs ")
    assert done.stderr.splitlines()[-1].endswith(": pip install 'crate-fast[train]'")
