"""Everything that is checked and known about a job before work starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_rco.adapters import Adapter, get_adapter
from moe_rco.calib.data import check_sources
from moe_rco.ckpt.destination import check_destination
from moe_rco.ckpt.locate import fetch_model, read_config
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import output_bytes
from moe_rco.errors import ModelError, UserError
from moe_rco.quant.packing import cost_table
from moe_rco.recipe import Recipe
from moe_rco.report import BudgetPart, OptionCost, Preflight
from moe_rco.types import Budget, CostTable
from moe_rco.units import format_size

_SOURCE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sized:
    """A recipe's model as its config.json tells it: costs of every option and the resolved budget, no weights read."""

    recipe: Recipe
    config: dict[str, Any]
    adapter: Adapter
    table: CostTable
    budget: Budget


def size(recipe: Recipe) -> Sized:
    """Costs and budget from config.json alone. Raises UserError for every way in which they cannot be had."""
    config = read_config(recipe)
    adapter = get_adapter(config)
    groups = adapter.groups(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _SOURCE_BYTES:
        raise ModelError(
            f"config.json says dtype '{dtype}'; only float32, float16 and bfloat16 models can be compressed"
        )
    original = sum(group.numel for group in groups) * _SOURCE_BYTES[dtype]
    table = cost_table(groups, recipe.options, adapter.top_k(config), original)
    return Sized(recipe, config, adapter, table, recipe.budget.resolve(table))


def resolve_device(recipe: Recipe) -> torch.device:
    """`auto` is the GPU if there is one. Raises UserError where the named device is not there."""
    name = recipe.execution.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"execution.device is {name}, but {torch.cuda.device_count()} CUDA devices are visible"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("execution.device is mps, but there is no such device here")
    return device


def resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 elsewhere."""
    name = recipe.execution.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


def check(recipe: Recipe, *, overwrite: bool = False) -> Preflight:
    """Check all that can be checked without reading weights, and say what the run would take. Raises UserError."""
    sized = size(recipe)
    device = resolve_device(recipe)
    check_sources(recipe.calibration)
    directory = recipe.model_directory
    table, budget = sized.table, sized.budget
    others = 0
    if directory is not None:
        checkpoint = Checkpoint(directory)
        checkpoint.check_experts(sized.adapter)
        others = output_bytes(checkpoint, sized.adapter, 0)
    memory = _memory(sized, resolve_dtype(recipe, device), others)
    limit = recipe.execution.memory_limit
    if limit is not None and memory > limit:
        raise UserError(
            f"the run needs about {format_size(memory)} of memory, execution.memory_limit is {format_size(limit)}; "
            "use fewer options or fewer calibration sequences"
        )
    quantized = [index for index, option in enumerate(table.options) if option.is_quantized]
    needed = int(table.costs[:, quantized].sum()) + budget.bytes + others
    output = Path(recipe.output)
    check_destination(output, overwrite=overwrite, needed_bytes=needed, keep=directory)
    return Preflight(
        model=recipe.model,
        family=sized.adapter.model_type,
        layers=len(table.layers),
        experts_per_layer=sized.adapter.num_experts(sized.config),
        top_k=table.floor,
        options=tuple(
            OptionCost(name=option.name, bytes_per_expert=int(table.costs[:, index].mean()))
            for index, option in enumerate(table.options)
        ),
        experts_before=table.original_bytes,
        smallest=table.range[0],
        largest=table.range[1],
        budget=BudgetPart(text=budget.text, bytes=budget.bytes),
        sequences=recipe.calibration.sequences,
        tokens=recipe.calibration.tokens,
        holdout_sequences=recipe.calibration.holdout_sequences,
        search_method=recipe.search.method,
        search_steps=recipe.search.steps,
        search_samples=recipe.search.samples,
        output=str(output),
        disk_needed=needed,
        disk_free=shutil.disk_usage(_existing(output)).free,
        memory=memory,
    )


def fetch(sized: Sized) -> Checkpoint:
    """The model's files, downloaded if need be, with every header checked. Raises ModelError."""
    checkpoint = Checkpoint(fetch_model(sized.recipe))
    checkpoint.check_experts(sized.adapter)
    return checkpoint


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _memory(sized: Sized, dtype: torch.dtype, others: int) -> int:
    """Bytes the run holds: every option of every expert, the rest of the model, activations and references."""
    table, calibration = sized.table, sized.recipe.calibration
    kept = 1 + sum(not option.is_prune for option in table.options)
    hidden, _ = sized.adapter.expert_shape(sized.config)
    per_token = 2 * hidden * dtype.itemsize + 64 * 8
    # The interpreter with its libraries takes 700 MB, the model's other weights are held in `dtype`.
    return 700 * 10**6 + table.numel * dtype.itemsize * kept + 2 * others + calibration.tokens * per_token
