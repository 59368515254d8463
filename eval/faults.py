"""Faults, tried on the command line: bad input of every kind, and runs that are killed, starved or interrupted.

python -m eval.faults
python -m eval.faults --kinds recipe checkpoint --cases 300 --seed 7 --output out/faults.md
python -m eval.faults --kinds recipe --only 12        # one case, with what the command says
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# Inputs name data sets that are nowhere: they are to be refused without a minute of asking the Hub for them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from eval.faults_runs import rows as disturbed
from eval.faults_table import Row, table
from tests.faults.corpus import KINDS, Corpus

RUNS = "runs"


def render(rows: Sequence[Row], command: str, seconds: float) -> str:
    """The table in Markdown."""
    lines = [
        "# Faults",
        "",
        f"Made by `{command}` in {seconds / 60:.0f} minutes.",
        "",
        "Handled is what was refused in one line with exit code 2, or done where the change did no harm, in less than a",
        "minute of a processor, within 2 GiB, with no traceback, nothing written outside of the output, and no output where it",
        "was refused.",
        "",
        "Runs that are killed, starved or interrupted must say why in one line (for those killed, or aborted by a library,",
        "the process beside them does) and, started again, end in the same bytes.",
        "",
        table(rows),
        "",
        *(f"- `{wrong[:300]}`" for row in rows for wrong in row.failed),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, RUNS), default=[*KINDS, RUNS])
    parser.add_argument("--cases", type=int, default=2200, help="of bad input, all kinds together")
    parser.add_argument("--runs", type=int, default=110, help="runs that are disturbed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone")
    parser.add_argument("--output", type=Path, default=Path("eval/results/faults.md"))
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "eval.faults", *sys.argv[1:]])
    start, rows = time.monotonic(), list[Row]()
    with TemporaryDirectory(prefix="moe-rco-") as directory:
        corpus = Corpus(Path(directory) / "corpus")
        for kind in arguments.kinds:
            if kind == RUNS:
                found = disturbed(arguments.seed, arguments.runs, lambda line: print(line, flush=True))
                rows += found
                arguments.output.write_text(render(rows, command, time.monotonic() - start), encoding="utf-8")
                continue
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
            arguments.output.write_text(render(rows, command, time.monotonic() - start), encoding="utf-8")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
