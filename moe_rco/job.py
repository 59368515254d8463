"""A recipe made concrete: the model, its options' costs, the budgets and the calibration text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moe_rco.adapters import Adapter, get_adapter
from moe_rco.baselines import check_method
from moe_rco.calib.data import TokenPool, load_tokenizer, make_pools
from moe_rco.calib.streaming import Streaming
from moe_rco.calib.team import local_rank
from moe_rco.capacity import model_numel, room
from moe_rco.ckpt.locate import read_config
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.stock import check_routers
from moe_rco.errors import BudgetError, ModelError, RecipeError, UserError
from moe_rco.quant.packing import cost_table
from moe_rco.recipe import Recipe
from moe_rco.types import Budget, CostTable, covered

_log = logging.getLogger(__name__)
_SOURCE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sized:
    """A recipe's model as its config.json tells it: costs of every option and the resolved budgets, no weights read.

    `budgets` has the largest first.
    """

    recipe: Recipe
    config: dict[str, Any]
    adapter: Adapter
    table: CostTable
    budgets: tuple[Budget, ...]

    @cached_property
    def other_numel(self) -> int:
        """Weights of the model that the budget does not cover. Raises ModelError where transformers refuses config.json."""
        return model_numel(self.config) - self.table.numel

    @property
    def device(self) -> torch.device:
        """Where the run computes: `auto` is the GPU if there is one, for every process of a machine its own.

        Raises UserError where the named device is not there.
        """
        name = self.recipe.execution.device
        if name == "auto":
            name = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"execution.device is {name}, but {torch.cuda.device_count()} CUDA devices are visible"
            )
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UserError("execution.device is mps, but there is no such device here")
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the run computes in: `auto` is float32 on a CPU and bfloat16 elsewhere."""
        name = self.recipe.execution.dtype
        if name == "auto":
            name = "float32" if self.device.type == "cpu" else "bfloat16"
        return getattr(torch, name)


def size(recipe: Recipe) -> Sized:
    """Costs and budget from config.json alone. Raises UserError for every way in which they cannot be had."""
    config = read_config(recipe)
    adapter = get_adapter(config)
    groups = adapter.groups(config, recipe.groups)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _SOURCE_BYTES:
        raise ModelError(
            f"config.json says dtype '{dtype}'; only float32, float16 and bfloat16 models can be compressed"
        )
    original = sum(group.numel for group in groups) * _SOURCE_BYTES[dtype]
    table = cost_table(groups, recipe.options, adapter.top_k(config), original)
    table = replace(table, layout=recipe.layout)
    if not table.allowed.any(1).all():
        group = groups[int(table.allowed.any(1).argmin())]
        raise RecipeError(
            f"options: none of {', '.join(map(str, recipe.options))} can be taken by {group.name}, whose inputs are "
            f"{' and '.join(map(str, sorted({w.shape[1] for w in group.weights})))} wide; add int8, int4 or bf16, or leave "
            f"{group.kind} out of groups"
        )
    budgets = tuple(
        spec.resolve(table, None if spec.fit is None else room(spec.fit, config, adapter, table.numel))
        for spec in recipe.budget
    )
    return Sized(recipe, config, adapter, table, _in_order(recipe, table, budgets))


def _in_order(recipe: Recipe, table: CostTable, found: Sequence[Budget]) -> tuple[Budget, ...]:
    """The largest first. Raises BudgetError where two are the same, or the search's method cannot meet one."""
    budgets = sorted(found, key=lambda budget: -budget.bytes)
    for larger, budget in pairwise(budgets):
        if larger.bytes == budget.bytes:
            raise BudgetError(
                f"budget: {larger.text} and {budget.text} are the same {budget.bytes:,} bytes; keep one of them"
            )
    for budget in budgets:
        check_method(recipe.search.method, table, budget)
    return tuple(budgets)


@dataclass(frozen=True)
class Ready:
    """A job whose inputs are all there and checked: the model's files and the calibration sequences (gradient, kept out).

    `streaming` is None where all weights are to be in memory.
    """

    sized: Sized
    checkpoint: Checkpoint
    pools: tuple[TokenPool, TokenPool]
    streaming: Streaming | None = None

    @property
    def recipe(self) -> Recipe:
        return self.sized.recipe


def open_inputs(sized: Sized, directory: Path) -> Ready:
    """The model in a directory and the calibration text, checked; no weights are read. Raises ModelError, DataError."""
    recipe = sized.recipe
    checkpoint = Checkpoint(directory)
    checkpoint.check_experts(sized.adapter)
    checkpoint.check_groups([group for group in sized.table.groups if group.is_dense])
    if recipe.layout == "stock":
        check_routers(checkpoint, sized.adapter)
    names = {weight.name for group in sized.table.groups for weight in group.weights}
    stored = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name in names)
    if stored != sized.table.original_bytes:
        raise ModelError(
            f"{directory}: {covered(sized.table)} take {stored} bytes, but config.json's dtype implies "
            f"{sized.table.original_bytes}; correct 'dtype' in config.json"
        )
    _log.info("model %s: %d tensors", directory, len(checkpoint.tensors))
    tokenizer = load_tokenizer(directory)
    vocabulary = int(sized.config.get("vocab_size", 0))
    return Ready(sized, checkpoint, make_pools(recipe.calibration, tokenizer, vocabulary, recipe.search.seed))
