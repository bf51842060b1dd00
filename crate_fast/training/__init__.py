"""Training and evaluating CRATE: settings in, a run directory out."""

from typing import TYPE_CHECKING

from ..errors import ConfigError, SavingError, TrainingError, UnreadableError
from ..lazy import lazily
from ..settings import TrainConfig
from ..signals import Stopped
from .resolve import resolve

if TYPE_CHECKING:
    from .evaluation import evaluate_run
    from .run import train
else:
    __getattr__, __dir__ = lazily(__name__, {"evaluation": ("evaluate_run",), "run": ("train",)})

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
