"""The error tree, and what the page docs/errors.md says of each.

Every message says what was wrong, where, and what to do about it. The command line prints an error as one line and exits
with its `exit_code`; any exception that is none of these is a fault of ours and exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class MoeRcoError(Exception):
    """Something that must not happen did, and was noticed: for example that the written model computes something else."""

    exit_code: ClassVar[int] = 1
    remedy: ClassVar[str] = (
        "Nothing was put in place. Report it, with the recipe and what `--debug` shows for the same command."
    )


class UserError(MoeRcoError):
    """What was asked for cannot be done here: a device that is not there, a model that does not fit into memory."""

    exit_code = 2
    remedy = "Follow the message, which names the setting to change."


class RecipeError(UserError):
    """A recipe file, a key in it, or a `--set` override is wrong."""

    remedy = (
        "Correct the line that is named. `moe-rco validate RECIPE` checks a recipe alone, and `moe-rco init MODEL` writes one "
        "that fits a model."
    )


class ModelError(UserError):
    """The model cannot be found, is not supported, or its files are damaged."""

    remedy = (
        "Download or copy the model again, or name another directory: `--set model=DIR`. `moe-rco inspect DIR` looks at a model "
        "alone."
    )


class BudgetError(UserError):
    """No assignment satisfies the budget and the least number of experts that a layer must keep."""

    remedy = (
        "The message names the smallest and the largest budget that the options allow: raise the budget, or allow smaller "
        "options."
    )


class DataError(UserError):
    """Calibration or evaluation text is missing, unreadable, empty or too short."""

    remedy = "Name another file or its right column (`calibration.text_field`), add text, or lower `calibration.sequence_length`."


class OutputError(UserError):
    """The output directory exists, cannot be written, or does not fit on the disk."""

    remedy = "Name another directory with `--output`, make room, or say `--overwrite`; the same command goes on where it was."


class FileError(UserError):
    """The system does not let a file be read or written, or it is gone."""

    remedy = (
        "Mend what the message names, as permissions or a full disk: the same command goes on where it was."
    )


class MemoryShortageError(UserError):
    """Memory ended in the middle, of the host or of a device."""

    remedy = "Lower the setting that is named, or stream the weights (`execution.mode=streaming`): the same command goes on."


class TeamError(UserError):
    """A process that shares the run's work is gone."""

    exit_code = 1
    remedy = "Look at what the lost process said last. The same command goes on, with as many processes as there are."


class LockError(UserError):
    """Another process works in the same directory."""

    remedy = "Wait for it (`moe-rco status DIR`), stop it, or name another output."


class ScoringError(UserError):
    """Tasks, their data or the programs that score are missing, or were asked for what they cannot do."""

    remedy = "Correct the option that is named; `pip install 'moe_rco[eval]'` where lm-eval is missing."


class HubError(UserError):
    """The Hugging Face Hub cannot be reached, does not know who asks, or refuses what is to be published."""

    remedy = "Log in with a token that may write (`hf auth login`), or name a repository of your own; the same command goes on."


class StoreError(UserError):
    """The quantised store was made from other weights, data or settings, or is damaged."""

    remedy = "Delete the file or the directory that is named and run again: it is made anew."


class PlanError(UserError):
    """A plan, a report or a manifest contradicts itself, the model, or the files it is stored with."""

    remedy = "Copy the output again, or make it again. `moe-rco verify DIR` says everything that differs."


def is_fault(raised: BaseException) -> bool:
    """Whether something went wrong, rather than somebody asked to stop: also where a library written in Rust gave up,
    whose PanicException is no Exception."""
    return isinstance(raised, Exception) or type(raised).__name__ == "PanicException"


def catalogue() -> tuple[type[MoeRcoError], ...]:
    """Every kind of error, the general ones first."""
    found: list[type[MoeRcoError]] = [MoeRcoError]
    for kind in found:
        found += kind.__subclasses__()
    return tuple(found)
