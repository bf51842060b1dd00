"""Training and evaluating CRATE: settings in, a run directory out."""

from .config import ConfigError, TrainConfig
from .evaluation import evaluate_run
from .loop import TrainingError, train

__all__ = ["ConfigError", "TrainConfig", "TrainingError", "evaluate_run", "train"]
