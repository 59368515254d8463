"""Finds and loads lm-eval's tasks, and says in one line what is wrong with a name or its data. Runs in the worker."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import httpx2
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from moe_rco.errors import ScoringError
from moe_rco.scoring.settings import SUITES, Settings, shipped_tasks


def load_tasks(settings: Settings, model: str) -> tuple[TaskManager, list[Any]]:
    """lm-eval's manager and the tasks, tags replaced by their tasks and groups whole, with their data.

    Raises ScoringError naming the task.
    """
    manager = _manager(settings, {**settings.model_args, "pretrained": model})
    for name in settings.tasks:
        if name not in manager.task_index:
            raise ScoringError(_unknown(name, manager))
        if not settings.allow_code and any(config.get("unsafe_code") for config in _configs(name, manager)):
            raise ScoringError(
                f"task '{name}' runs code that the model writes; allow it with --allow-code, in a container"
            )
    built: list[Any] = []
    owner: dict[str, str] = {}
    for name in settings.tasks:
        loaded = _load(name, manager)
        for task in loaded["tasks"]:
            if (other := owner.setdefault(task, name)) != name:
                raise ScoringError(
                    f"task '{task}' is asked for twice, by '{other}' and by '{name}'; name one of them"
                )
        groups = loaded.get("groups", {})
        built += [groups[name]] if name in groups else loaded["tasks"].values()
    unsafe = [task for task in _leaves(built) if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not settings.allow_code:
        raise ScoringError(
            f"task '{unsafe[0].task_name}' runs code that the model writes; allow it with --allow-code"
        )
    return manager, built


def _manager(settings: Settings, metadata: dict[str, Any]) -> TaskManager:
    """Reading the index of lm-eval's own 14,000 tasks takes long, and is left out where none is asked for."""
    paths: list[Any] = [shipped_tasks(), *settings.include_paths]
    ours = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    kinds = [entry.kind if (entry := ours.task_index.get(name)) else None for name in settings.tasks]
    if all(kind in (Kind.TASK, Kind.TAG) for kind in kinds):
        return ours
    return TaskManager(include_path=paths, metadata=metadata)


def _configs(name: str, manager: TaskManager) -> Iterator[dict[str, Any]]:
    """The configurations of a task, or of the tasks of a group or tag, as far as YAML files tell."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    members = entry.tags if entry.kind is Kind.TAG else config.get("task")
    if isinstance(members, (list, set)):
        for member in members:
            yield from _configs(member, manager) if isinstance(member, str) else [member]
    else:
        yield config


def _load(name: str, manager: TaskManager) -> Any:
    try:
        return manager.load([name])
    except (OSError, httpx2.HTTPError, DatasetsError, HfHubHTTPError) as error:
        data = sorted(
            {str(config["dataset_path"]) for config in _configs(name, manager) if "dataset_path" in config}
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        named = f" {', '.join(data[:3])}" if data and not any(path in reason for path in data) else ""
        raise ScoringError(
            f"task '{name}': its data{named} cannot be reached ({reason}); go online once, or name tasks whose data is here"
        ) from error
    except ImportError as error:
        raise ScoringError(f"task '{name}' needs a package that is not installed: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ScoringError(f"task '{name}' cannot be loaded: {type(error).__name__}: {error}") from error


def _unknown(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], 3)
    hint = f"; did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    return f"lm-eval knows no task '{name}'{hint} (suites: {', '.join(SUITES)}; your own: --include-path DIR)"


def _leaves(built: list[Any]) -> Iterator[Task]:
    for item in built:
        yield from [item] if isinstance(item, Task) else item.get_all_tasks()
