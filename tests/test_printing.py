"""Nobody who reads what is printed, or no room for it, ends what a command does."""

import subprocess
import sys

import pytest

from crate_fast import streams

PRINTS = """
import importlib.util, os, sys
found = importlib.util.spec_from_file_location("streams", sys.argv[1])
streams = importlib.util.module_from_spec(found)
found.loader.exec_module(streams)
files = streams.keep_printing()
with open(sys.argv[2], "w") as other:
    for line in range(20_000):
        print(line)
        print(line, file=sys.stderr)
    sys.stdout.flush()
    print("whole", file=other)
os._exit(70 if any(file.failed for file in files) else 0)
"""
GOES = [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | head -1", "2>&1 | :"]


def shell(tmp_path, line: str) -> int:
    """The exit status of a process that prints much, its streams as `line` has them; it must have come to its end."""
    program = f'"{sys.executable}" -c "$0" "$1" "$2" {line}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", program, PRINTS, streams.__file__, str(tmp_path / "other")]
    status = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode
    assert (tmp_path / "other").read_text() == "whole\n"  # and nothing that was printed
    return status


@pytest.mark.parametrize("line", GOES)
def test_a_command_goes_on_where_nobody_reads(tmp_path, line):
    assert shell(tmp_path, line) == 0


@pytest.mark.parametrize("line", [">/dev/full", "2>/dev/full"])
def test_what_is_lost_on_a_full_disk_is_known_at_the_end(tmp_path, line):
    assert shell(tmp_path, line) == 70


@pytest.mark.slow
def test_a_run_ends_well_with_everything_closed(tmp_path):
    sizes = "--dim 16 --depth 1 --heads 1 --epochs 1 --device cpu --num-threads 1"
    line = f'"{sys.executable}" -m crate_fast train {sizes} --out "{tmp_path}/run" >&- 2>&-'
    assert subprocess.run(["bash", "-c", line], timeout=120).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
