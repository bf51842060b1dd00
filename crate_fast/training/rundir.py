"""The directory of a run: what was asked, what was measured, what was learned."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..checkpoint import write_atomically
from .config import ConfigError, TrainConfig

RUNS = Path("runs")
PACKAGES = ("crate-fast", "torch", "triton", "lion-pytorch", "numpy", "safetensors", "scikit-learn")


class RunDirectory:
    """Paths in a run directory, and writing to them. `create` makes one; the constructor takes one that exists."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.pt"
        self.model = self.path / "model.safetensors"

    @classmethod
    def create(cls, out: str | None, name: str) -> RunDirectory:
        """Makes the directory `out`, or with None a new one under runs/, called by `name` and the time.

        Raises:
            ConfigError: `out` exists and is not an empty directory, or cannot be made.
        """
        run = cls(_make_new(name) if out is None else _make(Path(out)))
        run.checkpoints.mkdir()
        return run

    def write_config(self, config: dict) -> None:
        """Writes config.json: `config`, and the versions of everything that computes."""
        text = json.dumps(config | {"versions": versions()}, indent=2) + "\n"
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def log(self, **row) -> None:
        """Adds one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def read_config(self) -> TrainConfig:
        """The settings in config.json, with the precision that "auto" turned out to mean.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
            return TrainConfig(**config["config"] | {"precision": config["resolved"]["precision"]})
        except OSError as error:
            raise ConfigError(f"{self.config}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.config}: not the configuration of a run ({error})") from error

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


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
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigError(f"--out is {path}, which is not empty: a run needs a directory of its own")
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
