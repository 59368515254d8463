"""`moe-rco eval`: score a model, and the original it was made from, on the same items."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_rco import page
from moe_rco.ckpt.locate import fetch_model
from moe_rco.ckpt.manifest import check_quickly
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import RECIPE
from moe_rco.errors import ModelError, OutputError, ScoringError
from moe_rco.recipe import DEMO, DEMO_MODEL, Recipe
from moe_rco.report import FILE_NAME, Comparison, Report, TaskScore
from moe_rco.scoring import process, results
from moe_rco.scoring.paired import compare
from moe_rco.scoring.settings import Settings, shipped_tasks
from moe_rco.types import Progress

CACHE_VARIABLE = "MOE_RCO_CACHE"
BASELINE = "baseline"
_PACKAGES = ("lm_eval", "torch", "transformers", "vllm")


@dataclass(frozen=True)
class Outcome:
    """What was scored: the rows, the model and the one it was compared with, and where everything is."""

    model: str
    baseline: str | None
    scores: tuple[TaskScore, ...]
    files: Path
    report: Path | None


def is_demo(directory: str) -> bool:
    """Whether a directory is the demo model or was made from it, so that the tag `demo` fits it."""
    path = Path(directory)
    if path.is_dir() and path.resolve() == DEMO_MODEL.resolve():
        return True
    return (path / FILE_NAME).is_file() and Report.load(path).model == DEMO


def evaluate(
    directory: str,
    settings: Settings,
    *,
    baseline: str | None = None,
    compare_to_original: bool = True,
    output: str | None = None,
    progress: Progress,
    say: Callable[[str], None],
) -> Outcome:
    """Score the model in `directory`, compared with `baseline`, or else with the model its report names if that is
    here. lm-eval's output goes below `output`, or `eval/` in the directory; the report gets the scores.

    `say` is told what happens in one line each. Raises ScoringError, ModelError, OutputError, PlanError.
    """
    model = Checkpoint(directory, allow_quantized=True)
    check_quickly(model.directory, model.config.get("quantization_config"))
    report = Report.load(model.directory) if (model.directory / FILE_NAME).is_file() else None
    if report is None and output is None:
        raise OutputError(f"{directory} has no {FILE_NAME} to write scores into; say where with --output DIR")
    original = _original(baseline, report if compare_to_original else None, progress)
    place = (Path(output) if output else model.directory / "eval") / settings.backend / settings.name

    first: dict[results.Key, results.Metric] = {}
    kept = None
    if original is not None:
        kept = _cache() / _key(original.digest, settings)
        if kept.is_dir():
            say(f"{original.name} was scored before ({kept})")
        else:
            say(f"scoring {original.name} with {settings.backend} ...")
            process.run(original.directory, settings, kept)
        first = results.read(kept)
    say(f"scoring {directory} with {settings.backend} ...")
    process.run(model.directory, settings, place)
    if kept is not None:
        shutil.copytree(kept, place / BASELINE)
    second = results.read(place)
    # The directory may be moved with the output inside it.
    files = place.relative_to(model.directory) if place.is_relative_to(model.directory) else place.resolve()
    scores = tuple(
        _row(key, metric, settings, first.get(key), original, files) for key, metric in second.items()
    )
    if not scores:
        raise ScoringError(f"lm-eval gave no figures for {', '.join(settings.tasks)}; its output: {place}")
    if report is not None:
        # Read again: another evaluation may have ended meanwhile.
        report = Report.load(model.directory).with_scores(scores)
        page.save(model.directory, report, _recipe(model.directory))
        report.save(model.directory)
    written = model.directory / FILE_NAME if report is not None else None
    return Outcome(directory, original.name if original else None, scores, place, written)


def _recipe(directory: Path) -> str:
    path = directory / RECIPE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass(frozen=True)
class _Original:
    name: str
    directory: Path
    digest: str


def _original(baseline: str | None, report: Report | None, progress: Progress) -> _Original | None:
    if baseline is not None:
        path = _find(baseline)
    elif report is not None:
        recipe = Recipe.model_construct(model=report.model, revision=None)
        if recipe.model_directory is None:
            return None
        path = recipe.model_directory
    else:
        return None
    digest = Checkpoint(path, allow_quantized=True).digest(progress)
    if baseline is None and report is not None and digest != report.model_digest:
        raise ScoringError(
            f"{path} is not, or no longer, the model that this one was made from; name that with --baseline, "
            "or leave the comparison out with --no-baseline"
        )
    return _Original(baseline or (report.model if report else str(path)), path, digest)


def _find(name: str) -> Path:
    try:
        return fetch_model(Recipe.model_construct(model=name, revision=None))
    except ModelError as error:
        # Its last clause says what to do in a recipe.
        raise ModelError(f"--baseline: {str(error).rpartition('; ')[0] or error}") from error


def _cache() -> Path:
    home = os.environ.get(CACHE_VARIABLE)
    base = (
        Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_rco"
    )
    return base / "scores"


def _key(digest: str, settings: Settings) -> str:
    """Names what decides a score: the model, the settings, the tasks' files, and the programs that score."""
    parts = [digest, settings.model_dump_json()]
    for name in _PACKAGES:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"no {name}")
    for folder in (shipped_tasks(), *map(Path, settings.include_paths)):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            state = path.stat()
            parts.append(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _row(
    key: results.Key,
    metric: results.Metric,
    settings: Settings,
    before: results.Metric | None,
    original: _Original | None,
    files: Path,
) -> TaskScore:
    task, name, filter_name = key
    return TaskScore(
        backend=settings.backend,
        task=task,
        group=metric.group,
        metric=name,
        filter=filter_name,
        num_fewshot=metric.num_fewshot,
        limit=settings.limit,
        dtype=settings.dtype,
        higher_is_better=metric.higher_is_better,
        items=metric.count,
        score=metric.score,
        stderr=metric.stderr,
        baseline=_comparison(key, metric, before, original) if before and original else None,
        files=str(files),
    )


def _comparison(
    key: results.Key, metric: results.Metric, before: results.Metric, original: _Original
) -> Comparison:
    if metric.docs != before.docs:
        raise ScoringError(
            f"task '{key[0]}': {original.name} was scored on other items; remove {_cache()} and run this again"
        )
    result = compare(before.items, metric.items) if before.items and metric.items else None
    return Comparison(
        model=original.name,
        digest=original.digest,
        score=before.score,
        stderr=before.stderr,
        difference=metric.score - before.score,
        difference_stderr=result.stderr if result else None,
        p=result.p if result else None,
        test=result.test if result else None,
    )
