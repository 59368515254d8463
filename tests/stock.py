"""Compresses tiny models at random in the stock layout, for tests of what is written and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_rco.adapters import get_adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.types import Assignment
from tests.compressed import Job, plan_of, quantise, table_of

READABLE = ("prune", "int4-g32", "int4-g64", "int4", "int8-g64", "int8", "bf16")
"""Every kind of option that the stock layout admits."""


def stock_job(
    model: Path, store: Path, seed: int, options: Sequence[str] = READABLE, count: int | None = None
) -> Job:
    """A random stock assignment that keeps `count` experts a layer; without it any number that is enough.

    Layers take the options in turn, from a random one on.
    """
    checkpoint = Checkpoint(model)
    table = replace(table_of(checkpoint, options), layout="stock")
    rng = np.random.default_rng(seed)
    kept = [index for index, option in enumerate(table.options) if not option.is_prune]
    size = len(table.rows(table.layers[0]))
    if count is None:
        count = size if table.prune_index is None else int(rng.integers(table.floor, size))
    choice = np.full(len(table.groups), -1 if table.prune_index is None else table.prune_index)
    first = int(rng.integers(len(kept)))
    for number, layer in enumerate(table.layers):
        rows = rng.choice(table.rows(layer), size=count, replace=False)
        choice[rows] = kept[(first + number) % len(kept)]
    assignment = Assignment(table, choice)
    plan = plan_of(assignment, slack=1000)
    adapter = get_adapter(checkpoint.config)
    return Job(checkpoint, adapter, assignment, plan, quantise(checkpoint, table, store))
