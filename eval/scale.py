"""What a run costs as it grows: memory, writing, quantising, steps streamed and shared, and steps by the number of experts.

    python -m eval.scale --gptq CLONE                        # CLONE: a clone of github.com/IST-DASLab/gptq
    python -m eval.scale --parts memory --layers 2 4 7
    python -m eval.scale --parts gptq --gptq CLONE

Every part leaves its figures in a JSON file beside the table; the table has what has been measured. Models are made in
out/scale: 1.2 GB a layer, seven of them 8 GiB. Rivals run in the same process, in turn with ours; shown is the median of the
ratios of neighbours, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.scale_memory import memory, writing
from eval.scale_quantising import quantising
from eval.scale_steps import by_experts, shared, streamed

PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "memory": memory,
    "writing": writing,
    "gptq": quantising,
    "streamed": streamed,
    "shared": shared,
    "experts": by_experts,
}
TITLES = {
    "memory": "The whole job on a model with Qwen3-30B-A3B's layer shape: largest resident memory by the number of layers",
    "writing": "Writing the result over copying the same files",
    "gptq": "GPTQ over the reference implementation, on the same matrices and Hessians",
    "streamed": "A search step with weights streamed over one with all of them in memory",
    "shared": "A search with two processes over one",
    "experts": "A search step by the number of experts",
}


def render(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = ["# Scale"]
    for part, title in TITLES.items():
        if part not in found:
            continue
        rows = found[part]["rows"]
        lines += ["", f"## {title}", "", f"Made by `{found[part]['command']}`.", ""]
        lines += [f"| {' | '.join(rows[0])} |", f"|{'--:|' * len(rows[0])}"]
        lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 7])
    parser.add_argument("--limit", default="3.7GiB", help="execution.memory_limit of the part memory")
    parser.add_argument("--gptq", type=Path, metavar="CLONE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("out/scale"))
    parser.add_argument("--output", type=Path, default=Path("eval/results/scale.md"))
    arguments = parser.parse_args()
    if "gptq" in arguments.parts and arguments.gptq is None:
        parser.error("the part gptq needs --gptq CLONE")
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.output.with_suffix(".json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in arguments.parts:
        print(part, flush=True)
        rows = PARTS[part](arguments)
        found[part] = {"command": shlex.join(["python", "-m", "eval.scale", *sys.argv[1:]]), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        arguments.output.write_text(render(found), encoding="utf-8")
    print(render(found))


if __name__ == "__main__":
    main()
