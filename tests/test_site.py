"""The documentation builds as a site without a warning, and every link on it leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(place)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    return place


def test_links_lead_somewhere(site: Path) -> None:
    seen, lost = 0, []
    for page in site.rglob("*.html"):
        for link, anchor in re.findall(
            r'(?:href|src)="([^"#]*)(?:#([^"]*))?"', page.read_text(encoding="utf-8")
        ):
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                continue
            path = (page.parent / unquote(link)).resolve() if link else page
            target = path / "index.html" if path.is_dir() else path
            seen += 1
            if not target.is_file() or (
                anchor and f'id="{unquote(anchor)}"' not in target.read_text(encoding="utf-8")
            ):
                lost.append((str(page.relative_to(site)), link, anchor))
    assert seen > 500
    assert lost == []


def test_it_needs_no_other_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', text), page


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "method" / "index.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "\\(" not in text
    assert "\\sum" not in text


def test_commands_and_measurements_are_there(site: Path) -> None:
    commands = (site / "cli" / "index.html").read_text(encoding="utf-8")
    assert "--dry-run" in commands
    assert "Held-out KL" in (site / "results" / "quality" / "index.html").read_text(encoding="utf-8")
    assert (site / "recipe.schema.json").is_file()
