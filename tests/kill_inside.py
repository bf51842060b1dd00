"""Kills a run inside the writing of each of its files, lets it go on, and compares what it ends with and what it leaves.

    python tests/kill_inside.py            # 100 kills of one process and of two, about half an hour on two cores
    python tests/kill_inside.py --ranks 1 --kills 20

It must end with the weights and metrics of a run never killed, and with the same files and no others.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import signal
import tempfile
from pathlib import Path

from kill import Attempt, make_data, outcome

WRITTEN = ("open", "half", "whole", "flushed")  # of the file beside, before it has its name
NAMED = ("rename", "renamed")
FILES = [
    *((f".{name}.*.tmp", moment) for name in ("config.json", "model.safetensors", "curves.png") for moment in WRITTEN),
    *((name, moment) for name in ("config.json", "model.safetensors", "curves.png") for moment in NAMED),
    *((".step-*.tmp", moment) for moment in WRITTEN),
    *(("step-*.pt", moment) for moment in (*NAMED, "remove")),
    *(("last.pt", moment) for moment in NAMED),
    *(("metrics.jsonl", moment) for moment in ("open", "torn", "whole", "flushed")),
]
"""(pattern of a file's name, moment) of everything that a run writes."""
ONCE = re.compile("config|model|curves")  # in a run; others come again and again


def files_of(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def place(pattern: str, moment: str, draw: random.Random) -> str:
    """When to kill, as sitecustomize.py reads it; late enough for something to have been done since the last time."""
    return f"{pattern} {moment} {1 if ONCE.search(pattern) else draw.randint(3, 9)}"


def compare(folder: Path, ranks: int, kills: int) -> None:
    """Raises SystemExit unless runs killed so many times, all together, end as one never killed."""
    data, straight, draw = make_data(folder, "folder"), folder / f"straight-{ranks}", random.Random(ranks)
    Attempt(data, straight, ranks, 0).finish()
    right, files = outcome(straight), files_of(straight)
    killed, runs, missed = dict.fromkeys(FILES, 0), 0, 0
    turns, again = itertools.cycle(FILES), []
    while sum(killed.values()) < kills:
        out, ended = folder / f"killed-{ranks}-{runs}", False
        while not ended:
            turn = (again.pop() if again else next(turns)) if sum(killed.values()) < kills else None
            attempt = Attempt(data, out, ranks, 0, kill=place(*turn, draw) if turn else "")
            ended = attempt.process.wait(timeout=900) == 0
            if not ended:
                if not turn or not was_killed(attempt, ranks):
                    raise SystemExit(f"the run failed, {turn}: {attempt.log()}")
                killed[turn] += 1
            elif turn:
                missed += 1
                again.append(turn)  # the next run comes to it: settings are written once, at its start
        if outcome(out) != right or files_of(out) != files:
            raise SystemExit(f"{out.name}: another outcome, or other files: {sorted(set(files_of(out)) ^ set(files))}")
        runs += 1
    never = [f"{pattern} {moment}" for (pattern, moment), count in killed.items() if not count]
    if never and kills >= 2 * len(FILES):
        raise SystemExit(f"{ranks} processes: never killed at {', '.join(never)}")
    print(
        f"{ranks} processes: killed {sum(killed.values())} times at {sum(map(bool, killed.values()))} of {len(FILES)} moments "
        f"({missed} came to an end before), {runs} runs: the same weights, the same {len(right[1])} lines of metrics, the same "
        f"{len(files)} files"
    )


def was_killed(attempt: Attempt, ranks: int) -> bool:
    return attempt.process.returncode == -signal.SIGKILL if ranks == 1 else "Signal 9 (SIGKILL)" in attempt.log()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for ranks in arguments.ranks:
            compare(Path(name), ranks, arguments.kills)
