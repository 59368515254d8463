"""Draws a finished run's summary as an SVG picture, the one in the README.

moe-rco prune --recipe demo
python -m eval.picture out/demo eval/results/demo.svg
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from moe_rco import console
from moe_rco.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a directory that moe-rco prune wrote")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    paper = Console(
        record=True,
        width=100,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        markup=False,
    )
    console.show_summary(Report.load(arguments.run), paper)
    arguments.picture.write_text(paper.export_svg(title="moe-rco prune --recipe demo"), encoding="utf-8")


if __name__ == "__main__":
    main()
