"""What a shell completes of a command line is what the command takes."""

import shutil
import subprocess

import pytest
from conftest import call

from crate_fast.commands.main import SUMMARIES

BASH = shutil.which("bash")
ASK = """
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_TYPE=9; COMPREPLY=()
set -- $(complete -p crate-fast); while [ "$1" != -F ]; do shift; done
"$2" crate-fast "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What bash is given, in a folder with one file."""
    pytest.importorskip("shtab")
    from contextlib import redirect_stdout

    from crate_fast.commands.main import main

    folder = tmp_path_factory.mktemp("completion")
    with (folder / "crate-fast.bash").open("w") as file, redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return folder / "crate-fast.bash"


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", set(SUMMARIES)),
        ("tr", {"train"}),
        ("train --optim", {"--optimizer"}),
        ("finetune --rand", {"--randomaug", "--rand_aug_n", "--rand_aug_m", "--randaugment-ops", "--randaugment-magnitude"}),
        ("train --arch CRATE_t", {"CRATE_tiny"}),
        ("evaluate --backend t", {"triton", "torch"}),
        ("train --tensorboard ", {"no", "yes"}),
        ("evaluate crate", {"crate-fast.bash"}),
        ("train --init crate", {"crate-fast.bash"}),
        ("completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes_subcommands_flags_names_and_files(script, line, found):
    *words, last = line.split(" ")
    asked = ASK.format(words=" ".join(["crate-fast", *words, f"'{last}'"]))
    command = [BASH, "--norc", "-c", f"source {script}\n{asked}"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=True)
    given = {word for word in done.stdout.split() if line or not word.startswith("-")}
    assert given == found, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_flag_is_in_the_other_shells_scripts(shell, capsys):
    pytest.importorskip("shtab")
    status, out, err = call(capsys, "completion", shell)
    assert (status, err) == (0, "")
    assert all(name in out for name in (*SUMMARIES, "optimizer", "CRATE_large"))


def test_without_shtab_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None)
    assert call(capsys, "completion", "bash") == (
        2,
        "",
        "crate-fast: error: this needs shtab: pip install 'crate-fast[completion]'\n",
    )
