"""The search for an assignment: RCO on the model's own loss, started from the Fisher seed; or a rival's.

Every sample is run as the deployed model. Its gradient estimate is the first-order effect of each move in output space,
plus the curvature the first order does not see: moving group i from option j to k adds the new option's own error q_ik and,
because the linear term promises twice what undoing the old one's gives, q_ij.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.reference import Reference, divergence
from moe_rco.optim import EqualLayers, FeasibleSet, Knapsack, Method, StepRecord, evolution_steps, solve
from moe_rco.optim.evolution import GROWTH
from moe_rco.recipe import Search
from moe_rco.types import Assignment, Budget, CostTable, Progress

SEED = "fisher seed"
STRIDE = 2
START_BONUS = 1.0
SEARCHES: dict[str, Method] = {method: method for method in get_args(Method)}
"""The recipe's methods that search on the model's loss."""


def feasible(table: CostTable, budget: Budget) -> FeasibleSet:
    """The assignments within the budget that keep the table's floor and layout. Raises BudgetError."""
    kind = EqualLayers if table.layout == "stock" else Knapsack
    return kind(table.costs, budget.bytes, floor=table.floor, layer=table.layer)


def knapsack(losses: np.ndarray, table: CostTable, budget: Budget) -> Assignment:
    """The feasible assignment with the least sum of `losses` [N, K], exactly. Raises BudgetError."""
    return Assignment(table, feasible(table, budget).solve(-losses).choice)


def start_logits(q: np.ndarray, start: Assignment) -> torch.Tensor:
    """-q / T with T the mean predicted loss of `start`: differences that matter are of order one.

    Options of `start` get a bonus, so that the search begins near it even where q would choose otherwise.
    """
    groups = np.arange(len(q))
    temperature = q[groups, start.choice].mean()
    logits = -q / max(temperature, 1e-12)
    logits[groups, start.choice] += START_BONUS
    return torch.from_numpy(logits)


class Resume(Protocol):
    """Where an interrupted search is kept."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, values: Mapping[str, Any]) -> None: ...


class SampledLoss:
    """Maps a straight-through sample [N, K] to the KL on a fresh batch; every step uses one batch for all its samples."""

    def __init__(
        self, model: AssignedModel, q: np.ndarray, pool: TokenPool, reference: Reference, search: Search
    ) -> None:
        self._model, self._q, self._pool, self._reference = model, q, pool, reference
        self._search = search
        self._calls = 0

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        batch = min(self._search.batch, len(self._pool))
        rows = _rows(len(self._pool), batch, self._calls // self._search.samples, self._search.seed)
        self._calls += 1
        choice = sample.detach().argmax(1).numpy()
        target = self._reference.of(rows, self._model.runner.device)

        def loss(row: int, logits: torch.Tensor) -> torch.Tensor:
            return divergence(target.row(row), logits).sum()

        ids = self._pool.ids[rows]
        total, effects = self._model.effects(choice, ids, loss, stride=STRIDE)
        groups = np.arange(len(choice))
        gradient = effects.linear + self._q + self._q[groups, choice][:, None]
        gradient[groups, choice] = 0.0
        return _Estimated.apply(sample, total / ids.numel(), torch.from_numpy(gradient))  # pyright: ignore[reportReturnType]

    def skip(self, steps: int) -> None:
        """Go on as after `steps` steps."""
        self._calls = steps * self._search.samples


class _Estimated(torch.autograd.Function):
    """A loss with a gradient that was estimated beside it."""

    @staticmethod
    def forward(ctx: Any, sample: torch.Tensor, value: float, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return sample.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class KeptOut:
    """Judges discrete assignments by KL on the kept-out sequences; each is run once."""

    def __init__(self, model: AssignedModel, pool: TokenPool, reference: Reference) -> None:
        self._model, self._pool, self._reference = model, pool, reference
        self._known: dict[bytes, np.ndarray] = {}

    def sequences(self, choice: np.ndarray) -> np.ndarray:
        """KL of each kept-out sequence, float64 [n]."""
        key = choice.astype(np.int64).tobytes()
        if key not in self._known:
            assignment = Assignment(self._model.table, choice)
            self._known[key] = self._model.divergences(assignment, self._pool, self._reference)
        return self._known[key]

    def __call__(self, choice: np.ndarray) -> float:
        return float(self.sequences(choice).mean())

    def prefers(self, candidate: Candidate, best: Candidate) -> bool:
        """Whether a candidate is better by more than two standard errors of the paired difference.

        The kept-out text is a sample too, and the lowest of many figures on it is partly luck.
        """
        gain = self.sequences(best.assignment.choice) - self.sequences(candidate.assignment.choice)
        return bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))


@dataclass(frozen=True)
class Candidate:
    """An assignment that was tried, and its KL on the kept-out sequences in nats per token."""

    name: str
    assignment: Assignment
    kl: float


@dataclass(frozen=True)
class Chosen:
    """The best candidate, all of them (best first), and the history of the search.

    `mixed` is the best of the assignments that were only to be compared with; None where there were none.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    history: tuple[StepRecord, ...]
    mixed: Candidate | None = None


