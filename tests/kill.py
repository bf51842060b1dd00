"""Kills a run again and again, lets it go on, and compares what it ends with: it must be what a run never killed ends with.

    python tests/kill.py            # 1 and 3 processes, 0 and 3 workers: six kills each, about ten minutes on two cores
    python tests/kill.py --ranks 1  # one process
    python tests/kill.py --ranks 2 --strategy fsdp
    python tests/kill.py --data packed   # packs instead of a folder

Everything that draws or sums is on: augmentation, mixup, CutMix, dropout, the mean of the weights, accumulation.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.pictures import make_folder

from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_writer import prepare

TIMING = ("images_per_second", "waiting", "memory_gib", "mfu")
STEPS_PER_EPOCH = 8
SETTINGS = [
    *("--epochs", "6", "--batch-size", "12", "--accumulate", "2", "--last-batch", "keep", "--lr", "0.001"),
    *("--augment", "randaugment", "--erase", "0.5", "--mixup", "0.2", "--cutmix", "1", "--dropout", "0.1", "--ema", "0.9"),
    *("--dim", "48", "--depth", "2", "--heads", "3", "--dim-head", "16", "--image-size", "32", "--patch-size", "8"),
    *("--clip-norm", "1", "--optimizer", "AdamW", "--log-every", "3", "--device", "cpu", "--num-threads", "1"),
    *("--checkpoint-minutes", "0.000001", "--keep-checkpoints", "3"),
]


class Attempt:
    """A process, or torchrun with its processes, that trains in `out` with `workers`, going on with what is there.

    kill: where it kills itself, see helpers/killed/sitecustomize.py.
    """

    def __init__(self, data: Path, out: Path, ranks: int, workers: int, more: tuple[str, ...] = (), kill: str = "") -> None:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        words = ["train", "--data", data, *SETTINGS, *more, "--workers", workers * ranks, "--out", out, "--resume", "auto"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if kill:
            paths = [str(Path(__file__).with_name("helpers") / "killed"), os.environ.get("PYTHONPATH", "")]
            environment |= {"KILL_INSIDE": kill, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.out = out
        with open(out.parent / f"{out.name}.log", "ab") as log:
            command = [*launcher, "crate_fast", *map(str, words)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def step(self) -> int:
        """The step of the newest checkpoint."""
        found = [int(path.stem[5:13]) for path in (self.out / "checkpoints").glob("step-*.*")]
        return max(found, default=0)

    def is_writing(self) -> bool:
        """Whether a checkpoint lies there half written."""
        return any((self.out / "checkpoints").glob(".step-*.tmp"))

    def is_evaluating(self) -> bool:
        """Whether the last line of metrics is that of an epoch's last step."""
        try:
            row = json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return False
        return row["split"] == "train" and row["step"] % STEPS_PER_EPOCH == 0

    def wait_for(self, moment: str, seconds: float = 500) -> None:
        """Returns at a "step", while "writing" or "evaluating", each after at least one step that is new and saved."""
        before, end = self.step(), time.monotonic() + seconds
        reached = {"step": lambda: True, "SIGTERM": lambda: True, "writing": self.is_writing, "evaluating": self.is_evaluating}
        while not (self.step() > before and reached[moment]()):
            if self.process.poll() is not None:
                raise SystemExit(f"the run ended before it was {moment}: {self.log()}")
            if time.monotonic() > end:
                self.kill()
                raise SystemExit(f"not {moment} within {seconds} s: {self.log()}")

    def kill(self) -> None:
        """Ends all processes of the attempt at once."""
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def stop(self, everywhere: bool) -> None:
        """Sends SIGTERM, to every process of it as schedulers do or to the first, and waits until it has saved and ended."""
        for pid in (*(_descendants(self.process.pid) if everywhere else ()), self.process.pid):
            os.kill(pid, signal.SIGTERM)
        self.process.wait(timeout=60)
        if "saved" not in self.log():
            raise SystemExit(f"the run did not save: {self.log()}")

    def log(self) -> str:
        """The last lines of what it printed."""
        return (self.out.parent / f"{self.out.name}.log").read_text()[-2000:]

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        if self.process.wait(timeout=900):
            raise SystemExit(f"the run failed: {self.log()}")


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [grandchild for child in children for grandchild in (*_descendants(child), child)]


def outcome(out: Path) -> tuple[bytes, list[dict]]:
    """What a run ended with: its weights, and its metrics without their timing."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def make_data(folder: Path, kind: str) -> Path:
    """90 images to train on and 90 to evaluate with, as a "folder" or "packed", in several packs of each split."""
    data, packs = folder / "data", folder / "packs"
    if not data.is_dir():
        make_folder(data, train=90, val=90)
    if kind == "packed":
        prepare(data, packs, Settings(short_side=36, pack_images=25), workers=1)
    return data if kind == "folder" else packs


def compare(
    folder: Path,
    ranks: int,
    workers: tuple[int, ...],
    moments: tuple[str, ...],
    more: tuple[str, ...] = (),
    kind: str = "folder",
) -> None:
    """Raises SystemExit unless a run killed at `moments`, each time with the next of `workers`, ends as one never killed."""
    data = make_data(folder, kind)
    straight, killed = folder / f"straight-{ranks}", folder / f"killed-{ranks}"
    Attempt(data, straight, ranks, workers[0], more).finish()
    for number, moment in enumerate(moments):
        attempt = Attempt(data, killed, ranks, workers[number % len(workers)], more)
        attempt.wait_for(moment)
        if moment == "SIGTERM":
            attempt.stop(everywhere=ranks == 1)
        else:
            attempt.kill()
        print(f"{ranks} processes, {workers[number % len(workers)]} workers: {moment} after step {attempt.step()}", flush=True)
    Attempt(data, killed, ranks, workers[len(moments) % len(workers)], more).finish()
    (weights, rows), (weights_killed, rows_killed) = outcome(straight), outcome(killed)
    if weights != weights_killed or rows != rows_killed:
        raise SystemExit(f"{ranks} processes: weights equal: {weights == weights_killed}, metrics equal: {rows == rows_killed}")
    print(f"{ranks} processes: {len(moments)} times stopped; the same weights and the same {len(rows)} lines of metrics")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--data", choices=("folder", "packed"), default="folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for ranks in arguments.ranks:
            moments = ("step", "writing", "evaluating", "writing", "step", "SIGTERM")
            compare(Path(name), ranks, (0, 3), moments, ("--strategy", arguments.strategy), arguments.data)
