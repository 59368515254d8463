"""Every block of code on every page is run or read by a test, which is named here: a new one has to be added to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import ROOT, fences

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKED_BY = {
    ("README.md", "bash"): "tests/test_readme.py::test_commands_run_in_their_order",
    ("README.md", "yaml"): "tests/test_readme.py::test_recipes_are_valid",
    ("README.md", "python"): "tests/test_readme.py::test_python_block_runs",
    ("README.md", "text"): "tests/test_shipped_recipes.py::test_a_dry_run_has_the_real_sizes",
    ("budget.md", "bash"): "tests/test_tutorial.py::test_the_budgets_are_read_as_the_page_says",
    ("budget.md", "yaml"): "tests/test_tutorial.py::test_the_budgets_are_read_as_the_page_says",
    ("cli.md", "bash"): "tests/test_cli.py::test_shells_can_complete",
    ("cli.md", "fish"): "tests/test_cli.py::test_shells_can_complete",
    ("cli.md", "zsh"): "tests/test_cli.py::test_shells_can_complete",
    ("integrity.md", "bash"): "tests/test_readme.py::test_commands_run_in_their_order",
    ("new-family.md", "bash"): "tests/test_new_family.py::test_following_it_adds_the_family",
    ("new-family.md", "python"): "tests/test_new_family.py::test_following_it_adds_the_family",
    ("new-family.md", "yaml"): "tests/test_new_family.py::test_following_it_adds_the_family",
    ("publishing.md", "bash"): "tests/e2e/test_push.py::test_the_page_s_commands_work",
    ("publishing.md", "python"): "tests/e2e/test_report_to.py::test_who_follows_changes_nothing",
    ("recipe.md", "yaml"): "tests/eval/test_reference.py::test_pages_are_up_to_date",
    ("security.md", "bash"): "tests/test_blocks.py::test_what_is_audited_is_there",
    ("tutorial.md", "bash"): "tests/test_tutorial.py::test_every_command_does_what_the_page_says",
    ("tutorial.md", "text"): "tests/test_tutorial.py::test_every_command_does_what_the_page_says",
}
"""By page and language the test that goes through all blocks of that language on the page."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_somebodys(page: Path) -> None:
    found = fences(page.read_text(encoding="utf-8"))
    assert [info for info, _ in found if (page.name, info.split()[0] if info else "") not in CHECKED_BY] == []


def test_nobody_is_named_in_vain() -> None:
    there = {
        (page.name, info.split()[0]) for page in PAGES for info, _ in fences(page.read_text(encoding="utf-8"))
    }
    assert set(CHECKED_BY) == there
    for name in CHECKED_BY.values():
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_what_is_audited_is_there() -> None:
    """Run by hand, as it asks a server: every package has one exact version, without which there is no audit."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+( *[;#].*)?", pin)] == []
