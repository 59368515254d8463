"""Everything that is checked and known about a job before work starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from moe_rco.calib.data import TokenPool, check_sources, overlap
from moe_rco.calib.team import processes_here
from moe_rco.ckpt.destination import check_destination
from moe_rco.ckpt.locate import fetch_model
from moe_rco.ckpt.rewrite import other_tensors, output_bytes
from moe_rco.ckpt.stock import transformers_reads
from moe_rco.errors import UserError
from moe_rco.footprint import Footprint, Shapes, resident, streamed
from moe_rco.forecast import OF_EACH_BUDGET, stage_times
from moe_rco.job import Ready, Sized, open_inputs, size
from moe_rco.recipe import Recipe
from moe_rco.report import BudgetPart, OptionCost, Preflight, TextPart
from moe_rco.types import Progress
from moe_rco.units import format_size

REPEATED = 0.05
"""A share of the text kept out that may stand in the other as well: licences, menus and the like."""


def check(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> Preflight:
    """Say what a run would take, its time by a short measurement. Of a model that is not local only config.json is
    fetched. Raises UserError.
    """
    sized = size(recipe)
    local = None if recipe.model_directory is None else open_inputs(sized, recipe.model_directory)
    _check_resources(sized, local, overwrite)
    if local is None:
        check_sources(recipe.calibration)
        return describe(sized, None, {})
    local = replace(local, streaming=footprint(sized, local).streaming)
    return describe(sized, local, stage_times(local, progress))


def make_ready(recipe: Recipe, *, overwrite: bool = False) -> Ready:
    """Check everything that can be wrong, the cheapest first, and download what is not local. Raises UserError."""
    sized = size(recipe)
    _check_resources(sized, None, overwrite)
    ready = open_inputs(sized, fetch_model(recipe))
    _check_resources(sized, ready, overwrite)
    return replace(ready, streaming=footprint(sized, ready).streaming)


def _check_resources(sized: Sized, ready: Ready | None, overwrite: bool) -> None:
    """Device, memory, output directory and disk; more exactly once the model's files are known."""
    recipe = sized.recipe
    found, available = footprint(sized, ready), psutil.virtual_memory().available
    if found.device and found.host > available:
        raise UserError(
            f"the run needs about {format_size(found.host)} of the host's memory, which has {format_size(available)} free; "
            "use fewer calibration sequences"
        )
    check_destination(
        Path(recipe.output),
        overwrite=overwrite,
        needed_bytes=_disk(sized, ready),
        keep=recipe.model_directory,
    )


def describe(sized: Sized, ready: Ready | None, times: Mapping[str, float]) -> Preflight:
    """What a run would take, its `times` for one budget being known. Raises UserError where memory is too small."""
    recipe, table = sized.recipe, sized.table
    found = footprint(sized, ready)
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
    repeated = 0.0 if ready is None else overlap(ready.pools[1], ready.pools[0])
    if repeated > REPEATED:
        warnings += (
            f"{repeated:.0%} of the text that is kept out of the search is also in the text for gradients (the same documents "
            "more than once?): what is measured on it looks better than it is; remove the duplicates",
        )
    return Preflight(
        model=recipe.model,
        family=sized.adapter.model_type,
        layers=len(table.layers),
        experts_per_layer=sized.adapter.num_experts(sized.config),
        top_k=table.floor,
        options=tuple(
            OptionCost(name=option.name, bytes_per_expert=int(table.experts.costs[:, index].mean()))
            for index, option in enumerate(table.options)
        ),
        groups=recipe.groups,
        experts_before=table.original_bytes,
        other_bytes=_others(sized, ready),
        smallest=table.range[0],
        largest=table.range[1],
        budgets=tuple(map(BudgetPart.of, sized.budgets)),
        layout=recipe.layout,
        sequences=sequences,
        tokens=sequences * recipe.calibration.sequence_length,
        holdout_sequences=holdout,
        text=() if ready is None else _text(ready.pools),
        search_method=recipe.search.method,
        search_steps=recipe.search.search_steps,
        search_races=recipe.search.races,
        search_samples=recipe.search.samples,
        output=recipe.output,
        disk_needed=_disk(sized, ready),
        disk_free=shutil.disk_usage(_existing(Path(recipe.output))).free,
        memory=found.host,
        device_memory=found.device,
        streamed=found.streaming is not None,
        stages={
            name: seconds * (len(sized.budgets) if name in OF_EACH_BUDGET else 1)
            for name, seconds in times.items()
        },
        warnings=warnings,
    )


