"""Every command and every block of code in the README is run, or read by the program that would run it."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from eval.readme_tables import updated
from moe_rco import cli, recipe
from moe_rco.recipe import DEMO_MODEL
from moe_rco.scoring.settings import SUITES
from tests import hub as hubs
from tests.documents import blocks, commands
from tests.e2e.test_prune import QUICK

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INTEGRITY = (ROOT / "docs" / "integrity.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# The first steps, as the tutorial takes them: tests/test_tutorial.py runs its server and asks it.
FIRST_STEPS = (".venv/bin/", "source ", "curl ")
# Run by continuous integration itself: the first installs, the second is what runs this test.
RUN_BY_CI = ("make demo", "make test", "pip install -c constraints.txt -e .")
# The same for a GPU: what it names is tested, and vLLM's CPU build stands in for vLLM.
FOR_A_GPU = "pip install -c constraints.txt -e '.[serve,eval]'"

STAND_INS = {
    "/models/Qwen3-30B-A3B": str(DEMO_MODEL),
    "/models/the-original": str(DEMO_MODEL),
    "out/qwen3-30b-a3b-35": "out/mine",
    "arc_easy,hellaswag": "demo_choice_code,demo_arithmetic",
    "--max-model-len 8192": "--max-model-len 512",
}


@contextlib.contextmanager
def hub(home: Path) -> Iterator[None]:
    """In the place of the Hugging Face Hub."""
    with hubs.serving() as server, hubs.logged_in(server, home):
        yield


def test_make_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [command.split()[1] for command in commands(README) if command.startswith("make ")]
    assert named
    assert set(named) <= set(targets)


def test_the_gpu_s_install_names_extras_that_exist() -> None:
    assert FOR_A_GPU in set(commands(README))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"serve", "eval"} <= set(extras)


def test_suites_are_what_it_says() -> None:
    for name, tasks in SUITES.items():
        assert f"`{name}` ({', '.join(tasks)})" in README


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_tables_are_those_of_the_results() -> None:
    assert updated(README) == README
    with pytest.raises(ValueError, match="0 tables"):
        updated(README.replace("**moe_rco**", "ours"))


@pytest.mark.parametrize("block", blocks(README, "yaml"))
def test_recipes_are_valid(block: str) -> None:
    loaded = recipe.parse(block)
    assert set(yaml.safe_load(block)) <= set(type(loaded).model_fields)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the page on integrity after the README's; the demo model in place of the large one, and little text."""
    monkeypatch.chdir(tmp_path)
    little = [part for setting in QUICK for part in ("--set", setting)]
    demo = [
        "--set",
        "model=demo",
        "--set",
        "calibration.data=demo",
        "--set",
        "options=[prune, int4-g64, bf16]",
    ]
    # What `moe-rco inspect out/demo` looks at is what `make demo` left.
    first = CliRunner().invoke(cli.app, ["prune", "--recipe", "demo", *little])
    assert first.exit_code == 0, first.output
    monkeypatch.setenv("MOE_RCO_CACHE", str(tmp_path / "cache"))
    for command in commands(README + INTEGRITY):
        if command in (*RUN_BY_CI, FOR_A_GPU) or command.startswith(("make ", "python -m eval.")):
            continue
        if command.startswith(FIRST_STEPS):
            assert command in set(commands(TUTORIAL))
            continue
        for theirs, ours in STAND_INS.items():
            command = command.replace(theirs, ours)
        words = shlex.split(command)
        assert words.pop(0) == "moe-rco"
        if words[0] == "prune":
            several = any(word.startswith("budget=[") for word in words)
            place = "out/mine" if "my.yaml" in words else "out/shipped"
            one = () if several else ("--set", f"output={place}", "--set", "budget.bytes=4MiB")
            words = [*words, *demo, *little, *one]
        if words[0] == "serve":
            words.append("--dry-run")
        if words[0] == "eval":
            words += ["--limit", "2", "--no-baseline"]
        with hub(tmp_path) if words[0] == "push" else contextlib.nullcontext():
            result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert (tmp_path / "out" / "mine" / "report.json").is_file()
    assert (tmp_path / "out" / "curve" / "25pct" / "report.json").is_file()


@pytest.mark.slow
def test_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    load = recipe.load
    monkeypatch.setattr(
        "moe_rco.load_recipe", lambda name, settings: load(name, [*settings, *QUICK]), raising=False
    )
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "bytes, KL 0." in printed
    assert "Question: What is 47 + 38?" in printed
    assert "of 600000 bytes" in printed
