"""The directory of a run: what was asked, what was measured, what was learned."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..checkpoint.distributed import SUFFIX
from ..checkpoint.read import MODEL_NAME
from ..files import names_something, naming, open_own, parse_json, remove, write_atomically
from ..locks import lock
from ..settings import ConfigError, TrainConfig

RUNS = Path("runs")
START = "resumed_from"  # in config.json
LENGTHENED = "lengthened"  # likewise: at which step it had how many epochs, before it was given more
MOST_STEPS = 2**53  # of a run: what is more is no number of its metrics
TEMPORARY = ".*.tmp"  # what is written aside, see `write_atomically`
NO_RUN = (
    "is neither a run directory nor a checkpoint in one or of main.py; to start from weights alone, which have no optimizer: "
    "--init"
)
PACKAGES = (
    *("crate-fast", "torch", "triton", "lion-pytorch", "numpy", "opencv-python-headless", "pillow", "safetensors"),
    *("scikit-learn", "simplejpeg"),
)


class RunDirectory:
    """Paths in a run directory, and writing to them. `create` makes one; the constructor takes one that exists."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.held_out = self.path / "held-out.json"
        self.metrics = self.path / "metrics.jsonl"
        self.rates = self.path / "rates.png"
        self.curves = self.path / "curves.png"
        self.reconstructions = self.path / "reconstructions.png"
        self.tensorboard = self.path / "tensorboard"
        self.trace = self.path / "trace.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / MODEL_NAME

    @classmethod
    def create(cls, out: str | None, name: str) -> RunDirectory:
        """Makes the directory `out`, or with None a new one under runs/, called by `name` and the time, and locks it.

        Raises:
            ConfigError: `out` exists and is not an empty directory, or cannot be made, or a run is making it.
        """
        run = cls(_make_new(name) if out is None else _make(Path(out)))
        run.lock()
        run.tidy()
        run.checkpoints.mkdir(exist_ok=True)
        return run

    def lock(self, who: str = "a run that is not over") -> None:
        """Keeps other runs out of the directory until this process ends, however it ends.

        Raises:
            ConfigError: `who`, in words, is in it.
        """
        if not lock(self.path):
            raise ConfigError(f"{self.path}: {who} is in it")

    def tidy(self) -> None:
        """Removes what a run that was killed has left half written; for who holds the lock."""
        for folder in (self.path, self.checkpoints):
            for aside in folder.glob(TEMPORARY):
                remove(aside)

    def write_config(self, config: dict) -> None:
        """Writes config.json: `config`, and the versions of everything that computes."""
        self._write(config | {"versions": versions()})

    def _write(self, content: dict) -> None:
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def lengthen(self, epochs: int, steps: int, step: int) -> None:
        """Has config.json say that the run, after `step` steps, goes on to `epochs` epochs, `steps` steps in all."""
        content = self._read()
        before = {"epochs": content["config"]["epochs"], "step": step}
        content["config"]["epochs"], content["resolved"]["steps"] = epochs, steps
        self._write(content | {LENGTHENED: [*content.get(LENGTHENED, []), before]})

    def former_epochs(self) -> list[int]:
        """The numbers of epochs that config.json had before it was lengthened."""
        former = self._read().get(LENGTHENED, [])
        return [one["epochs"] for one in former if isinstance(one, dict) and type(one.get("epochs")) is int]

    def write_held_out(self, names: list[str]) -> None:
        """Writes held-out.json: the images of a folder on which the run is evaluated and not trained, a line each."""
        text = json.dumps(names, indent=0) + "\n"
        write_atomically(self.held_out, lambda file: file.write(text.encode()))

    def log(self, **row) -> None:
        """Adds one line to metrics.jsonl; a number that is not finite is null in it."""
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        with naming(self.metrics), open_own(self.metrics, "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def logged(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk."""
        with naming(self.metrics), open_own(self.metrics, "a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut_log(self, length: int) -> None:
        """Takes off metrics.jsonl what was written after its first `length` bytes.

        Raises:
            ConfigError: it is shorter.
        """
        if length and not self.metrics.exists():
            raise ConfigError(f"{self.metrics}: missing; the last checkpoint was written after its first {length:,} bytes")
        with naming(self.metrics), open_own(self.metrics, "ab") as file:
            if length > file.tell():
                raise ConfigError(f"{self.metrics}: shorter than at the last checkpoint")
            file.truncate(length)

    def check_begun(self, checkpoint_every: int) -> None:
        """For a run in whose folder there is no checkpoint: raises ConfigError where it must have had one."""
        rows = self.read_metrics() if self.metrics.exists() else []
        if self.model.exists() or any(row["epoch"] > checkpoint_every for row in rows):
            words = "the checkpoints that this run had written are gone; bring them back, or begin another run elsewhere"
            raise ConfigError(f"{self.checkpoints}: {words}")

    def read_config(self) -> TrainConfig:
        """The settings in config.json, with the precision that "auto" turned out to mean.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        config = self._read()
        try:
            return TrainConfig(**config["config"] | {"precision": config["resolved"]["precision"]})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.config}: not the configuration of a run ({error})") from error

    def _read(self) -> dict:
        """What config.json holds: a dictionary whose "data" are one too; raises ConfigError where it is damaged."""
        try:
            content = parse_json(self.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self.config}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{self.config}: not the configuration of a run ({error})") from error
        if not isinstance(content, dict) or not isinstance(content.setdefault("data", {}), dict):
            raise ConfigError(f"{self.config}: not the configuration of a run (no table, or its data are none)")
        return content

    def read_data(self) -> dict:
        """What config.json says of the data; raises ConfigError where it is damaged."""
        return self._read()["data"]

    def read_start(self) -> Path | None:
        """The checkpoint of the published main.py from which the run went on, or None."""
        start = self._read().get(START)
        return Path(start) if isinstance(start, str) and names_something(start) else None

    def read_steps(self) -> int:
        """The steps of the whole run; raises ConfigError where config.json is damaged."""
        resolved = self._read().get("resolved")
        steps = resolved.get("steps") if isinstance(resolved, dict) else None
        if type(steps) is not int or not 0 < steps < MOST_STEPS:
            raise ConfigError(f"{self.config}: not the configuration of a run (steps {str(steps)[:100]})")
        return steps

    def read_launch(self) -> str | None:
        """The name of the launch that made the run, or None."""
        try:
            return self._read().get("launch")
        except ConfigError:
            return None

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl; lines that are damaged are passed over, with a warning."""
        rows, damaged = [], []
        with naming(self.metrics), open_own(self.metrics, "rb") as file:
            lines = file.read().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                if not all(0 < row[name] < MOST_STEPS for name in ("step", "epoch")):
                    raise ValueError
                if not (row["loss"] is None or math.isfinite(row["loss"])) or not math.isfinite(row.get("top1", 0.0)):
                    raise ValueError
                rows.append({"split": row["split"]} | row)
            except (ValueError, KeyError, TypeError, OverflowError):
                damaged.append(number)
        if damaged:
            message = f"{len(damaged):,} lines are damaged, line {damaged[0]} first; they are passed over"
            print(f"crate-fast: warning: {self.metrics}: {message}", file=sys.stderr)
        return rows


def find_run(resume: str, out: str | None) -> RunDirectory | None:
    """The run that `--resume` names: its directory or a checkpoint in it, or with "auto" what is in `out`; None: start one.

    Raises:
        ConfigError: there is none in the path, or `out` is another directory; or "auto" has no `out` to look in.
    """
    if resume != "auto":
        path = Path(resume)
        run = RunDirectory(path.parent.parent if path.suffix in (".pt", SUFFIX) else path)
        if not os.path.lexists(path):
            raise ConfigError(f"--resume is {resume}, which is not there")
        if not path.exists() or not run.config.is_file():
            raise ConfigError(f"--resume is {resume}, which {NO_RUN}")
        if out is not None and not (os.path.exists(out) and os.path.samefile(out, run.path)):
            raise ConfigError(
                f"--out is {out} and --resume is {resume}; a resumed run stays in its directory, {run.path}: leave --out away, "
                "or resume a copy of it"
            )
        return run
    if out is None:
        raise ConfigError("--resume is 'auto', which goes on with the run in --out DIR; --out is not given")
    run = RunDirectory(out)
    return run if run.config.is_file() else None


def check_free(out: str) -> None:
    """Raises ConfigError unless `out` is, or can be made, an empty directory; makes nothing."""
    path = Path(out)
    try:
        # A run that was killed before it had its configuration leaves half of that and an empty folder of checkpoints.
        if any(entry != path / "checkpoints" and not entry.match(TEMPORARY) for entry in path.rglob("*")):
            raise ConfigError(f"--out is {path}, which is not empty: a run needs a directory of its own, or --resume auto")
        above = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise ConfigError(f"--out is {path}, which cannot be made a directory ({error.strerror})") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = f"{above} cannot be written to" if above.is_dir() else f"{above} is a file"
        raise ConfigError(f"--out is {path}, which cannot be made a directory ({why})")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _make(path: Path) -> Path:
    check_free(str(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out is {path}, which cannot be made a directory ({error.strerror})") from error
    return path


def _make_new(name: str) -> Path:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        RUNS.mkdir(exist_ok=True)
        for attempt in range(1, 1000):
            path = RUNS / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue  # another run took the name in the same second
    except OSError as error:
        raise ConfigError(f"{RUNS} cannot be written to ({error.strerror}); choose a place with --out") from error
    raise ConfigError(f"{RUNS / stem} and 998 more exist; choose a name with --out")
