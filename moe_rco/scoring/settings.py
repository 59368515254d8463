"""What is scored and how: one frozen value, passed to the process that scores and part of a result's key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from moe_rco.errors import ScoringError

Backend = Literal["hf", "vllm"]
BACKENDS: tuple[str, ...] = get_args(Backend)

SUITES = {
    "default": (
        *("winogrande", "arc_challenge", "arc_easy", "boolq", "hellaswag"),
        *("mmlu", "openbookqa", "rte"),
    ),
    "generative": ("gsm8k", "humaneval"),
}
"""Names that stand for several lm-eval tasks: what papers on compression report."""

_PACKAGE = Path(__file__).resolve().parent.parent


class Settings(BaseModel):
    """`tasks` are names of lm-eval tasks, groups and tags, suites replaced by their members.

    `limit` is items per task, None for all. `device` and `dtype` are resolved: `cpu` or a GPU's name, and a name that both
    backends know. `model_args` go to the backend as they are; `given_args` says whether a user set any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Backend
    tasks: tuple[str, ...]
    device: str
    batch_size: int | Literal["auto"]
    model_args: dict[str, Any] = {}
    given_args: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    include_paths: tuple[str, ...] = ()
    allow_code: bool = False

    @property
    def dtype(self) -> str:
        return str(self.model_args.get("dtype"))

    @property
    def name(self) -> str:
        """A file name for people: tasks, limit and examples."""
        parts = ["+".join(self.tasks)[:60]]
        parts += [f"limit{self.limit}"] if self.limit is not None else []
        parts += [f"{self.num_fewshot}shot"] if self.num_fewshot is not None else []
        return re.sub(r"[^\w.+-]", "_", "-".join(parts))


def make_settings(
    backend: str,
    tasks: Sequence[str],
    *,
    device: str | None = None,
    batch_size: int | None = None,
    model_args: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_paths: Sequence[str] = (),
    allow_code: bool = False,
) -> Settings:
    """Settings with every default filled in; `model_args` are texts KEY=VALUE. Raises ScoringError.

    On a CPU both backends compute in float32 unless told otherwise, so that their scores agree.
    """
    if backend not in BACKENDS:
        raise ScoringError(f"no backend '{backend}'; there are {' and '.join(BACKENDS)}")
    needs_installed(backend)
    if backend == "vllm" and device is not None:
        raise ScoringError(
            "vLLM chooses its device itself; leave out --device (CUDA_VISIBLE_DEVICES limits it)"
        )
    for path in include_paths:
        if not Path(path).is_dir():
            raise ScoringError(f"--include-path {path}: no such directory")
    where = _device(device)
    given = dict(_model_arg(text) for text in model_args)
    defaults: dict[str, Any] = {"dtype": "float32" if where == "cpu" else "auto"}
    if backend == "vllm" and where == "cpu":
        defaults["enforce_eager"] = True  # compiling takes longer than most evaluations
    automatic = backend == "vllm" or where != "cpu"
    return Settings(
        backend=backend,  # pyright: ignore[reportArgumentType]
        tasks=expand(tasks),
        device=where,
        batch_size=batch_size or ("auto" if automatic else 16),
        model_args={**defaults, **given},
        given_args=bool(given),
        limit=limit,
        num_fewshot=num_fewshot,
        include_paths=tuple(str(Path(path).resolve()) for path in include_paths),
        allow_code=allow_code,
    )


def needs_installed(backend: str) -> None:
    """Raise ScoringError, with the command that installs it, where a package is missing."""
    if find_spec("lm_eval") is None:
        raise ScoringError("scoring needs lm-eval: pip install 'moe_rco[eval]'")
    if backend == "vllm" and find_spec("vllm") is None:
        raise ScoringError("the backend vllm needs vLLM: pip install 'moe_rco[serve]'")


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise ScoringError(f"--device {name}: must be cpu, mps, cuda or a numbered GPU as in cuda:1")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ScoringError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return name


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Comma-separated names to single ones, suites replaced by their tasks, each once. Raises ScoringError."""
    single = [name.strip() for text in names for name in text.split(",") if name.strip()]
    if not single:
        raise ScoringError("no tasks; name some: --tasks default, or --tasks arc_easy,piqa")
    return tuple(dict.fromkeys(task for name in single for task in SUITES.get(name, (name,))))


def shipped_tasks() -> Path:
    """The directory of the tasks that come with this package (tag `demo`)."""
    # A wheel carries them inside the package; a source checkout has them in eval/.
    place = _PACKAGE / "tasks"
    return place if place.is_dir() else _PACKAGE.parent / "eval" / "tasks"


def _model_arg(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ScoringError(f"--model-arg {text}: must be KEY=VALUE, as in dtype=bfloat16")
    if key in ("pretrained", "model", "device", "batch_size"):
        raise ScoringError(f"--model-arg {key}: this has an option or argument of its own; see --help")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
