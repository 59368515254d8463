"""Problems of choosing one option per group whose optimum is known: by knapsack solvers, or by enumeration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack
from torch import Tensor

from moe_rco.optim import solve_mckp

QWEN3_COSTS = 73728 * np.array([0, 17, 25, 33, 65, 128])
"""Bytes of an expert of Qwen3-30B-A3B when pruned, at 2, 3, 4 and 8 bits in groups of 64, and in bf16."""


@dataclass(frozen=True)
class Problem:
    """`loss` maps one-hot choices float64 [N, K] to a scalar; `optimum` is its least value within `budget`."""

    loss: Callable[[Tensor], Tensor]
    costs: np.ndarray
    budget: int
    optimum: float

    def start(self) -> np.ndarray:
        """The dearest option that all groups can take at once, or the cheapest of each."""
        prices = np.sort(self.costs, axis=1)
        fits = np.flatnonzero(prices.sum(0) <= self.budget)
        rank = int(fits[-1]) if len(fits) else 0
        return np.argsort(self.costs, axis=1, kind="stable")[:, rank]


def qwen3_instance(
    seed: int, layers: int = 48, experts: int = 128, ratio: float = 0.3
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Values [N, 6], costs, layers [N] and a budget, with losses as wide apart as real ones; N = 6144 as it is."""
    rng = np.random.default_rng(seed)
    groups = layers * experts
    decay = np.array([1, 0.25, 0.06, 0.015, 6e-5, 0])
    values = -rng.lognormal(0, 2, (groups, 1)) * decay * rng.lognormal(0, 0.3, (groups, 6))
    costs = np.tile(QWEN3_COSTS, (groups, 1))
    return values, costs, np.repeat(np.arange(layers), experts), int(ratio * groups * QWEN3_COSTS[-1])


def highs(
    values: np.ndarray,
    costs: np.ndarray,
    budget: int,
    *,
    floor: np.ndarray,
    layer: np.ndarray,
    allowed: np.ndarray | None = None,
) -> float:
    """The optimum of `solve_mckp`'s problem by scipy.optimize.milp."""
    groups, options = costs.shape
    cells = np.arange(groups * options)
    unit = int(np.gcd.reduce(costs[costs > 0]))
    one = coo_array((np.ones(len(cells)), (cells // options, cells)))
    price = coo_array((costs / unit).reshape(1, -1))
    kept = coo_array(((costs > 0).ravel().astype(float), (np.repeat(layer, options), cells)))
    # Rows: one option a group, the price, the floor of every layer.
    rows: Any = vstack([one, price, kept])
    low: Any = np.r_[np.ones(groups), -np.inf, floor]
    high: Any = np.r_[np.ones(groups), budget // unit, np.full(len(floor), np.inf)]
    most: Any = 1.0 if allowed is None else allowed.ravel().astype(float)
    result = milp(
        -values.ravel(),
        integrality=np.ones(len(cells)),
        bounds=Bounds(0.0, most),  # pyright: ignore[reportArgumentType]
        constraints=[LinearConstraint(rows, low, high)],
        options={"mip_rel_gap": 0.0},
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS: {result.message}")
    return -float(result.fun)


def separable(groups: int, seed: int, options: int = 6) -> Problem:
    """A multiple-choice knapsack: random prices and, the dearer the better, random losses."""
    rng = np.random.default_rng((groups, seed))
    costs = np.sort(rng.integers(1, 1001, (groups, options)), axis=1)
    losses = np.sort(rng.random((groups, options)), axis=1)[:, ::-1].copy()
    budget = int((costs.min(1).sum() + costs.max(1).sum()) // 2)
    optimum = -solve_mckp(-losses, costs, budget).value
    weights = torch.from_numpy(losses)
    return Problem(lambda sample: (sample * weights).sum(), costs, budget, optimum)


def pairwise(seed: int, groups: int = 9, options: int = 4) -> Problem:
    """Losses of single choices and of every pair of choices, of the same size; solved by enumeration."""
    rng = np.random.default_rng(seed)
    size = groups * options
    costs = np.sort(rng.integers(0, 101, (groups, options)), axis=1)
    single = rng.normal(size=size)
    pair = np.triu(rng.normal(size=(size, size)), 1) / np.sqrt(groups)
    for group in range(groups):
        block = slice(group * options, (group + 1) * options)
        pair[block, block] = 0.0
    budget = int(0.4 * costs.min(1).sum() + 0.6 * costs.max(1).sum())
    linear, quadratic = torch.from_numpy(single), torch.from_numpy(pair)

    def loss(sample: Tensor) -> Tensor:
        flat = sample.reshape(-1)
        return linear @ flat + flat @ (quadratic @ flat)

    return Problem(loss, costs, budget, _least(single, pair, costs, budget))


def _least(single: np.ndarray, pair: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The least pairwise loss within the budget, over all choices, one more group at a time."""
    groups, options = costs.shape
    values, spent, chosen = np.zeros(1), np.zeros(1, np.int64), np.zeros((1, 0), np.int64)
    for group in range(groups):
        index = group * options + np.arange(options)
        coupling = pair[chosen[:, :, None], index].sum(1) if group else np.zeros((1, options))
        values = (values[:, None] + single[index] + coupling).ravel()
        spent = (spent[:, None] + costs[group]).ravel()
        before = np.repeat(chosen, options, axis=0)
        chosen = np.concatenate([before, np.tile(index, len(chosen))[:, None]], axis=1)
    return float(values[spent <= budget].min())


def overlapping(seed: int, budgets: int = 16, groups: int = 500, options: int = 32) -> tuple[Tensor, Tensor]:
    """Costs [q, N, K] and budgets [q] that random probabilities are known to meet."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(budgets, groups, options, generator=generator, dtype=torch.float64)
    p = torch.softmax(2 * torch.randn(groups, options, generator=generator, dtype=torch.float64), dim=1)
    return costs, (costs * p).sum((1, 2))