def batch_losses(
    model: AssignedModel, pool: TokenPool, reference: Reference, search: Search
) -> Callable[[np.ndarray, int, int], float]:
    """(choice, generation, batches) to the KL on so many batches of a generation, the first ones for fewer."""
    span = min(GROWTH * search.batch, len(pool))

    def value(choice: np.ndarray, generation: int, batches: int) -> float:
        rows = _rows(len(pool), span, generation, search.seed)[: batches * search.batch]
        part = TokenPool(pool.ids[rows], tuple(pool.domains[row] for row in rows))
        target = reference.of(rows, model.runner.device)
        return float(model.divergences(Assignment(model.table, choice), part, target).mean())

    return value


def find(
    model: AssignedModel,
    budget: Budget,
    q: np.ndarray,
    pools: tuple[TokenPool, TokenPool],
    references: tuple[Reference, Reference],
    search: Search,
    candidates: Mapping[str, Assignment],
    progress: Progress,
    resume: Resume | None = None,
    mixed: Mapping[str, Assignment] | None = None,
) -> Chosen:
    """The best assignment found on the kept-out sequences by the recipe's method, which starts from the best candidate.

    With `rco` the first candidate stays unless another is clearly better. A method that does not search has its own
    assignments as candidates. `mixed` are assignments outside the table's layout, judged on the same text to tell what
    the layout costs.
    """
    table, judge = model.table, KeptOut(model, pools[1], references[1])
    careful = judge.prefers if search.method == "rco" else lambda one, other: one.kl < other.kl
    tried = [Candidate(name, assignment, judge(assignment.choice)) for name, assignment in candidates.items()]
    best, rival = tried[0], min(tried, key=lambda candidate: candidate.kl)
    if careful(rival, best):
        best = rival
    smallest, largest = table.range
    history: tuple[StepRecord, ...] = ()
    # Where the budget leaves no choice there is nothing to relax.
    if search.method in SEARCHES and search.steps and smallest < budget.bytes < largest:
        loss = SampledLoss(model, q, pools[0], references[0], search)
        state = resume.load() if resume else None
        evolution = search.method == "evolution"
        steps = evolution_steps(search.steps, search.samples) if evolution else search.steps
        with progress.stage("search", steps) as advance:
            if state:
                loss.skip(state["step"])
                advance(state["step"])

            def on_step(record: StepRecord) -> None:
                if resume and record.step % search.evaluate_every == 0:
                    resume.save(record.state())
                advance(1)

            shared: dict[str, Any] = {
                "feasible": feasible(table, budget), "evaluate": judge, "evaluate_every": search.evaluate_every,
                "on_step": on_step, "state": state, "seed": search.seed, "samples": search.samples,
                "steps": search.steps, "floor": table.floor, "layer": table.layer,
            }  # fmt: skip
            if evolution:
                value = batch_losses(model, pools[0], references[0], search)
                shared |= {"value": value, "start": best.assignment.choice}
            else:
                shared |= {"lr": search.learning_rate, "tau": (search.tau_start, search.tau_end)}
                shared |= {
                    "init_logits": start_logits(q, best.assignment),
                    "weight": search.penalty * best.kl,
                }
            costs = torch.from_numpy(table.costs)
            result = solve(costs, budget.bytes, loss, method=SEARCHES[search.method], **shared)
        found = Candidate(search.method, Assignment(table, result.choice), result.value)
        tried.append(found)
        history = result.history
        if careful(found, best):
            best = found
    others = [Candidate(name, other, judge(other.choice)) for name, other in (mixed or {}).items()]
    compared = min(others, key=lambda candidate: candidate.kl, default=None)
    return Chosen(best, tuple(sorted(tried, key=lambda candidate: candidate.kl)), history, compared)


def _rows(sequences: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Rows of a step's batch: the pool in a new random order every epoch."""
    epoch, position = divmod(step, sequences // batch)
    order = np.random.default_rng((seed, epoch)).permutation(sequences)
    return torch.from_numpy(order[position * batch : (position + 1) * batch].copy())
