"""Every group of a model in the same choice, as a user runs it: `prune`, `verify`, a dry run, and loading the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from moe_rco.cli import app
from moe_rco.inspection import inspect
from moe_rco.plan import Plan
from moe_rco.report import Report
from moe_rco.types import KINDS
from tests.tiny_job import save_job

SETTINGS = (f"groups=[{', '.join(KINDS)}]", "options=[prune, int4-g64, int8-g64, bf16]", "budget.ratio=0.3")
pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe, and what was made of it."""
    place = tmp_path_factory.mktemp("groups")
    recipe = save_job(place, 2, 2, "qwen2_moe")
    sets = [part for setting in (*SETTINGS, f"output={place / 'out'}") for part in ("--set", setting)]
    run("prune", "--recipe", str(recipe), *sets)
    return recipe, place / "out"


def test_all_bytes_are_within_the_budget(job: tuple[Path, Path]) -> None:
    report, plan, found = Report.load(job[1]), Plan.load(job[1]), inspect(job[1])
    assert {group.kind for group in report.dense} == set(KINDS) - {"experts"}
    assert found.expert_bytes + found.dense_bytes == plan.cost == report.bytes.experts_after <= plan.budget
    # What is left is norms, biases and routers.
    assert report.bytes.other < 0.05 * report.bytes.total
    assert report.bytes.total < 0.31 * (report.bytes.experts_before + report.bytes.other)
    assert not any(option == "prune" for option in plan.dense)
    page = (job[1] / "report.html").read_text()
    assert "The option of every other group" in page
    assert all(f"o_proj {group.option}" in page for group in report.dense if group.name.endswith("o_proj"))


def test_verify_agrees(job: tuple[Path, Path]) -> None:
    text = run("verify", str(job[1]), "--original", str(job[0].parent / "model"))
    assert "experts and dense groups take" in text


def test_it_loads(job: tuple[Path, Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(job[1], dtype=torch.float32)
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_a_dry_run_says_what_is_covered(job: tuple[Path, Path]) -> None:
    sets = [part for setting in (*SETTINGS, "output=elsewhere") for part in ("--set", setting)]
    text = run("prune", "--recipe", str(job[0]), *sets, "--dry-run")
    said = " ".join(text.split())
    assert "groups experts, attention, shared experts, embeddings, head groups now 2.03 MiB" in said
