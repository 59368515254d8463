"""The pages in a real browser: nothing on its console, and the figures it shows are those of report.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_rco import cli
from moe_rco import recipe as recipes
from moe_rco.pipeline import prune_all
from moe_rco.units import format_size
from tests.browser import find_browser, loaded
from tests.tiny_job import save_job

BROWSER = find_browser()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run for two budgets."""
    place = tmp_path_factory.mktemp("pages")
    job = save_job(place, steps=4, refine=4)
    prune_all(recipes.load(str(job), [f"output={place / 'out'}", "budget=[40%,17%]"]))
    return place / "out"


def shown(path: Path, profile: Path) -> str:
    assert BROWSER is not None
    document, console = loaded(BROWSER, path, profile)
    assert console == []
    return document


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_report_in_a_browser(output: Path, tmp_path: Path) -> None:
    report = json.loads((output / "17pct" / "report.json").read_text())
    document = shown(output / "17pct" / "report.html", tmp_path)
    text = " ".join(re.sub(r"<[^>]*>", " ", document).split())
    for figure in (
        f"{format_size(report['bytes']['experts_before'])} → {format_size(report['bytes']['experts_after'])}",
        f"{report['bytes']['total']:,} bytes on disk",
        f"KL to the original {report['kl']:.5f} ± {report['kl_stderr']:.5f}",
        *(
            f"{part['name']} {part['tokens']:,} {part['loss_before']:.4f} {part['loss_after']:.4f}"
            for part in report["domains"]
        ),
        *(f"{candidate['kl']:.5f} {candidate['cost']:,}" for candidate in report["candidates"]),
    ):
        assert figure in text, figure
    for title in ("loss of a step's samples", "error of the budget", "temperature", "entropy"):
        assert f'aria-label="{title}' in document.replace("&#x27;", "'"), title
    assert document.count("<title>layer ") == sum(len(layer["options"]) for layer in report["layers"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_several_in_a_browser(output: Path, tmp_path: Path) -> None:
    document = shown(output / "report.html", tmp_path / "profile")
    assert "model at 2 budgets" in document
    page = tmp_path / "compare.html"
    result = CliRunner().invoke(
        cli.app, ["compare", str(output), str(output / "40pct"), "--output", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert document.count('class="map"') == shown(page, tmp_path / "profile").count('class="map"') == 2


def test_compare(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(output.parent)
    page, other = tmp_path / "compare.html", tmp_path / "thesis.html"
    run = CliRunner().invoke
    result = run(cli.app, ["compare", "out", "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^out/\w+", result.output, re.MULTILINE) == ["out/40pct", "out/17pct"]
    assert page.is_file()
    assert run(cli.app, ["compare", "out", "--output", str(page)]).exit_code == 0  # its own page is replaced
    found = json.loads(run(cli.app, ["compare", "out", "--json"]).output)
    assert found["out/17pct"] == json.loads((output / "17pct" / "report.json").read_text())
    other.write_text("years of work")
    result = run(cli.app, ["compare", "out", "--output", str(other)])
    assert (result.exit_code, other.read_text()) == (2, "years of work")
    assert "name another file" in result.output
    result = run(cli.app, ["compare", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "report.json" in result.output
