"""lm-eval's own results, written and read back. Its `dummy` model answers at random, which is all that is needed here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from moe_rco.errors import ScoringError
from moe_rco.scoring.files import RESULTS, samples_file
from moe_rco.scoring.results import Metric, read, write

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["yes", "maybe"]
doc_to_target: answer
"""
TEXT = """\
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
F1 = CHOICE + "metric_list:\n  - metric: f1\n"
GROUP = """\
group: {name}
task: {members}
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory as the worker writes it, and what lm-eval returned: small and large in `inner` in `outer`."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("small", 5), ("large", 40), ("text", 12)):
        rows = [{"question": f"{name} is {'very ' * n}big", "answer": n % 2} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = TEXT if name == "text" else CHOICE
        (folder / f"{name}.yaml").write_text(template.format(name=name, data=folder / f"{name}.jsonl"))
    (folder / "f1.yaml").write_text(F1.format(name="f1", data=folder / "large.jsonl"))
    (folder / "inner.yaml").write_text(GROUP.format(name="inner", members="[small, large]"))
    (folder / "outer.yaml").write_text(GROUP.format(name="outer", members="[inner]"))
    results: Any = simple_evaluate(
        "dummy",
        tasks=["outer", "text", "f1"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=10,
    )
    out = tmp_path_factory.mktemp("out")
    write(out, results)
    return out, results


def test_scores_are_lm_evals_own(evaluated: tuple[Path, dict[str, Any]]) -> None:
    directory, results = evaluated
    found = read(directory)
    for (task, metric, name), score in found.items():
        assert score.score == results["results"][task][f"{metric},{name}"]
    assert {(task, metric) for task, metric, _ in found} == {
        *((task, metric) for task in ("small", "large") for metric in ("acc", "acc_norm")),
        *(("inner", "acc"), ("outer", "acc"), ("f1", "f1")),
        *(("text", "word_perplexity"), ("text", "bits_per_byte")),
    }
    accuracy = found["large", "acc", "none"]
    assert accuracy.stderr == results["results"]["large"]["acc_stderr,none"] > 0
    assert accuracy.count == 40
    assert accuracy.higher_is_better is True
    assert accuracy.items is not None
    assert accuracy.items.stderr == pytest.approx(accuracy.stderr)


def test_items_are_those_of_the_samples(evaluated: tuple[Path, dict[str, Any]]) -> None:
    directory, results = evaluated
    metric = read(directory)["large", "acc", "none"]
    by_doc = {sample["doc_id"]: sample["acc"] for sample in results["samples"]["large"]}
    assert metric.items is not None
    assert [by_doc[doc] for _, doc, _ in metric.docs] == metric.items.values.tolist()


def test_a_perplexity_gets_an_error_lm_eval_does_not_give(evaluated: tuple[Path, dict[str, Any]]) -> None:
    directory, results = evaluated
    assert results["results"]["text"]["word_perplexity_stderr,none"] == "N/A"
    for name, kind in (("word_perplexity", "perplexity"), ("bits_per_byte", "bits")):
        metric = read(directory)["text", name, "none"]
        assert metric.items is not None
        assert metric.items.kind == kind
        assert metric.stderr == metric.items.stderr
        assert metric.stderr
        assert metric.stderr > 0


def test_groups_pool_the_items_of_their_tasks(evaluated: tuple[Path, dict[str, Any]]) -> None:
    found = read(evaluated[0])

    def of(task: str) -> Metric:
        return found[task, "acc", "none"]

    assert [of(task).group for task in ("small", "large", "inner", "outer")] == ["outer"] * 3 + [None]
    assert found["text", "bits_per_byte", "none"].group is None
    for group in ("inner", "outer"):
        assert of(group).count == 45
        items, small, large = (of(task).items for task in (group, "small", "large"))
        assert items
        assert small
        assert large
        assert items.values.tolist() == [*large.values, *small.values]
        assert items.score == pytest.approx(of(group).score)


def test_a_score_that_is_no_mean_of_items_has_none(evaluated: tuple[Path, dict[str, Any]]) -> None:
    metric = read(evaluated[0])["f1", "f1", "none"]
    assert metric.items is None
    assert metric.count == 40


def test_damage_is_told(evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="no complete lm-eval results"):
        read(tmp_path)
    write(tmp_path, evaluated[1])
    samples_file(tmp_path, "large").write_text('{"doc_id": 0')
    with pytest.raises(ScoringError, match="no complete lm-eval results"):
        read(tmp_path)
    (tmp_path / RESULTS).write_text("{}")
    with pytest.raises(ScoringError, match="no complete lm-eval results"):
        read(tmp_path)


def test_a_task_name_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    assert samples_file(tmp_path, "../a/b").parent == tmp_path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
