"""A recipe for a tiny model with the demo's tokenizer and a little text, for tests that start real processes."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

from moe_rco.recipe import DEMO_CALIBRATION, DEMO_MODEL
from tests.tiny_models import save_tiny

RECIPE = """\
version: 1
model: {model}
options: [prune, int4-g64, int8-g64, bf16]
budget: {{ratio: 0.17}}
calibration: {{data: {model}/text.jsonl, sequences: 48, sequence_length: 64, holdout: 0.25}}
search: {{steps: {steps}, refine: {refine}, samples: 2, batch: 4, evaluate_every: 2, learning_rate: 0.4}}
output: out
"""


def save_job(place: Path, steps: int, refine: int, family: str = "qwen3_moe", **config: Any) -> Path:
    """Make `place`/model and `place`/recipe.yaml; the recipe's path. At this budget the search finds what the seed does not."""
    model = save_tiny(family, place / "model", vocab_size=4096, num_hidden_layers=4, **config)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    with DEMO_CALIBRATION.open(encoding="utf-8") as source:
        (model / "text.jsonl").write_text("".join(itertools.islice(source, 40)), encoding="utf-8")
    path = place / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, steps=steps, refine=refine), encoding="utf-8")
    return path
