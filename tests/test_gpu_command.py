"""`make gpu` as far as it goes without a GPU: commands that their targets accept, limits, no speed without parity."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import BENCHMARKS

import gpu
import run
from crate_fast.cli import build_parser

COMMANDS = [command for stage in gpu.stages(gpu.RESULTS, "device").values() for command in stage.commands]


def parse(command: list[str], precision) -> None:
    """Has the target of a command parse its arguments; it ends the process where it does not take them."""
    if command[:3] == ["-m", "crate_fast", "tune"]:
        build_parser().parse_args(command[2:])
    elif command[0] == "benchmarks/run.py":
        run.parse(command[1:])
    else:
        assert command[0] == "benchmarks/precision.py"
        precision.parse(command[1:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[1] != "pytest"], ids=shlex.join)
def test_what_is_called_takes_its_arguments(command, precision):
    parse(command, precision)


def test_the_tests_it_runs_cover_devices_dtypes_widths_sizes_and_streams():
    (command,) = (c for c in COMMANDS if c[1] == "pytest")
    result = subprocess.run(
        [sys.executable, *command, "--collect-only"], cwd=gpu.ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    text = result.stdout
    assert "[cpu" not in text
    for size in gpu.SIZES:
        assert f"test_16_bit_gradients_are_as_exact_as_the_published_code[{size}-bfloat16]" in text
        for row in ("float32-auto", "bfloat16-auto", "bfloat16-float32", "float16-auto", "float16-float16"):
            assert f"test_models_have_parity[{size}-inference-{row}]" in text
    for width in (16, 24, 48, 64, 80, 128):
        for dtype in (torch.float16, torch.bfloat16):
            name = f"{dtype}".removeprefix("torch.")
            assert (
                f"test_mssa_in_half_precision_is_no_worse_than_the_published_operations[cuda-{name}-{width}]" in result.stdout
            )


def test_it_all_fits_in_25_minutes_of_calls_of_ten():
    limits = [stage.seconds for stage in gpu.stages(gpu.RESULTS, "device").values()]
    assert sum(limits) <= 25 * 60
    assert max(limits) <= 9 * 60


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Runs stages made of Python programs; (status, whether the last of them ran)."""
    facts = {"device": "some GPU", "driver": None, "torch": "", "triton": ""}
    monkeypatch.setattr(gpu, "machine", lambda device: facts)

    def start(names: str, seconds: float = 60, **programs: str) -> tuple[int, bool]:
        last = tmp_path / "last"
        programs = {"parity": "", "tune": "", "run": f"open({str(last)!r}, 'w')"} | programs
        stages = {name: gpu.Stage(seconds, [["-c", program]]) for name, program in programs.items()}
        monkeypatch.setattr(gpu, "stages", lambda out, device: stages)
        status = gpu.run_stages(gpu.parse(["--stages", names]), tmp_path)
        return status, last.exists()

    return start


def test_parity_once_passed_lets_these_sources_be_timed(stand_in, monkeypatch, capsys):
    assert stand_in("run") == (2, False)
    assert "no speed without parity" in capsys.readouterr().err
    assert stand_in("parity,tune") == (0, False)
    assert stand_in("run") == (0, True)
    monkeypatch.setattr(gpu, "digest", lambda: "other sources")
    assert stand_in("run")[0] == 2


@pytest.mark.parametrize(
    ("program", "seconds", "words"),
    [("raise SystemExit(3)", 60, "exit status 3"), ("while True: pass", 2, "cut off after 2 s")],
)
def test_a_stage_that_fails_or_takes_too_long_is_the_last(stand_in, capsys, program, seconds, words):
    assert stand_in("parity,tune,run", seconds, parity=program) == (1, False)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--stages", "speed"], "--stages names 'speed'; allowed are parity"), (["--out", __file__], "no directory")],
)
def test_wrong_arguments_are_named(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_what_it_would_run_is_shown_without_a_gpu(capsys):
    assert gpu.main(["--dry-run", "--stages", "tune"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "tune, at most 300 s:"


def test_without_a_gpu_it_is_one_line():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "gpu.py: error: this command needs a CUDA GPU, and PyTorch finds none here\n"
