"""Random problems for the optimiser's tests: hypothesis strategies and exact evaluations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from eval.synthetic import qwen3_instance


def examples(count: int) -> settings:
    """So many examples, however long each takes: the machine may be busy."""
    return settings(max_examples=count, deadline=None)


@dataclass(frozen=True)
class Relaxed:
    """A manifold's arguments and some logits."""

    costs: Tensor
    budgets: Tensor
    segments: Tensor | None
    allowed: Tensor
    logits: Tensor
    generator: torch.Generator

    def normal_vector(self) -> Tensor:
        return torch.randn(self.costs.shape, generator=self.generator, dtype=torch.float64)


@st.composite
def relaxed(draw: st.DrawFn, wild: bool = False) -> Relaxed:
    """Costs of order 1 and mild logits, or (wild) costs from 0 to 1e12 and logits up to +-500, many tied."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    groups, options = draw(st.integers(1, 40)), draw(st.integers(1 if wild else 2, 8))
    segments_count = draw(st.integers(1, min(3, groups)))
    allowed = rand(groups, options) < draw(st.sampled_from([0.6, 1.0]))
    allowed[:, : 1 if wild else 2] = True
    if wild:
        costs = torch.floor(10 ** (12 * rand(groups, options)))
        costs = draw(st.sampled_from([costs, costs * (rand(groups, options) < 0.7), 1e12 + costs]))
        reach = draw(st.sampled_from([1.0, 30.0, 500.0]))
        logits = reach * (2 * rand(groups, options) - 1)
        logits = draw(st.sampled_from([logits, reach * torch.sign(logits)]))
    else:
        costs = 0.1 + rand(groups, options)
        logits = 4 * rand(groups, options) - 2
    segments = torch.arange(groups) % segments_count
    low = costs.masked_fill(~allowed, torch.inf).amin(1)
    high = costs.masked_fill(~allowed, -torch.inf).amax(1)
    low = torch.zeros(segments_count, dtype=torch.float64).index_add_(0, segments, low)
    high = torch.zeros(segments_count, dtype=torch.float64).index_add_(0, segments, high)
    share = 0.1 + 0.8 * rand(segments_count)
    if wild:
        share = draw(st.sampled_from([share, share**40, 1 - share**40, share.round()]))
    budgets = (low + share * (high - low)).clamp(min=low, max=high)
    return Relaxed(costs, budgets, segments if segments_count > 1 else None, allowed, logits, generator)


def exact_costs(probabilities: Tensor, costs: Tensor, segments: Tensor | None, count: int) -> list[float]:
    """Expected cost per segment, each added up without rounding."""
    owner = torch.zeros(len(costs), dtype=torch.int64) if segments is None else segments
    return [math.fsum((probabilities * costs)[owner == s].flatten().tolist()) for s in range(count)]


@dataclass(frozen=True)
class Knapsack:
    """Arguments of solve_mckp."""

    values: NDArray[np.float64]
    costs: NDArray[np.int64]
    budget: int
    floor: NDArray[np.int64]
    layer: NDArray[np.int64]
    allowed: NDArray[np.bool_]

    def arguments(self) -> dict:
        return {"floor": self.floor, "layer": self.layer, "allowed": self.allowed}

    def feasible(self, choice: NDArray[np.int64]) -> bool:
        rows = np.arange(len(self.costs))
        cost = self.costs[rows, choice]
        kept = np.bincount(self.layer[cost > 0], minlength=len(self.floor))
        fits = cost.sum() <= self.budget and bool(self.allowed[rows, choice].all())
        return fits and bool((kept >= self.floor).all())

    def enumerate(self) -> tuple[float | None, int | None]:
        """(best value, smallest cost that satisfies the floors), None where there is none."""
        groups = len(self.costs)
        options = [np.flatnonzero(mask) for mask in self.allowed]
        choices = np.array(list(itertools.product(*options)))
        rows = np.arange(groups)
        costs = self.costs[rows, choices]
        enough = np.ones(len(choices), bool)
        for layer, least in enumerate(self.floor):
            enough &= (costs[:, self.layer == layer] > 0).sum(axis=1) >= least
        total, value = costs.sum(axis=1), self.values[rows, choices].sum(axis=1)
        fits = enough & (total <= self.budget)
        best = float(value[fits].max()) if fits.any() else None
        return best, int(total[enough].min()) if enough.any() else None


def small_knapsack(rng: np.random.Generator) -> Knapsack:
    """A problem small enough to enumerate, of one of several kinds that make exact solvers stumble."""
    groups, options = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    shape = (groups, options)
    kind = rng.integers(6)
    values = rng.normal(size=shape)
    if kind == 0:
        costs = rng.integers(0, 6, shape)
    elif kind == 1:  # ties in values and costs
        costs, values = rng.integers(0, 4, shape), rng.integers(0, 4, shape).astype(float)
    elif kind == 2:  # no common divisor
        costs = rng.integers(0, 10**9, shape)
        costs[:, 0] = 0
    elif kind == 3:  # the same options everywhere
        costs = np.tile(np.sort(np.r_[0, rng.integers(0, 130, options - 1)]) * 73728, (groups, 1))
    elif kind == 4:  # equal values
        costs, values = rng.integers(0, 3, shape), np.full(shape, float(rng.integers(0, 2)))
    else:  # value proportional to cost, nearly
        costs = rng.integers(0, 50, shape)
        values = costs + rng.integers(0, 2, shape) * rng.choice([0.0, 0.5])
    allowed = rng.random(shape) < 0.8
    allowed[np.arange(groups), rng.integers(0, options, groups)] = True
    layers = int(rng.integers(1, 4))
    floor = rng.integers(0, 3, layers) if rng.random() < 0.6 else np.zeros(layers, np.int64)
    budget = int(rng.integers(0, np.where(allowed, costs, 0).max(axis=1).sum() + 2))
    return Knapsack(values, costs, budget, floor, rng.integers(0, layers, groups), allowed)


def large_knapsack(seed: int, layers: int = 8, experts: int = 32, ratio: float = 0.3) -> Knapsack:
    """Layers of experts with real byte costs and losses that fall with precision."""
    values, costs, layer, budget = qwen3_instance(seed, layers, experts, ratio)
    floor = np.full(layers, experts // 8)
    return Knapsack(values, costs, budget, floor, layer, np.ones(costs.shape, bool))
