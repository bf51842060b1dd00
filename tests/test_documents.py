"""What README, docs and CONTRIBUTING tell to type is understood as typed, and what a laptop can do is done at toy size."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from crate_fast import CRATE_tiny, inspection
from crate_fast.checkpoint import save_checkpoint, save_model
from crate_fast.commands.main import build_parser, main
from crate_fast.eval_transform import Transform
from crate_fast.model import CRATE

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|\.venv/bin/[^`\s]+|python|crate-fast) [^`]+)`")
TOY = ["--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8", "--epochs", "1", "--device", "cpu"]
OTHERS = (
    "pre-commit", "pip", "pytest", "build", "twine", "venv",
    "main.py", "finetune.py", "vis_utils/crate_hook.py", "crate_fast.timm",
)  # fmt: skip
"""Programs that are not ours; nothing but their names is looked at."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[str]:
    """Every command that a page tells to type, without what a shell does with it."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [
        *re.split(r"\n|&&", text),
        *(" ".join(words.split()) for words in INLINE.findall(page.read_text(encoding="utf-8"))),
    ]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#") and "=$(" not in line]


class Parsed(Exception):
    """Raised in place of what a program would do with its arguments."""


def parse_script(path: Path, words: list[str], monkeypatch) -> None:
    """Raises unless the parser of the program at `path`, a benchmark or a trial in tests/, takes `words`."""

    original = argparse.ArgumentParser.parse_args

    def parse(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(path), *words])
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def understand(line: str, monkeypatch) -> None:
    """Raises unless the program that `line` calls takes the rest of it."""
    words = shlex.split(line, comments=True)
    words = words[words[0] == "sudo" :]
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, check=True, capture_output=True)
        given = dict(word.split("=", 1) for word in rest if "=" in word)
        if rest[0] in ("train", "bench") and "ARGS" in given:
            script = {"train": "crate-fast train", "bench": "python benchmarks/run.py"}[rest[0]]
            understand(f"{script} {given['ARGS']}", monkeypatch)
    elif program in ("torchrun", "sbatch"):  # `-m crate_fast` is crate-fast; the script for Slurm trains
        start = rest.index("crate_fast") + 1 if program == "torchrun" else rest.index("examples/slurm.sh") + 1
        build_parser().parse_args(rest[start:] if program == "torchrun" else ["train", *rest[start:]])
    elif program == "crate-fast" or rest[:2] == ["-m", "crate_fast"]:
        rest = rest if program == "crate-fast" else rest[2:]
        with pytest.raises(SystemExit, match="0") if len(rest) < 2 else contextlib.nullcontext():  # a subcommand's name alone
            build_parser().parse_args(rest if len(rest) > 1 else [*rest, "--help"])
    elif program == "python" and rest[0].startswith(("benchmarks/", "tests/")):
        parse_script(ROOT / rest[0], rest[1:], monkeypatch)
    else:
        assert {program, *rest[:2]} & set(OTHERS), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood_as_typed(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        if line.split()[-1] in ("--help", "--version"):
            continue
        try:
            understand(line, monkeypatch)
        except (SystemExit, subprocess.CalledProcessError) as error:
            pytest.fail(f"{page.name}: {line}: {getattr(error, 'stderr', error)}")


@pytest.mark.slow
def test_the_readme_is_gone_through(monkeypatch, tmp_path, capsys):
    """From training to a picture, as README has it, but of a model that takes seconds."""
    import sklearn.datasets

    monkeypatch.chdir(tmp_path)
    photos = Path(sklearn.datasets.__path__[0]) / "images"
    monkeypatch.setenv("PHOTOS", str(photos))
    for name in ("china", "flower"):  # what the reader has in DIR
        for number in range(3):
            Path("DIR", name).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / f"{name}.jpg", Path("DIR", name, f"{number}.jpg"))
    own = {"PHOTO...": str(photos / "china.jpg"), "FOLDER...": "DIR/flower"}
    assert main(["train", "--out", "runs/mine", *TOY]) == 0
    done = []
    for line in commands(ROOT / "README.md"):
        words = [own.get(word, word) for word in shlex.split(os.path.expandvars(line), comments=True)]
        if words[0] == ".venv/bin/crate-fast" and {"runs/mine", "runs/photos", "maps"} & set(words):
            assert main([*words[1:], *(["--epochs", "1"] if words[1] == "train" else [])]) == 0, (line, capsys.readouterr().err)
            done.append(words[1])
    assert {"train", "predict", "evaluate", "inspect", "segment", "explore", "convert"} <= set(done)
    assert (
        list(Path("views").iterdir())
        and list(Path("maps").iterdir())
        and Path("mine.pth.tar").is_file()
        and Path("page.html").is_file()
    )


def test_python_blocks_run(monkeypatch, tmp_path):
    """README's and docs' Python, with what they leave to the reader; what asks the Hub is not run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small = CRATE(image_size=16, patch_size=8, num_classes=3, dim=32, depth=2, heads=2, dim_head=16)
    (tmp_path / "runs").mkdir()
    save_model(small, "runs/mine")
    small.transform = Transform(0.875, (0.5,) * 3, (0.5,) * 3, ("one", "two", "three"))
    save_model(small, "runs/photos")
    Image.new("RGB", (20, 30)).save("photo.jpg")
    save_checkpoint(CRATE_tiny(), "published.pth.tar")
    for page in PAGES:
        images = torch.rand(2, 3, *((224, 224) if page.name == "README.md" else (16, 16)))
        given = {
            "images": images,
            "labels": torch.tensor([0, 1]),
            "w": torch.rand(1, 5, 32),
            "heads": 2,
            "inspection": inspection,
            "CRATE": CRATE,
            "model": small,
        }
        for block in blocks(page, "python"):
            code = "\n".join(line for line in block.splitlines() if "ORGANISATION" not in line)
            exec(compile(code, str(page), "exec"), given)
