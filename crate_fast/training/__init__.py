"""Training and evaluating CRATE: settings in, a run directory out."""

from ..settings import ConfigError, TrainConfig
from .evaluation import evaluate_run
from ..data.loader import UnreadableError
from .loop import TrainingError
from .resolve import resolve
from .run import train
from .checkpoints import SavingError
from ..signals import Stopped

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
