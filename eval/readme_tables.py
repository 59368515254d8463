"""The README's tables of held-out KL, from what `eval.quality` has kept: `python -m eval.readme_tables` writes them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.rivals import FISHER, LINEARITY, PROXY, RCO, UNIFORM

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
MODELS = {
    "demo": "Qwen3-MoE, 6 x 32 experts (demo)",
    "qwen2_moe": "Qwen2-MoE, 4 x 16",
    "mixtral": "Mixtral, 4 x 8",
}
_SEEDED = (FISHER, RCO)


@dataclass(frozen=True)
class Table:
    """A table of the README: its results file, whether its second column is the `budget` or what is `pruned`, and its methods'
    columns."""

    file: str
    share: str
    columns: Mapping[str, str]

    def render(self) -> list[str]:
        """The lines in Markdown: a row for every model and budget, the mean over seeds in every cell."""
        records = json.loads((RESULTS / self.file).read_text(encoding="utf-8"))
        lines = ["| " + " | ".join(("model", self.share, *self.columns.values())) + " |"]
        lines.append("|:--|" + "--:|" * (1 + len(self.columns)))
        for model, shown in MODELS.items():
            ratios = sorted({record["ratio"] for record in records if record["model"] == model}, reverse=True)
            for ratio in ratios:
                cells = [_cell(records, model, ratio, method) for method in self.columns]
                share = 1 - ratio if self.share == "pruned" else ratio
                lines.append(f"| {shown} | {share:.0%} | " + " | ".join(cells) + " |")
        return lines


JOINT = Table(
    "quality.json",
    "budget",
    {
        UNIFORM: "uniform width",
        "frequency + bf16": "frequency pruning, bf16",
        "frequency + int4": "frequency pruning, 4 bits",
        PROXY: "output error + knapsack",
        "evolution": "evolution",
        FISHER: "Fisher seed",
        RCO: "**moe_rco**",
    },
)
PRUNED = Table(
    "quality_pruned.json",
    "pruned",
    {
        "frequency + bf16": "frequency",
        "REAP + bf16": "REAP",
        PROXY: "output error + knapsack",
        LINEARITY: "linearity + knapsack",
        "evolution": "evolution",
        FISHER: "Fisher seed",
        RCO: "**moe_rco**",
    },
)


def _cell(records: Sequence[Mapping[str, Any]], model: str, ratio: float, method: str) -> str:
    values = [
        record["kl"]
        for record in records
        if (record["model"], record["ratio"], record["method"]) == (model, ratio, method)
        and record["kl"] is not None
    ]
    if not values:
        return "–"
    mean = statistics.mean(values)
    if method in _SEEDED:
        places = 5 if mean < 0.3 else 3
        return f"{mean:.{places}f} ± {statistics.stdev(values):.{places}f}"
    return f"{mean:.5f}" if mean < 0.01 else f"{mean:.3f}"


def updated(readme: str) -> str:
    """The README with both tables as the results are. Raises ValueError where it has not one of each."""
    for table in (JOINT, PRUNED):
        lines = table.render()
        found = re.findall(re.escape(lines[0]) + r"\n(?:\|.*\n)+", readme)
        if len(found) != 1:
            raise ValueError(f"the README has {len(found)} tables that begin with {lines[0]}")
        readme = readme.replace(found[0], "\n".join(lines) + "\n")
    return readme


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
