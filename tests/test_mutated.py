"""Whatever is in a file that a command reads, it is used or refused in one line; `make fuzz` goes on for an hour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_changed_files_of_every_kind_are_used_or_refused_in_a_line():
    """In a process of its own: cases are forked from it, which one that has trained in parts does not survive."""
    script = Path(__file__).with_name("fuzz.py")
    paths = [str(script.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, script, "--rounds", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
