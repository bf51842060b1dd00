"""What a training run is asked to do, in parts: a room is given its own. Flags come from here."""

from .checked import SWITCHES, ConfigError, as_flag, flag, listed
from .parts import (
    PRECISIONS,
    DataSettings,
    MachineSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimisationSettings,
    RunSettings,
    StepSettings,
    TrainConfig,
)
from .table import SETTINGS, Setting, read_stored

__all__ = [
    "PRECISIONS",
    "SETTINGS",
    "SWITCHES",
    "ConfigError",
    "DataSettings",
    "MachineSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimisationSettings",
    "RunSettings",
    "Setting",
    "StepSettings",
    "TrainConfig",
    "as_flag",
    "flag",
    "listed",
    "read_stored",
]
