"""The pages in docs/: links and tests that they name exist, and their commands are the command line's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_rco.calib.search import FAR_OFF
from moe_rco.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, rest in re.findall(r"^moe-rco (\S+)(.*)$", text, re.MULTILINE):
        if name == "serve":  # takes vLLM's, too
            continue
        known = {option for parameter in app.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest.split("  #")[0])) <= known, rest


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"docs/{page.name}" not in readme] == []


@pytest.mark.parametrize("name", ["method.md", "recipe.md"])
def test_the_limit_above_which_gradients_go_on_is_the_code_s(name: str) -> None:
    assert f"more than {FAR_OFF} times what" in (ROOT / "docs" / name).read_text(encoding="utf-8")
