"""Starts the process that scores one model, and keeps what it wrote only if it finished."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from moe_rco.errors import OutputError, ScoringError
from moe_rco.scoring.files import ERROR, LOG, Request
from moe_rco.scoring.settings import Settings

_PATIENCE = 5
"""Seconds a scoring process may take to end when told to."""


def run(model: Path, settings: Settings, destination: Path) -> None:
    """Score a model; `destination`, a directory, then holds lm-eval's output, in the place of an earlier one.

    Raises ScoringError (tasks, data, memory), OutputError, or RuntimeError naming the log. Nothing half-written
    is left.
    """
    staged = destination.with_name(f".{destination.name}.part")
    try:
        _remove(staged)
        staged.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{destination} cannot be written: {error.strerror}") from error
    try:
        _score(Request(model=str(model), settings=settings, directory=staged), destination)
        _remove(destination)
        os.rename(staged, destination)
    finally:
        _remove(staged)


def _score(request: Request, destination: Path) -> None:
    # A session of its own: Ctrl-C in the terminal reaches this process only, which then ends the other and all it started.
    child = subprocess.Popen(
        [sys.executable, "-m", "moe_rco.scoring.worker"],
        stdin=subprocess.PIPE,
        env=environment(request.settings),
        start_new_session=True,
        text=True,
    )
    try:
        assert child.stdin is not None
        child.stdin.write(request.model_dump_json() + "\n")
        child.stdin.flush()  # and stays open: the child ends when it closes
        code = child.wait()
    except BaseException:
        _end(child)
        raise
    error = request.directory / ERROR
    said = error.read_text(encoding="utf-8") if error.is_file() else ""
    if code == ScoringError.exit_code:
        raise ScoringError(said)
    if code:
        log = destination.with_name(f"{destination.name}.{LOG}")
        shutil.copy(request.directory / LOG, log)
        if said:
            raise ScoringError(f"{said} (log: {log})")
        raise RuntimeError(f"scoring {request.model} failed: {_last_line(log)} (log: {log})")


def environment(settings: Settings) -> dict[str, str]:
    """What the scoring process needs to find set; a user's own settings win."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LMEVAL_DISABLE_MULTIPROC": "1",
        "TQDM_LEAVE": "",  # a finished bar makes room for the next
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.backend == "vllm" and settings.device == "cpu":
        # The cache is taken whole at the start: 1 GiB; and the engine in this process starts in seconds.
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if settings.allow_code:
        defaults["HF_ALLOW_CODE_EVAL"] = "1"
    found = {**defaults, **os.environ}
    if settings.backend == "vllm":
        found.pop(
            "TQDM_DISABLE", None
        )  # it divides by the time that its bar has taken, which is none without one
    return found


def _end(child: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(_PATIENCE)
        except ProcessLookupError:
            child.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it wrote nothing")