def _text(pools: tuple[TokenPool, ...]) -> tuple[TextPart, ...]:
    """The parts of the text, by name."""
    counted: dict[str, list[float]] = {}
    for pool in pools:
        shares = [1.0] * len(pool) if pool.weights is None else (pool.weights > 0).double().mean(1).tolist()
        for name, share in zip(pool.domains, shares, strict=True):
            counted.setdefault(name, []).append(share)
    return tuple(
        TextPart(name=name, sequences=len(shares), counted=sum(shares) / len(shares))
        for name, shares in sorted(counted.items())
    )


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _disk(sized: Sized, ready: Ready | None) -> int:
    """Bytes written: every quantised option once, a model for every budget, and activations for which memory is too small."""
    quantized = [index for index, option in enumerate(sized.table.options) if option.is_quantized]
    others = _others(sized, ready) if ready is None else output_bytes(ready.checkpoint, sized.table.groups, 0)
    outputs = sum(budget.bytes + others for budget in sized.budgets)
    streaming = footprint(sized, ready).streaming
    spilled = _shapes(sized, ready).activations if streaming is not None and streaming.spill else 0
    stored = int(sized.table.costs[:, quantized].sum())
    # Of one layer at a time, the experts that are quantised already are put together.
    return stored + stored // len(sized.table.layers) + outputs + spilled


def _others(sized: Sized, ready: Ready | None) -> int:
    """Bytes of all weights that the budget does not cover; those of the files where they are here."""
    if ready is not None:
        return sum(tensor.nbytes for tensor in other_tensors(ready.checkpoint, sized.table.groups))
    return sized.other_numel * sized.table.original_bytes // sized.table.numel


def footprint(sized: Sized, ready: Ready | None) -> Footprint:
    """What memory the run takes, and whether weights are streamed so that it stays within the limit. Raises UserError.

    The limit is `execution.memory_limit`, otherwise what is free: of the device's memory, or the host's where it computes.
    """
    execution = sized.recipe.execution
    device, shapes = sized.device, _shapes(sized, ready)
    on_host = device.type != "cuda"
    limit, available = (
        execution.memory_limit,
        int(0.9 * psutil.virtual_memory().available) // processes_here(),
    )
    if limit is None:
        limit = available if on_host else int(0.9 * torch.cuda.mem_get_info(device)[0])
    if execution.mode == "streaming":
        return streamed(shapes, limit, available, on_host)
    found = resident(shapes, on_host)
    if (found.host if on_host else found.device) <= limit:
        return found
    if execution.mode == "auto":
        return streamed(shapes, limit, available, on_host)
    raise UserError(
        f"the run needs about {format_size(found.host if on_host else found.device)} of memory with all weights in it, and "
        f"may take {format_size(limit)}; set execution.mode to auto, which streams them"
    )


def _shapes(sized: Sized, ready: Ready | None) -> Shapes:
    recipe, config, adapter = sized.recipe, sized.config, sized.adapter
    table, chosen = sized.table.experts, [sized.table.groups[row] for row in sized.table.dense]
    hidden, inner = adapter.expert_shape(config)
    heads = int(config.get("num_attention_heads") or 1)
    attention = (heads + 2 * int(config.get("num_key_value_heads") or heads)) * int(
        config.get("head_dim") or hidden // heads
    )
    layers, vocabulary = int(config["num_hidden_layers"]), int(config.get("vocab_size") or 0)
    if ready is None:
        dense = sized.other_numel + sum(group.numel for group in chosen)
        tokens = recipe.calibration.tokens
    else:
        dense = sum(math.prod(tensor.shape) for tensor in other_tensors(ready.checkpoint, table.groups))
        tokens = sum(pool.ids.numel() for pool in ready.pools)
    kept = [index for index, option in enumerate(table.options) if not option.is_prune]
    compact = int(table.costs[:, kept].sum() + table.original_bytes) // len(table.layers)
    dtype = sized.dtype
    return Shapes(
        layers=layers, experts=adapter.num_experts(config), top_k=table.floor, hidden=hidden, inner=inner,
        attention=attention, vocabulary=vocabulary, kept=len(kept), compact=compact,
        expert_numel=table.numel // len(table.groups), dense=dense, tokens=tokens,
        length=recipe.calibration.sequence_length, samples=recipe.search.samples, batch=recipe.search.batch,
        item=dtype.itemsize,
        chosen=sum(group.numel for group in chosen),
        widest=max((weight.numel for group in chosen for weight in group.weights), default=0),
    )  # fmt: skip
