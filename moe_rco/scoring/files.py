"""One evaluation's directory: what is asked for, and the names of lm-eval's own output in it."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moe_rco.scoring.settings import Settings

RESULTS = "results.json"
"""lm-eval's results: scores, settings of every task, versions of what computed them."""
LOG = "log.txt"
ERROR = "error.txt"


class Request(BaseModel):
    """Which model (a directory) to score, how, and the directory to write to, which exists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    settings: Settings
    directory: Path


def samples_file(directory: Path, task: str) -> Path:
    """Where a task's items are: one line of JSON each, with the model's answers, as lm-eval logs them."""
    return directory / f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl"
