"""Minimise a loss over discrete choices under a linear budget: relaxed constrained optimisation (arXiv
2605.00649).

Riemannian Adam moves logits on the budget manifold; gradients come from straight-through samples, each of
which is an assignment within the budget; discrete candidates are evaluated on the way and the best one seen
is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_rco.errors import UserError
from moe_rco.optim.feasible import FeasibleSet
from moe_rco.optim.gumbel import gumbel_noise, straight_through, temperature
from moe_rco.optim.manifold import BudgetManifold
from moe_rco.optim.mckp import Knapsack, MCKPSolution
from moe_rco.optim.relaxation import OnManifold, Penalized, Relaxation
from moe_rco.optim.swaps import improve
from moe_rco.optim.trace import Incumbent, StepRecord, pack_history, unpack_history

SEARCH, LINEAR, SWAPS = "search", "linear", "swaps"
Constraint = Literal["manifold", "penalty", "lagrangian"]
_MEMORY = 0.9


@dataclass(frozen=True)
class SolveResult:
    """The best assignment seen.

    `choice` int64 [N], its evaluated `value` and integer `cost`; `name` of the candidate it came from
    ("search", "linear" and "swaps" are the optimiser's own); `status` "completed" or "stalled" (stopped by patience);
    `history`, one record a step; `evaluations`, calls of the loss; the final `logits` [N, K], empty where
    the method has none.
    """

    choice: NDArray[np.int64]
    value: float
    cost: int
    status: str
    history: tuple[StepRecord, ...]
    evaluations: int
    name: str
    logits: Tensor

    @property
    def assignment(self) -> NDArray[np.int64]:
        """`choice` by its other name."""
        return self.choice


def minimize(
    loss: Callable[[Tensor], Tensor],
    costs: Any,
    budget: int,
    *,
    steps: int = 300,
    samples: int = 4,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    tau: tuple[float, float] = (1.0, 0.05),
    init_logits: Tensor | None = None,
    floor: Any = None,
    layer: Any = None,
    allowed: Any = None,
    feasible: FeasibleSet | None = None,
    constraint: Constraint = "manifold",
    weight: float = 1.0,
    evaluate: Callable[[NDArray[np.int64]], float] | None = None,
    evaluate_every: int = 0,
    candidates: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    swaps: int | None = None,
    margin: float = 0.0,
    patience: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    state: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> SolveResult:
    """Choose one option per group so that the loss is low and the costs add up to at most `budget`.

    Args:
        loss: maps a straight-through one-hot tensor float64 [N, K] to a scalar tensor. How it makes gradients
            with respect to that tensor (autograd or an estimator of its own) is its business. If it has a method
            `together`, that is given all samples of a step in a list, and returns their losses.
        costs: integers [N, K], numpy or torch; `logits` and samples live on its device.
        budget: integer. The expected cost equals it throughout, so it must lie between the cheapest and the
            dearest assignment; samples and result never cost more.
        steps, samples, lr, betas, tau: optimiser steps, antithetic samples a step, Adam's rate and decays,
            first and last temperature. The second decay is shorter than Adam's usual 0.999: a few groups with
            large effects are settled first, and their gradients must be forgotten for the others to move.
        init_logits: float [N, K] prior, moved onto the manifold first; zeros when left out.
        floor, layer, allowed: as in `solve_mckp`; they hold in every sample.
        feasible: what samples and result are taken from, in place of all assignments within the budget and
            those floors; made for the same costs and budget. The relaxation knows the budget only.
        constraint, weight: "manifold" is this method. With "penalty" the expected cost may miss the budget at
            a price of `weight` (C / B - 1)^2, with "lagrangian" at that and a multiplier, raised until it does not
            (`Penalized`); samples then keep the floors, only what is evaluated keeps the budget.
        evaluate: value of a choice int64 [N], lower is better, on data that gave no gradients. Without it
            the loss stands in, of every sample too; it must then be deterministic.
        evaluate_every: decode and evaluate every so many steps; 0 only at the end, which always happens.
        candidates: named choices evaluated first; the result is never worse than any of them.
        swaps: calls of the loss that a local search by exact swaps may take in the end (`swaps.improve`); as many
            as there were samples when left out. There are no swaps where `evaluate` is given: they would learn its
            data by heart.
        margin: how much lower than the best so far a value must be to replace it.
        patience: stop after this many evaluations in a row without a new best.
        on_step: called after every step; `record.state()` is a snapshot to continue from.
        state: such a snapshot; with the same other arguments the run continues bit-identically on a CPU.
        seed: of the noise.

    Raises:
        BudgetError: no assignment satisfies budget and floors, or the budget exceeds the dearest assignment.
        UserError: malformed input, an infeasible candidate, or a loss that is not finite or has no gradient.
    """
    costs = torch.as_tensor(costs)
    mask = None if allowed is None else torch.as_tensor(allowed, device=costs.device)
    if feasible is None:
        feasible = Knapsack(costs, budget, floor=floor, layer=layer, allowed=mask)
    manifold = BudgetManifold(costs, float(budget), allowed=mask)
    relaxation, sampled = OnManifold(manifold, lr, betas), feasible
    if constraint != "manifold":
        relaxation = Penalized(manifold, lr, betas, weight, dual=constraint == "lagrangian")
        sampled = Knapsack(costs, int(costs.sum()), floor=floor, layer=layer, allowed=mask)
    run = _Run(loss, budget, manifold, relaxation, (sampled, feasible), evaluate, margin, seed)
    if state is None:
        run.start(init_logits, candidates)
    else:
        run.load(state)
    status = "completed"
    for step in range(run.step, steps):
        record = run.advance(samples, temperature(step, steps, tau), step + 1 == steps, evaluate_every)
        if on_step is not None:
            on_step(record)
        if patience is not None and run.best.misses >= patience:
            status = "stalled"
            break
    if run.step == 0:
        run.judge_decode(last=True)
    elif evaluate is None and run.relaxation.exact:
        run.swap(run.step * samples if swaps is None else swaps, seed)
    return run.result(status)


class _Run:
    """The state of one minimisation."""

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        budget: int,
        manifold: BudgetManifold,
        relaxation: Relaxation,
        sets: tuple[FeasibleSet, FeasibleSet],
        evaluate: Callable[[NDArray[np.int64]], float] | None,
        margin: float,
        seed: int,
    ) -> None:
        self.loss, self.evaluate, self.budget = loss, evaluate, budget
        self.manifold, self.relaxation = manifold, relaxation
        self.sampled, self.feasible = sets
        self.generator = torch.Generator().manual_seed(seed)
        self.best = Incumbent(margin)
        self.history: list[StepRecord] = []
        self.step = self.evaluations = 0
        self.logits = torch.zeros_like(self.manifold.costs)
        # Running sum of the loss's gradients with respect to the samples, old ones fading.
        self.slope = torch.zeros_like(self.logits)
        self.warm: MCKPSolution | None = None

    def start(
        self, init_logits: Tensor | None, candidates: Mapping[str, Any] | Iterable[tuple[str, Any]]
    ) -> None:
        if init_logits is not None:
            self.logits = init_logits.detach().to(self.logits)
        self.logits = self.relaxation.start(self.logits)
        for name, choice in dict(candidates).items():
            self._judge(self.feasible.checked(choice, f"candidate {name!r}"), name)
        self.best.misses = 0

    def advance(self, samples: int, tau: float, last: bool, every: int) -> StepRecord:
        """One optimiser step, then the evaluation of its decode if one is due."""
        leaf = self.logits.clone().requires_grad_(True)
        total, choices, drawn = 0.0, list[NDArray[np.int64]](), list[Tensor]()
        for noise in gumbel_noise((leaf.shape[0], leaf.shape[1]), samples, self.generator):
            noisy = (leaf + noise.to(leaf.device)) / tau
            self.warm = self.sampled.solve(noisy, warm=self.warm)
            choices.append(self.warm.choice)
            drawn.append(
                straight_through(self._one_hot(self.warm.choice), self.manifold.probabilities(noisy))
            )
        together = getattr(self.loss, "together", None)
        losses = map(self.loss, drawn) if together is None else together(drawn)
        for choice, sample, loss in zip(choices, drawn, losses, strict=True):
            value = self._backward(sample, loss, samples)
            total += value
            if self.evaluate is None and self.relaxation.exact:
                self.best.offer(choice, value, SEARCH)
        if leaf.grad is None:
            raise UserError("the loss has no gradient with respect to the sample")
        self.logits = self.relaxation.step(self.logits, leaf.grad)
        self.step += 1
        value = self.judge_decode(last) if last or (every and self.step % every == 0) else None
        p = self.manifold.probabilities(self.logits)
        entropy = float(torch.special.entr(p).sum(dim=1).mean())
        gap = float((self.manifold.expected_cost(self.logits) - self.budget).abs()) / max(1, self.budget)
        record = StepRecord(
            self.step, total / samples, gap, tau, entropy, value, self.best.value, self.evaluations
        )
        self.history.append(record)
        return record.with_state(self.state)

    def judge_decode(self, last: bool) -> float:
        """Evaluate the most probable assignment within the budget; at the end also the best of the linearised
        loss, which is the optimum itself when the loss is a sum over groups."""
        choice = self.feasible.solve(torch.log_softmax(self.logits, dim=1)).choice
        value = self._judge(choice, SEARCH)
        if last and self.step > 0 and self.relaxation.exact:
            self._judge(self.feasible.solve(-self.slope).choice, LINEAR)
        return value

    def swap(self, evaluations: int, seed: int) -> None:
        """Improve the best assignment by exact swaps."""
        if self.best.choice is None:
            return
        choice, value = improve(
            self._value, self.feasible, self.logits.shape[1], self.best.choice, self.best.value,
            evaluations=evaluations, seed=seed,
        )  # fmt: skip
        self.best.offer(choice, value, SWAPS)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: tensors, plain numbers and one string."""
        adam = {f"adam.{name}": value for name, value in self.relaxation.state_dict().items()}
        warm = 0.0 if self.warm is None else self.warm.multiplier
        return adam | self.best.state() | {
            "logits": self.logits.clone(), "slope": self.slope.clone(), "step": self.step,
            "generator": self.generator.get_state(), "evaluations": self.evaluations,
            "history": pack_history(self.history), "multiplier": warm,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        if state["logits"].shape != self.logits.shape:
            raise UserError(f"the state is of another problem: logits {list(state['logits'].shape)}")
        self.logits = state["logits"].clone().to(self.logits.device)
        self.slope = state["slope"].clone().to(self.logits.device)
        self.relaxation.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("adam.")})
        self.best.load(state)
        self.generator.set_state(state["generator"])
        self.step, self.evaluations = int(state["step"]), int(state["evaluations"])
        self.history = unpack_history(state["history"])
        self.warm = self.sampled.hint(float(state["multiplier"]))

    def result(self, status: str) -> SolveResult:
        choice = self.best.choice
        if choice is None:
            raise UserError("nothing was evaluated")
        return SolveResult(
            choice, self.best.value, self.feasible.cost_of(choice), status, tuple(self.history),
            self.evaluations, self.best.name, self.logits,
        )  # fmt: skip

    def _judge(self, choice: NDArray[np.int64], name: str) -> float:
        known = self.best.recall(choice)
        if known is None:
            known = self._value(choice)
            if math.isnan(known):
                raise UserError(f"the value of {name!r} is not a number")
        self.best.judge(choice, known, name)
        return known

    def _value(self, choice: NDArray[np.int64]) -> float:
        if self.evaluate is not None:
            return float(self.evaluate(choice))
        self.evaluations += 1
        with torch.no_grad():
            return float(self.loss(self._one_hot(choice)))

    def _backward(self, sample: Tensor, value: Tensor, samples: int) -> float:
        self.evaluations += 1
        if not bool(torch.isfinite(value)):
            raise UserError(f"the loss is {float(value.detach())} at step {self.step}")
        if not value.requires_grad:
            raise UserError("the loss has no gradient with respect to the sample")
        sample.retain_grad()
        (value / samples).backward()
        if sample.grad is not None:
            self.slope.mul_(_MEMORY ** (1 / samples)).add_(sample.grad)
        return float(value.detach())

    def _one_hot(self, choice: NDArray[np.int64]) -> Tensor:
        hard = torch.zeros_like(self.logits)
        return hard.scatter_(1, torch.from_numpy(choice).to(hard.device).unsqueeze(1), 1.0)
