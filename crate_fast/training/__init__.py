"""Training and evaluating CRATE: settings in, a run directory out."""

from .config import ConfigError, TrainConfig
from .evaluation import evaluate_run
from .images import UnreadableError
from .loop import TrainingError
from .resolve import resolve
from .run import train
from .saving import SavingError
from .stop import Stopped

__all__ = [
    "ConfigError",
    "SavingError",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "UnreadableError",
    "evaluate_run",
    "resolve",
    "train",
]
