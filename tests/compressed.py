"""Compresses tiny models at random for tests of what is written and loaded; quantises by round-to-nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_rco.adapters import Adapter, get_adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import RewriteResult, rewrite
from moe_rco.ckpt.store import Store
from moe_rco.plan import Plan
from moe_rco.quant.packing import cost_table, pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import Assignment, Budget, CostTable, Option

EVERY_OPTION = ("prune", "int2-g64", "int3-g32", "int3", "int4-g64", "int4", "int8-g64", "int8", "bf16")


@dataclass(frozen=True)
class Job:
    """Everything `rewrite` needs but a destination."""

    checkpoint: Checkpoint
    adapter: Adapter
    assignment: Assignment
    plan: Plan
    store: Store
    recipe: str = "version: 1\n"

    def write(
        self,
        destination: Path,
        *,
        shard_bytes: int = 100_000,
        overwrite: bool = False,
        manifest: Path | None = None,
    ) -> RewriteResult:
        return rewrite(
            self.checkpoint,
            self.assignment,
            self.plan,
            self.store,
            destination,
            self.recipe,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            manifest=manifest,
        )


def random_job(
    model: Path, store: Path, seed: int, options: Sequence[str] = EVERY_OPTION, dense: bool = False
) -> Job:
    """A random assignment that keeps at least as many experts as are used per token, its store, and its
    plan; with `dense` of every group that the model has.
    """
    checkpoint = Checkpoint(model)
    adapter = get_adapter(checkpoint.config)
    table = table_of(checkpoint, options, dense)
    rng = np.random.default_rng(seed)
    choice = rng.integers(len(table.options), size=len(table.groups))
    kept_options = [index for index, option in enumerate(table.options) if not option.is_prune]
    for layer in table.layers:
        always = rng.choice(table.rows(layer), size=table.floor, replace=False)
        choice[always] = rng.choice(kept_options, size=table.floor)
    for row in table.dense:
        choice[row] = rng.choice(table.allowed[row].nonzero()[0])
    assignment = Assignment(table, choice)
    plan = plan_of(assignment, slack=1000)
    return Job(checkpoint, adapter, assignment, plan, quantise(checkpoint, table, store))


def table_of(checkpoint: Checkpoint, options: Sequence[str], dense: bool = False) -> CostTable:
    adapter = get_adapter(checkpoint.config)
    groups = adapter.groups(checkpoint.config)
    groups += adapter.every_dense(checkpoint.config) if dense else ()
    parsed = tuple(Option.parse(name) for name in options)
    original = sum(checkpoint.tensors[weight.name].nbytes for group in groups for weight in group.weights)
    return cost_table(groups, parsed, adapter.top_k(checkpoint.config), original)


def plan_of(assignment: Assignment, slack: int = 0) -> Plan:
    budget = Budget(assignment.cost + slack, "a test")
    return Plan.from_assignment(assignment, budget, model_digest="m", recipe_digest="r", losses={"kl": 0.25})


def quantise(checkpoint: Checkpoint, table: CostTable, directory: Path) -> Store:
    store = Store(directory, "test")
    for layer in table.layers:
        groups = [table.groups[row] for row in table.rows(layer)]
        for option in filter(lambda option: option.is_quantized, table.options):
            tensors: dict[str, torch.Tensor] = {}
            for weights in zip(*(group.weights for group in groups), strict=True):
                stacked = torch.stack([checkpoint.read(weight.name).float() for weight in weights])
                quantised = quantize_rtn(stacked, option, search=False)
                packed = pack(quantised.codes, quantised.scale, quantised.zero, option)
                for index, weight in enumerate(weights):
                    base = weight.name.removesuffix(".weight")
                    tensors |= {f"{base}.{suffix}": tensor[index] for suffix, tensor in packed.items()}
            store.write(layer, option, tensors)
    for group in (table.groups[row] for row in table.dense):
        for option in filter(lambda option: option.is_quantized and group.admits(option), table.options):
            tensors = {}
            for weight in group.weights:
                made = quantize_rtn(checkpoint.read(weight.name).float(), option, search=False)
                packed, base = pack(*made, option), weight.name.removesuffix(".weight")
                tensors |= {f"{base}.{suffix}": tensor for suffix, tensor in packed.items()}
            store.write(group.name, option, tensors)
    return store
