"""Kills a process at an operation on the file system, so that what is left can be tested."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "ftruncate")


def killed_at(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child process that is killed (SIGKILL) before its operation number `moment`.

    False where it came to its end before that. Raises AssertionError where it failed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _arm(moment)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def _arm(moment: int) -> None:
    count = 0

    def counting(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return operation(*args, **kwargs)

        return counted

    for name in OPERATIONS:
        setattr(os, name, counting(getattr(os, name)))


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes, and every directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def written(output: Path) -> dict[str, Any]:
    """What a run wrote, but for where it is and how long it took. Pages show what the reports say, and no more."""
    files: dict[str, Any] = tree(output)
    for name in [name for name in files if name.endswith("report.html")]:
        text = files.pop(name).decode()
        shown = json.loads(
            text.partition('type="application/json"')[2].partition(">")[2].partition("</script>")[0]
        )
        if "digest" in shown:
            assert shown == json.loads(files[name.replace(".html", ".json")])
        else:
            assert all(report == json.loads(files[f"{part}/report.json"]) for part, report in shown.items())
    for name in [name for name in files if name.endswith("report.json")]:
        report = json.loads(files[name])
        assert report.pop("stages")
        for key in ("memory", "output", "digest"):
            report.pop(key)
        recipe = name.replace("report.json", "recipe.yaml")
        lines = files[recipe].decode().splitlines()
        files |= {name: report, recipe: [line for line in lines if not line.startswith("output:")]}
    return files
