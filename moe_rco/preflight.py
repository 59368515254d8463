"""Everything that is checked and known about a job before work starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_rco.adapters import Adapter, get_adapter
from moe_rco.baselines import check_method
from moe_rco.calib.data import TokenPool, check_sources, load_tokenizer, make_pools
from moe_rco.calib.reference import TOP
from moe_rco.ckpt.destination import check_destination
from moe_rco.ckpt.locate import fetch_model, read_config
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import output_bytes
from moe_rco.ckpt.stock import check_routers, transformers_reads
from moe_rco.errors import ModelError, UserError
from moe_rco.quant.packing import cost_table
from moe_rco.recipe import Recipe
from moe_rco.report import BudgetPart, OptionCost, Preflight
from moe_rco.types import Budget, CostTable
from moe_rco.units import format_size

LIBRARIES = 700 * 10**6
"""Resident bytes of the interpreter with torch and transformers."""
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
    table = replace(table, layout=recipe.layout)
    budget = recipe.budget.resolve(table)
    check_method(recipe.search.method, table, budget)
    return Sized(recipe, config, adapter, table, budget)


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


@dataclass(frozen=True)
class Ready:
    """A job whose inputs are all there and checked: the model's files and the calibration sequences (gradient, kept out)."""

    sized: Sized
    checkpoint: Checkpoint
    pools: tuple[TokenPool, TokenPool]

    @property
    def recipe(self) -> Recipe:
        return self.sized.recipe


def check(recipe: Recipe, *, overwrite: bool = False) -> Preflight:
    """Say what a run would take. Only config.json is fetched of a model that is not local. Raises UserError."""
    sized = size(recipe)
    local = None if recipe.model_directory is None else open_inputs(sized, recipe.model_directory)
    _check_resources(sized, local, overwrite)
    if local is not None:
        return _preflight(sized, local)
    check_sources(recipe.calibration)
    return _preflight(sized, None)


def make_ready(recipe: Recipe, *, overwrite: bool = False) -> Ready:
    """Check everything that can be wrong, the cheapest first, and download what is not local. Raises UserError."""
    sized = size(recipe)
    _check_resources(sized, None, overwrite)
    ready = open_inputs(sized, fetch_model(recipe))
    _check_resources(sized, ready, overwrite)
    return ready


def open_inputs(sized: Sized, directory: Path) -> Ready:
    """The model in a directory and the calibration text, checked; no weights are read. Raises ModelError, DataError."""
    recipe = sized.recipe
    checkpoint = Checkpoint(directory)
    checkpoint.check_experts(sized.adapter)
    if recipe.layout == "stock":
        check_routers(checkpoint, sized.adapter)
    names = {weight.name for group in sized.table.groups for weight in group.weights}
    stored = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name in names)
    if stored != sized.table.original_bytes:
        raise ModelError(
            f"{directory}: the routed experts take {stored} bytes, but config.json's dtype implies "
            f"{sized.table.original_bytes}; correct 'dtype' in config.json"
        )
    tokenizer = load_tokenizer(directory)
    vocabulary = int(sized.config.get("vocab_size", 0))
    return Ready(sized, checkpoint, make_pools(recipe.calibration, tokenizer, vocabulary, recipe.search.seed))


def _check_resources(sized: Sized, ready: Ready | None, overwrite: bool) -> None:
    """Device, memory, output directory and disk; more exactly once the model's files are known."""
    recipe = sized.recipe
    memory, limit = _memory(sized, ready), recipe.execution.memory_limit
    if limit is not None and memory > limit:
        raise UserError(
            f"the run needs about {format_size(memory)} of memory, execution.memory_limit is {format_size(limit)}; "
            "use fewer options or fewer calibration sequences"
        )
    check_destination(
        Path(recipe.output),
        overwrite=overwrite,
        needed_bytes=_disk(sized, ready),
        keep=recipe.model_directory,
    )


def _preflight(sized: Sized, ready: Ready | None) -> Preflight:
    recipe, table, budget = sized.recipe, sized.table, sized.budget
    sequences, holdout = recipe.calibration.sequences, recipe.calibration.holdout_sequences
    if ready is not None:
        sequences, holdout = sum(len(pool) for pool in ready.pools), len(ready.pools[1])
    warnings: tuple[str, ...] = ()
    kept = [option for option in recipe.options if not option.is_prune]
    if recipe.layout == "stock" and not transformers_reads(kept):
        warnings += (
            "layers of different widths are read by vLLM, but not by transformers (up to 5.19): for both, list "
            "options of one width, as in [prune, int4-g64] or [prune, bf16]",
        )
    if sequences < 0.9 * recipe.calibration.sequences:
        warnings += (
            f"the calibration text gives {sequences} sequences, fewer than the {recipe.calibration.sequences} asked for",
        )
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
        layout=recipe.layout,
        sequences=sequences,
        tokens=sequences * recipe.calibration.sequence_length,
        holdout_sequences=holdout,
        search_method=recipe.search.method,
        search_steps=recipe.search.search_steps,
        search_races=recipe.search.races,
        search_samples=recipe.search.samples,
        output=recipe.output,
        disk_needed=_disk(sized, ready),
        disk_free=shutil.disk_usage(_existing(Path(recipe.output))).free,
        memory=_memory(sized, ready),
        warnings=warnings,
    )


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _disk(sized: Sized, ready: Ready | None) -> int:
    """Bytes written: every quantised option once in the store, and the output."""
    quantized = [index for index, option in enumerate(sized.table.options) if option.is_quantized]
    others = 0 if ready is None else output_bytes(ready.checkpoint, sized.adapter, 0)
    return int(sized.table.costs[:, quantized].sum()) + sized.budget.bytes + others


def _memory(sized: Sized, ready: Ready | None) -> int:
    """Bytes the run holds: every option of every expert, the rest of the model, activations and references."""
    table = sized.table
    dtype = resolve_dtype(sized.recipe, resolve_device(sized.recipe))
    kept = 1 + sum(not option.is_prune for option in table.options)
    hidden, _ = sized.adapter.expert_shape(sized.config)
    per_token = hidden * dtype.itemsize + TOP * 8
    others = 0 if ready is None else 2 * output_bytes(ready.checkpoint, sized.adapter, 0)
    pools = None if ready is None else ready.pools
    tokens = sized.recipe.calibration.tokens if pools is None else sum(pool.ids.numel() for pool in pools)
    return LIBRARIES + table.numel * dtype.itemsize * kept + others + tokens * per_token
