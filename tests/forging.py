"""Changes a finished output so that its digests still fit, as a careful forger would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_rco import page
from moe_rco.ckpt.writer import sha256_of
from moe_rco.report import Report


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_report(output: Path, **changes: object) -> None:
    """With its own digest, and its page, made anew."""
    report = Report.load(output).model_copy(update=changes)
    report.save(output)
    page.save(output, report, (output / "recipe.yaml").read_text())


def sign(output: Path, name: str) -> None:
    """Put the digest of a changed file into the manifest, and the manifest's into the report."""
    path = output / name
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    change_json(output / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    change_report(output, manifest=sha256_of(output / "manifest.json"))
