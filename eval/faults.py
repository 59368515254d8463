"""Faults, tried on the command line: bad input of every kind, and runs that are killed, starved or interrupted.

python -m eval.faults
python -m eval.faults --kinds recipe checkpoint --cases 300 --seed 7 --output out/faults.md
python -m eval.faults --kinds recipe --only 12        # one case, with what the command says
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.corpus import KINDS, Corpus
from tests.faults.judge import Row

TITLES = {
    "recipe": "recipes and settings: fuzzed YAML, bombs, wrong types and values",
    "checkpoint": "checkpoints: cut, contradictory, lying, leading out of their directory, not finite",
    "output": "outputs changed by hand or by a bit: plan, report, manifest, config, weights",
    "text": "calibration text: empty, binary, broken, huge, of the wrong form",
    "store": "what an interrupted run has kept: flipped bits, lost and foreign files",
}


def render(rows: Sequence[Row], command: str, seconds: float) -> str:
    """The table in Markdown."""
    tried, failed = sum(row.tried for row in rows), sum(len(row.failed) for row in rows)
    lines = [
        "# Faults", "", f"Made by `{command}` in {seconds / 60:.0f} minutes.", "",
        "Handled is what was refused in one line with exit code 2, or done where the change did no harm, in less than a",
        "minute, within 2 GiB, with no traceback, nothing written outside of the output, and no output where it was refused.",
        "",
        "| fault | cases | handled | failed |", "|:--|--:|--:|--:|",
    ]  # fmt: skip
    lines += [
        f"| {TITLES.get(row.kind, row.kind)} | {row.tried:,} | {row.tried - len(row.failed):,} | {len(row.failed)} |"
        for row in rows
    ]
    lines.append(f"| **all** | {tried:,} | {tried - failed:,} | {failed} |")
    lines += ["", *(f"- `{wrong[:300]}`" for row in rows for wrong in row.failed)] if failed else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cases", type=int, default=2200, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone")
    parser.add_argument("--output", type=Path, default=Path("eval/results/faults.md"))
    arguments = parser.parse_args()
    start, rows = time.monotonic(), list[Row]()
    with TemporaryDirectory(prefix="moe-rco-") as directory:
        corpus = Corpus(Path(directory) / "corpus")
        for kind in arguments.kinds:
            count = round(arguments.cases * KINDS[kind])
            if arguments.only is not None:
                for number, wrong in corpus.tried(kind, count, arguments.seed, arguments.only):
                    print(f"{kind} {number}: {wrong or 'handled'}")
                    print((corpus.place / "case.log").read_text(encoding="utf-8", errors="replace"))
                continue
            rows.append(corpus.row(kind, count, arguments.seed))
            for wrong in rows[-1].failed:
                print(wrong[:300])
            print(f"{kind}: {rows[-1].tried} cases, {len(rows[-1].failed)} failed", flush=True)
            command = shlex.join(["python", "-m", "eval.faults", *sys.argv[1:]])
            arguments.output.write_text(render(rows, command, time.monotonic() - start), encoding="utf-8")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
