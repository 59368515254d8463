"""What is asked for: suites, defaults by device and backend, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe_rco import cli
from moe_rco.errors import ScoringError
from moe_rco.recipe import DEMO_MODEL
from moe_rco.scoring.process import environment
from moe_rco.scoring.settings import SUITES, expand, make_settings, shipped_tasks


def test_suites_stand_for_their_tasks_and_no_task_comes_twice() -> None:
    assert expand(["default"]) == SUITES["default"]
    assert expand(["arc_easy, default", "gsm8k"]) == (
        "arc_easy",
        *(task for task in SUITES["default"] if task != "arc_easy"),
        "gsm8k",
    )
    with pytest.raises(ScoringError, match="no tasks"):
        expand([" ,"])


def test_vllm_is_not_told_to_draw_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """It divides by the time that its bar has taken."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    hf, vllm = (environment(make_settings(backend, ["demo"])) for backend in ("hf", "vllm"))
    assert hf["TQDM_DISABLE"] == "1"
    assert "TQDM_DISABLE" not in vllm


def test_a_cpu_computes_in_float32_in_both_backends() -> None:
    hf, vllm = (make_settings(backend, ["demo"]) for backend in ("hf", "vllm"))
    if hf.device == "cpu":
        assert (hf.dtype, vllm.dtype) == ("float32", "float32")
        assert (hf.batch_size, vllm.batch_size) == (16, "auto")
    chosen = make_settings("hf", ["demo"], model_args=["dtype=bfloat16", "trust_remote_code=true"])
    assert chosen.model_args == {"dtype": "bfloat16", "trust_remote_code": True}
    assert chosen.dtype == "bfloat16"
    assert not hf.given_args
    assert chosen.given_args


def test_the_name_is_a_file_name() -> None:
    chosen = make_settings("hf", ["a/../b", "demo"], limit=5, num_fewshot=2)
    assert chosen.name == "a_.._b+demo-limit5-2shot"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backend": "sglang"}, "no backend 'sglang'"),
        ({"backend": "vllm", "device": "cpu"}, "leave out --device"),
        ({"device": "cudaa"}, "--device cudaa"),
        ({"device": "cuda:99"}, "--device cuda:99: torch finds"),
        ({"include_paths": ["nowhere"]}, "--include-path nowhere"),
        ({"model_args": ["dtype"]}, "--model-arg dtype: must be KEY=VALUE"),
        ({"model_args": ["pretrained=x"]}, "--model-arg pretrained"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ScoringError, match=complaint):
        make_settings(**{"backend": "hf", "tasks": ["demo"], **changes})


@pytest.mark.parametrize(
    ("missing", "backend", "command"),
    [("lm_eval", "hf", "pip install 'moe_rco[eval]'"), ("vllm", "vllm", "pip install 'moe_rco[serve]'")],
)
def test_a_missing_package_is_one_line(
    missing: str, backend: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "moe_rco.scoring.settings.find_spec", lambda name: None if name == missing else real(name)
    )
    result = CliRunner().invoke(cli.app, ["eval", str(DEMO_MODEL), "--backend", backend, "--output", "out"])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert command in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([str(DEMO_MODEL)], "--output"),
        ([str(DEMO_MODEL), "--output", "out", "--baseline", "nowhere"], "no model directory 'nowhere'"),
        ([str(DEMO_MODEL), "--output", "out", "--baseline", "x", "--no-baseline"], "contradict"),
        (["nowhere", "--output", "out", "--tasks", "demo"], "no model directory nowhere"),
    ],
)
def test_refusals_of_the_command_leave_nothing(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert not list(tmp_path.iterdir())


def test_the_shipped_tasks_are_found() -> None:
    assert (shipped_tasks() / "demo_arithmetic.yaml").is_file()
