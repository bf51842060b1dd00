"""Mutates every kind of file that a command reads and runs the command on it: a line or a result, and nothing else.

    python tests/fuzz.py                 # an hour, each case its own seed; `make fuzz` does it too
    python tests/fuzz.py --minutes 5     # or so long; --seed N begins elsewhere, --kinds image pack takes only these
    python tests/fuzz.py --case image 17 # one case again, with what it printed

Every case is a process of its own, forked from one that has imported everything. Wrong are: a traceback, a status that is
neither success nor 2, more than one line of error, a file made or a program started by what was read, more than 2 GB, 20 s.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes share no threads

import torch
from helpers import mutations
from helpers.fuzzed import KINDS, FileKind, ending, make_corpus

from crate_fast import CRATE
from crate_fast.commands.main import USER_ERRORS, main

MEMORY = 2 << 30
SECONDS = 20
BLOCKED = 120  # seconds of one that does nothing: it waits for what does not come
STOPPED = 5  # seconds after which a run that was only asked to be long is told to stop


def attempt(name: str, random: Random, corpus: Path, here: Path) -> tuple[str, str | None]:
    """Runs a case of the kind `name` in the new folder `here`: (how it ended, what is wrong with that or None)."""
    kind = KINDS[name]
    here.mkdir()
    for need in kind.needs:
        if (corpus / need).is_dir():
            shutil.copytree(corpus / need, here / need, symlinks=True)
        else:
            shutil.copyfile(corpus / need, here / need)
    if name == "safetensors":
        shutil.copyfile(corpus / "images" / "png.png", here / "x.png")
    kind.change(random, here)
    words = random.choice(kind.commands)
    process = os.fork()
    if not process:
        with ending(), open(here / ".out", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os.chdir(here)
            _guard()
            sys.exit(_call(words))
    status, usage, seconds = _wait(process, kind.asked)
    text = (here / ".out").read_text(errors="replace")
    wrong = _judge(kind, status, usage, text) or ("code was run" if list(here.rglob(mutations.CANARY)) else None)
    return ("done" if status == 0 else "refused" if status == 2 else f"ended {status}"), wrong and (
        f"{wrong}: {' '.join(words)} ({seconds:.1f} s)\n{text[-1500:]}"
    )


def _guard() -> None:
    """Ends this process where it starts a program, which no command on these files does but `prepare`'s workers."""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(number, "w", closefd=False)
        setattr(sys, stream, io.TextIOWrapper(raw, errors="backslashreplace", write_through=True))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def look(event: str, arguments: tuple) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn", "subprocess.Popen"):
            words = str(arguments)
            if "multiprocessing" not in words and "forkserver" not in words and "ldconfig" not in words:
                print(f"a program was started: {words[:300]}", flush=True)
                os._exit(71)

    sys.addaudithook(look)


def _call(words: list[str]) -> int:
    if words[0] != "from_pretrained":
        return main(words)
    try:
        CRATE.from_pretrained(words[1])
    except USER_ERRORS as error:
        print(f"crate-fast: error: {error}", file=sys.stderr)
        return 2
    return 0


def _busy(process: int) -> float:
    """The processor's seconds that a process has had: a machine that does other things too makes no case slow."""
    return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def _wait(process: int, asked: bool) -> tuple[int, resource.struct_rusage, float]:
    """(status, what it used, seconds): the negative number of a signal where one ended it."""
    start, told = time.monotonic(), False
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended:
            return os.waitstatus_to_exitcode(status), usage, seconds
        if seconds > SECONDS and (_busy(process) > SECONDS or seconds > BLOCKED):
            os.kill(process, signal.SIGKILL)
        elif asked and not told and seconds > STOPPED:
            os.kill(process, signal.SIGTERM)
            told = True
        time.sleep(0.002)


def _judge(kind: FileKind, status: int, usage, text: str) -> str | None:
    """What is wrong with an end, in words."""
    lines = [line for line in text.splitlines() if "error:" in line]
    if "Traceback" in text or status in (70, 71):
        return "a traceback" if status != 71 else "a program was started"
    if status == -signal.SIGKILL:
        return f"longer than {SECONDS} s"
    if usage.ru_maxrss > MEMORY >> 10:
        return f"{usage.ru_maxrss >> 10} MiB"
    if status not in ((0, 2, 128 + signal.SIGTERM) if kind.asked else (0, 2)):
        return f"status {status}"
    if status == 2 and (len(lines) != 1 or text.splitlines()[-1] != lines[0]):
        return "not one line of error"
    if not kind.asked and ("out of memory" in text or "not enough memory" in text):
        return f"more than {MEMORY >> 30} GB asked for"
    return None


def fuzz(seconds: float, rounds: int | None, seed: int, kinds: list[str], corpus: Path, folder: Path) -> int:
    """Cases of all `kinds` in turn, for so long or so many; prints what is wrong, and counts; how many were wrong."""
    counts: dict[str, Counter] = {name: Counter() for name in kinds}
    end, first = time.monotonic() + seconds, seed
    while time.monotonic() < end and seed - first != rounds:
        for name in kinds:
            here = folder / "case"
            how, wrong = attempt(name, Random(f"{name} {seed}"), corpus, here)
            counts[name]["wrong" if wrong else how] += 1
            if wrong:
                print(f"WRONG: --case {name} {seed}: {wrong}\n", flush=True)
            shutil.rmtree(here)
        seed += 1
    for name, count in counts.items():
        print(f"{name:12} {sum(count.values()):6}: {', '.join(f'{number} {how}' for how, number in sorted(count.items()))}")
    return sum(count["wrong"] for count in counts.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="a case of each kind in one; no more than these, if given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name) / "corpus")
        if arguments.case is not None:
            kind, seed = arguments.case
            print(*attempt(kind, Random(f"{kind} {seed}"), corpus, Path(name) / "case"))
            print((Path(name) / "case" / ".out").read_text(errors="replace"))
            sys.exit()
        wrong = fuzz(60 * arguments.minutes, arguments.rounds, arguments.seed, arguments.kinds, corpus, Path(name))
        sys.exit(wrong > 0)
