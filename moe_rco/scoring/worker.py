"""The process that scores one model: `python -m moe_rco.scoring.worker`, started by `process.run`.

A process of its own gives a model's memory back for certain. Of what it writes only lm-eval's progress bars are shown; the log
lines of lm-eval, vLLM and the libraries below go to a file.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from moe_rco.calib.refusals import REFUSALS, reason
from moe_rco.errors import ScoringError, UserError
from moe_rco.scoring.files import ERROR, LOG, Request
from moe_rco.scoring.results import write
from moe_rco.scoring.tasks import load_tasks

_SECRET = re.compile("token$|key$|secret|password", re.IGNORECASE)


class RefusalError(Exception):
    """What a library would not do; its traceback, in the log, may say more."""


def score(request: Request) -> None:
    """Score the request's model and write lm-eval's results and samples into its directory.

    Raises ScoringError for tasks that do not exist or whose data cannot be had, before the model is loaded; RefusalError for
    files that the backend cannot load, and for tasks that lm-eval finds the model unable to do.
    """
    settings = request.settings
    manager, tasks = load_tasks(settings, request.model)
    import torch
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import simple_evaluate

    device = settings.device if settings.backend == "hf" else None  # vLLM finds its own
    arguments = {"pretrained": request.model, **settings.model_args}
    shared = {"batch_size": settings.batch_size, "max_batch_size": None, "device": device}
    try:
        try:
            model = get_model(settings.backend).create_from_arg_obj(arguments, shared)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            if settings.given_args and isinstance(error, TypeError | ValueError):
                raise ScoringError(
                    f"--model-arg: {settings.backend} refuses: {_first_line(error)}"
                ) from error
            raise RefusalError(f"{settings.backend} cannot load {request.model}: {reason(error)}") from error
        results: Any = simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            device=device,
            limit=settings.limit,
            bootstrap_iters=1000,  # only for metrics whose standard error has no closed form
            task_manager=manager,
            confirm_run_unsafe_code=settings.allow_code,
        )
    except torch.OutOfMemoryError as error:
        raise ScoringError(
            f"{request.model} does not fit into the memory of {settings.device} with these settings; "
            "try a smaller --batch-size, or --model-arg dtype=bfloat16"
        ) from error
    except (AssertionError, ValueError) as error:
        if not _said_by("lm_eval", error):
            raise
        raise RefusalError(f"lm-eval cannot score {request.model} so: {_first_line(error)}") from error
    # Given a model object, lm-eval does not know what it was made from.
    results["config"] |= {"model": settings.backend, "model_args": without_secrets(arguments)}
    write(request.directory, results)


def without_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """What may be written to a file: `token`, `api_key`, `password` and the like are blotted out."""
    return {name: "***" if _SECRET.search(name) else value for name, value in arguments.items()}


def main() -> int:
    request = Request.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _only_bars_on_screen(request.directory / LOG)
    try:
        score(request)
    except UserError as error:
        (request.directory / ERROR).write_text(str(error), encoding="utf-8")
        return error.exit_code
    except RefusalError as error:
        (request.directory / ERROR).write_text(str(error), encoding="utf-8")
        raise
    return 0


def _die_with_parent() -> None:
    """The parent holds the other end of stdin as long as it lives."""
    sys.stdin.read()
    os._exit(1)


def _only_bars_on_screen(log: Path) -> None:
    """Send what is written to stdout, or to stderr by libraries, to a file; `sys.stderr`, where tqdm draws, only without
    a terminal.
    """
    file = log.open("a", encoding="utf-8", buffering=1)
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1) if sys.stderr.isatty() else file
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = file
    sys.excepthook = lambda kind, error, trace: traceback.print_exception(kind, error, trace, file=file)
    logging.basicConfig(stream=file, level=logging.WARNING)
    logging.captureWarnings(True)


def _said_by(package: str, error: BaseException) -> bool:
    """Whether an error was raised by a package's own code, not by what it calls."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].partition(".")[0] == package


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
