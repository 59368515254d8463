"""Progress with and without a terminal."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_rco import console
from tests.console.screens import ESCAPES, screen, shown


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_a_few_plain_lines() -> None:
    target, clock = screen(), Clock()
    progress = console.RichProgress(target, clock)
    with progress.stage("quantise", 80) as advance:
        for _ in range(80):
            clock.now += 0.5
            advance(1)
    assert shown(target).splitlines() == [
        "quantise ...",
        "quantise: 25 %, 30.0 s left",
        "quantise: 50 %, 20.0 s left",
        "quantise: 75 %, 10.0 s left",
        "quantise: done in 40.0 s",
    ]


@pytest.mark.parametrize("color", [False, True])
def test_progress_stages_nest_may_be_empty_and_survive_errors(color: bool) -> None:
    target = screen(color=color)
    progress = console.RichProgress(target)
    with progress.stage("outer", 2) as advance:
        advance(1)
        with progress.stage("inner [a]", 0):
            pass
        advance(1)
    with pytest.raises(RuntimeError), progress.stage("failing", 3):
        raise RuntimeError
    with progress.stage("after", 1) as advance:
        advance(1)
    text = ESCAPES.sub("", shown(target))
    for part in ("outer", "inner [a]", "failing", "after"):
        assert part in text
    assert "failing: done" not in text


def test_progress_in_a_notebook_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars there need widgets; without them rich warns at every step, and shows nothing."""
    outputs: list[dict[str, str]] = []
    shows = SimpleNamespace(display=lambda value: outputs.append(value._repr_mimebundle_(["text/plain"], [])))
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    with console.RichProgress(Console(force_jupyter=True)).stage("quantise", 2) as advance:
        advance(2)
    told = [ESCAPES.sub("", output["text/plain"]).strip() for output in outputs]
    assert told == ["quantise ...", "quantise: done in 0.0 s"]
