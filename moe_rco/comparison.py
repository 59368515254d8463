"""What `moe-rco compare` puts beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_rco import page
from moe_rco.ckpt.destination import CURVE
from moe_rco.curve import Curve
from moe_rco.errors import OutputError, PlanError
from moe_rco.report import Report


def collect(directories: Iterable[str]) -> dict[str, Report]:
    """The reports of some outputs, by name; an output of several budgets gives all of its own.

    Raises PlanError where there is none.
    """
    found = dict[str, Report]()
    for name in directories:
        directory = Path(name)
        several = (directory / CURVE).is_file()
        points = [point.directory for point in Curve.load(directory).points] if several else [""]
        for point in points:
            found[str(directory / point)] = Report.load(directory / point)
    if not found:
        raise PlanError("nothing to compare; name directories that moe-rco prune wrote")
    return found


def write(path: Path, reports: Mapping[str, Report]) -> None:
    """The page. Raises OutputError, also where a file is there that is no such page."""
    if path.exists() and not _is_page(path):
        raise OutputError(f"{path} exists and is no page of moe-rco compare; name another file with --output")
    try:
        page.save_compared(path, reports)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _is_page(path: Path) -> bool:
    return path.is_file() and b'id="reports"' in path.read_bytes()
