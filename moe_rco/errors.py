"""The error tree.

Every message says what was wrong, where, and what to do about it. The command line prints a `UserError` as one line and
exits with 2; any other exception is a fault of ours and exits with 1.
"""

from __future__ import annotations


class MoeRcoError(Exception):
    """Base of every error raised on purpose by this package."""

    exit_code = 1


class UserError(MoeRcoError):
    """The input cannot be used as given; the user can repair it."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe file, a key in it, or a `--set` override is wrong."""


class ModelError(UserError):
    """The model cannot be found, is not supported, or its files are damaged."""


class BudgetError(UserError):
    """No assignment satisfies the budget and the per-layer floors."""


class DataError(UserError):
    """Calibration or evaluation text is missing, empty or too short."""


class OutputError(UserError):
    """The output directory exists, cannot be written, or does not fit on the disk."""


class FileError(UserError):
    """The system does not let a file be read or written, or it is gone."""


class MemoryShortageError(UserError):
    """Memory ended in the middle, of the host or of a device."""


class TeamError(UserError):
    """A process that shares the run's work is gone: nobody's mistake, so the exit code is 1."""

    exit_code = 1


class LockError(UserError):
    """Another process works in the same directory."""


class ScoringError(UserError):
    """Tasks, their data or the programs that score are missing, or were asked for what they cannot do."""


class StoreError(UserError):
    """The quantised store was made from other weights, data or settings, or is damaged."""


class PlanError(UserError):
    """A plan contradicts itself, the model, or the files it is stored with."""
