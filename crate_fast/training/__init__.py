"""Training and evaluating CRATE: settings in, a run directory out."""

from ..data.loader import UnreadableError
from ..settings import ConfigError, TrainConfig
from ..signals import Stopped
from .checkpoints import SavingError
from .evaluation import evaluate_run
from .loop import TrainingError
from .resolve import resolve
from .run import train

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
