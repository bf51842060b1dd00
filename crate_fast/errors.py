"""The errors that a caller can mend; imports nothing, so that a command can raise them before PyTorch is there."""


class UserError(Exception):
    """What the command line tells in one line: the message names the value or the file and what is allowed."""


class ConfigError(UserError, ValueError):
    """A setting cannot be used; the message names its flag and its value, or the file."""


class BackendError(UserError, RuntimeError):
    """The backend asked for cannot run on what it was given."""


class CheckpointError(UserError, ValueError):
    """A file is missing, damaged, or does not hold what it should; the message names the file and what is wrong."""


class InspectionError(UserError, ValueError):
    """What was asked for cannot be shown; the message names the value or file and what is allowed."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says where and why."""


class SavingError(UserError, RuntimeError):
    """A checkpoint cannot be written; the message names it and the one before it."""


class UnreadableError(UserError, RuntimeError):
    """More images than allowed cannot be read; the message names the last."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """An optional package is not installed; the message says how to install it."""
