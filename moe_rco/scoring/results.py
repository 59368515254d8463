"""lm-eval's output on disk: every metric's score, and its items for comparing two models."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_rco.errors import ScoringError
from moe_rco.scoring.files import RESULTS, samples_file
from moe_rco.scoring.paired import Items, classify

Key = tuple[str, str, str]
"""Task, metric, filter."""


@dataclass(frozen=True, eq=False)
class Metric:
    """One score. `docs` identifies its items; `items` is None where the score is no function of single items."""

    score: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    group: str | None
    count: int
    docs: tuple[tuple[str, int, str], ...]
    items: Items | None


def write(directory: Path, results: dict[str, Any]) -> None:
    """Write what lm-eval's `simple_evaluate` returned: the results, and each task's samples one a line."""
    from lm_eval.utils import handle_non_serializable

    for task, samples in results["samples"].items():
        lines = (json.dumps(row, ensure_ascii=False, default=handle_non_serializable) for row in samples)
        samples_file(directory, task).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    summary = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(summary, indent=1, ensure_ascii=False, default=handle_non_serializable)
    (directory / RESULTS).write_text(text + "\n", encoding="utf-8")


def read(directory: Path) -> dict[Key, Metric]:
    """Every metric of every task, and of the groups that lm-eval aggregates. Raises ScoringError if damaged."""
    try:
        results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        tasks = [name for name in results["results"] if samples_file(directory, name).is_file()]
        samples = {task: _samples(directory, task) for task in tasks}
        return _metrics(results, samples)
    except (OSError, ValueError, KeyError) as error:
        raise ScoringError(f"{directory} holds no complete lm-eval results ({error}); remove it") from error


def _samples(directory: Path, task: str) -> list[dict[str, Any]]:
    with samples_file(directory, task).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _metrics(results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[Key, Metric]:
    leaves = {group: _leaves(group, results) for group in results.get("groups", {})}
    inside = {child for group in leaves for child in results["group_subtasks"].get(group, ())}
    # The outermost aggregated group stands for all of its tasks and subgroups.
    outer = {group: [group, *leaves[group]] for group in leaves if group not in inside}
    found: dict[Key, Metric] = {}
    for name, scores in results["results"].items():
        if name not in samples and name not in leaves:
            continue
        members = leaves.get(name, [name])
        group = next(
            (o for o, all_in in outer.items() if o != name and _within(name, o, all_in, results)), None
        )
        for label, score in scores.items():
            metric, comma, filter_name = label.partition(",")
            if not comma or metric.endswith("_stderr") or not _finite(score):
                continue
            docs, values, weights = _items(members, metric, filter_name, samples)
            items = classify(score, values, weights) if values is not None else None
            stderr = scores.get(f"{metric}_stderr,{filter_name}")
            better = results["higher_is_better"].get(name, {}).get(metric)
            found[name, metric, filter_name] = Metric(
                score=score,
                stderr=stderr if _finite(stderr) else items.stderr if items else None,
                higher_is_better=better,
                num_fewshot=results["n-shot"].get(name),
                group=group,
                count=len(docs),
                docs=docs,
                items=items,
            )
    return found


def _within(name: str, outer: str, leaves: list[str], results: dict[str, Any]) -> bool:
    return name in leaves or name in _descendants(outer, results)


def _descendants(group: str, results: dict[str, Any]) -> set[str]:
    children = results["group_subtasks"].get(group, ())
    return set(children).union(*(_descendants(child, results) for child in children))


def _leaves(group: str, results: dict[str, Any]) -> list[str]:
    return sorted(name for name in _descendants(group, results) if not results["group_subtasks"].get(name))


def _items(
    tasks: list[str], metric: str, filter_name: str, samples: dict[str, list[dict[str, Any]]]
) -> tuple[tuple[tuple[str, int, str], ...], Any, Any]:
    """The identities of a metric's items, sorted, their values and weights (None where they are not numbers)."""
    rows: defaultdict[tuple[str, int, str], list[Any]] = defaultdict(list)
    for task in tasks:
        for sample in samples.get(task, ()):
            if sample["filter"] == filter_name and metric in sample:
                rows[task, sample["doc_id"], sample["doc_hash"]].append(sample[metric])
    docs = tuple(sorted(rows))
    pairs = [_value_and_weight(value) for doc in docs for value in rows[doc]]
    if not pairs or any(pair is None for pair in pairs) or len(pairs) != len(docs):
        return docs, None, None
    values, weights = np.array(pairs, dtype=np.float64).T
    return docs, values, weights


def _value_and_weight(value: Any) -> tuple[float, float] | None:
    """A number counts once; lm-eval's perplexities give (log-likelihood, length)."""
    if isinstance(value, (int, float)):
        return float(value), 1.0
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value):
        return float(value[0]), float(value[1])
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
