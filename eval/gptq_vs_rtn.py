"""Output error of GPTQ against round-to-nearest, per option, on the trained models.

    python -m eval.gptq_vs_rtn
    python -m eval.gptq_vs_rtn --models mixtral --set calibration.sequences=64

The error is sum |(W - W') x|^2 over the calibration tokens and all expert matrices of a layer, divided by sum
|W x|^2; shown is the mean over layers, and the largest GPTQ / RTN of a single layer. The figures are those that
quantising left in the store; it is done first where eval.quality or an earlier run has not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.prepared import MODELS, recipe_of, store_directory, subject
from moe_rco.job import size

INTRODUCTION = """# GPTQ against round-to-nearest

Made by `python -m eval.gptq_vs_rtn`: relative squared output error on the calibration tokens, mean over layers.
"""


def statistics_of(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """What quantising noted, by layer."""
    recipe = recipe_of(name, 0, settings)
    index = store_directory(name, recipe) / "index.json"
    if index.exists():
        stats = json.loads(index.read_text(encoding="utf-8"))["stats"]
        wanted = {option.name for option in recipe.options if option.is_quantized}
        layers = {str(layer) for layer in size(recipe).table.layers}
        if layers <= stats.keys() and all(wanted <= stats[layer]["error"].keys() for layer in layers):
            return stats
    return subject(name, recipe).prepared.store.stats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("eval/results/gptq_vs_rtn.md"))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        layers = statistics_of(name, arguments.settings).values()
        for option in next(iter(layers))["error"]:
            rtn, gptq = ([layer["error"][option][key] for layer in layers] for key in ("rtn", "gptq"))
            worst = max(g / r for g, r in zip(gptq, rtn, strict=True))
            means = sum(rtn) / len(rtn), sum(gptq) / len(gptq)
            rows.append((name, option, *means, means[1] / means[0], worst))
    lines = [
        INTRODUCTION,
        "| model | option | RTN error | GPTQ error | GPTQ / RTN | worst layer |",
        "|---" * 6 + "|",
    ]
    for name, option, rtn, gptq, ratio, worst in sorted(rows):
        lines.append(f"| {name} | {option} | {rtn:.3e} | {gptq:.3e} | {ratio:.3f} | {worst:.3f} |")
    text = "\n".join(lines) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
