"""lm-eval's tasks by name: what exists, what can be reached, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from moe_rco.errors import ScoringError
from moe_rco.scoring import tasks as tasks_module
from moe_rco.scoring.settings import SUITES, make_settings, shipped_tasks
from moe_rco.scoring.tasks import load_tasks

LOCAL = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
{more}
"""


@pytest.fixture(scope="module")
def stock() -> TaskManager:
    """lm-eval's own tasks and ours. Reading them takes ten seconds."""
    return TaskManager(include_path=str(shipped_tasks()))


def names(built: list) -> list[str]:
    return [task.task_name for task in tasks_module._leaves(built)]


def local_task(folder: Path, name: str, more: str = "") -> None:
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}) + "\n")
    (folder / f"{name}.yaml").write_text(LOCAL.format(name=name, data=data, more=more))


def test_the_demo_tag_loads_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, built = load_tasks(make_settings("hf", ["demo"]), "model")
    found = names(built)
    assert len(found) == 8
    assert {name.split("_")[1] for name in found} == {"choice", "arithmetic", "text"}
    assert all(len(task.eval_docs) > 40 for task in built)


def test_a_users_own_task_loads(tmp_path: Path) -> None:
    local_task(tmp_path, "mine")
    _, built = load_tasks(
        make_settings("hf", ["mine,demo_choice_code"], include_paths=[str(tmp_path)]), "model"
    )
    assert names(built) == ["mine", "demo_choice_code"]


def test_a_task_that_runs_code_needs_permission(tmp_path: Path) -> None:
    local_task(tmp_path, "runs", "unsafe_code: true")
    paths = [str(tmp_path)]
    with pytest.raises(ScoringError, match=r"task 'runs' runs code .* --allow-code"):
        load_tasks(make_settings("hf", ["runs"], include_paths=paths), "model")
    # Said first: what such a task loads may already run code.
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\nunsafe_code: true\n"
    )
    with pytest.raises(ScoringError, match=r"task 'far' runs code"):
        load_tasks(make_settings("hf", ["far"], include_paths=paths), "model")
    _, built = load_tasks(make_settings("hf", ["runs"], include_paths=paths, allow_code=True), "model")
    assert names(built) == ["runs"]


def test_data_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n")
    with pytest.raises(ScoringError, match=r"task 'far': its data.* cannot be reached") as caught:
        load_tasks(make_settings("hf", ["far"], include_paths=[str(tmp_path)]), "model")
    assert "nobody/nothing" in str(caught.value)
    local_task(tmp_path, "gone")
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ScoringError, match=r"task 'gone': its data.*data\.jsonl"):
        load_tasks(make_settings("hf", ["gone"], include_paths=[str(tmp_path)]), "model")


def test_a_task_asked_for_twice_is_refused() -> None:
    with pytest.raises(
        ScoringError, match="'demo_arithmetic' is asked for twice, by 'demo_arithmetic' and by 'demo'"
    ):
        load_tasks(make_settings("hf", ["demo_arithmetic", "demo"]), "model")


@pytest.mark.slow
def test_suites_are_tasks_of_lm_eval_without_examples_by_default(stock: TaskManager) -> None:
    for name in (*SUITES["default"], *SUITES["generative"]):
        assert name in stock.task_index
    for name in SUITES["default"]:
        configs = list(tasks_module._configs(name, stock))
        assert configs
        assert {config.get("num_fewshot", 0) for config in configs} <= {0, None}
    assert len(list(tasks_module._configs("mmlu", stock))) == 57
    assert next(tasks_module._configs("humaneval", stock))["unsafe_code"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "near"), [("winogrand", "'winogrande'"), ("demo_choice_pros", "'demo_choice_prose'")]
)
def test_an_unknown_task_gets_a_suggestion(
    name: str, near: str, stock: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "_manager", lambda *_: stock)
    with pytest.raises(ScoringError, match=f"no task '{name}'; did you mean .*{near}"):
        load_tasks(make_settings("hf", [name]), "model")


@pytest.mark.slow
def test_none_of_our_names_is_one_of_lm_evals(stock: TaskManager) -> None:
    ours = TaskManager(include_path=str(shipped_tasks()), include_defaults=False)
    for name in ours.all_subtasks:
        assert Path(str(stock.task_index[name].yaml_path)).parent == shipped_tasks()
    assert stock.task_index["demo"].tags == set(ours.all_subtasks)
