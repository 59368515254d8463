"""The three trained models, calibrated and quantised as `moe-rco prune` does it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_rco import recipe as recipes
from moe_rco.calib.data import TokenPool, heldout_pool, load_tokenizer
from moe_rco.ckpt.locate import fetch_model
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.job import Sized, open_inputs, size
from moe_rco.pipeline import Prepared, prepare
from moe_rco.recipe import Recipe

MODELS = {
    "demo": "demo",
    "mixtral": str(Path(__file__).parent / "models" / "mixtral"),
    "qwen2_moe": str(Path(__file__).parent / "models" / "qwen2_moe"),
}
WORK = Path("out/eval")


@dataclass(frozen=True)
class Subject:
    """A model ready for any budget, and the held-out text of all domains."""

    name: str
    sized: Sized
    prepared: Prepared
    heldout: TokenPool


class Lines:
    """A Progress that prints the title of each stage and nothing else."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        print(f"    {title} ({total})", flush=True)
        yield lambda units: None


def recipe_of(name: str, seed: int = 0, settings: Sequence[str] = ()) -> Recipe:
    """The demo's recipe for one of `MODELS`; the seed decides calibration split, Fisher draws and noise."""
    return recipes.load("demo", [f"model={MODELS[name]}", f"search.seed={seed}", *settings])


def inputs_of(recipe: Recipe) -> str:
    """Digest of the model's files, the shipped text, and everything in a recipe but its budget."""
    directory = recipe.model_directory or Path(recipe.model)
    rest = recipe.model_copy(update={"budget": None}).model_dump_json(exclude={"output", "model", "budget"})
    digest = hashlib.sha256(f"{Checkpoint(directory).digest()} {rest}".encode())
    for text in (recipes.DEMO_CALIBRATION, recipes.DEMO_HELDOUT):
        digest.update(text.read_bytes())
    return digest.hexdigest()[:16]


def work_directory(name: str, recipe: Recipe) -> Path:
    """Where what is quantised for a recipe is kept."""
    return WORK / f"{name}-{inputs_of(recipe)}"


def store_directory(name: str, recipe: Recipe) -> Path:
    """The store of quantised experts in it."""
    return work_directory(name, recipe) / "store"


def subject(name: str, recipe: Recipe) -> Subject:
    """Calibrate and quantise, or take up what an earlier run with the same inputs has quantised."""
    ready = open_inputs(size(recipe), fetch_model(recipe))
    prepared = prepare(ready, work_directory(name, recipe), Lines())
    heldout = heldout_pool(recipe.calibration, load_tokenizer(ready.checkpoint.directory), prepared.pools[1])
    return Subject(name, ready.sized, prepared, heldout)
