"""Decomposable proxy: the measured output error of every option of every expert, and an exact knapsack.

This is what most mixed-precision tools do. The error is that of the MoE block's output when one expert alone
takes one option, on the inputs of the uncompressed model:

- kept at option k: sum_t |w_t (f_k(x_t) - f(x_t))|^2 over the tokens routed to the expert;
- pruned: sum_t |y_t' - y_t|^2, y_t' being routed again without it: the next expert in line enters and the
  weights are renormalised as the architecture does.

Of dense groups it is the squared error of their own outputs, sum_t |(W_k - W) x_t|^2 over their matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from moe_rco.baselines.dense_errors import DenseErrors
from moe_rco.calib.data import TokenPool
from moe_rco.calib.dispatch import by_expert
from moe_rco.calib.moe import LayerState
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.search import knapsack
from moe_rco.types import Assignment, Budget, CostTable, Progress

Scale = Literal["absolute", "block", "stream"]
PROXY_STRIDE = 4
"""Output errors are sums of squares with no noise of draws in them: a part of the calibration text will do."""
SCALES: tuple[Scale, ...] = ("absolute", "block", "stream")


@dataclass(frozen=True)
class OutputErrors:
    """Squared errors of the block's output summed over tokens, float64 [N, K], and what to relate them to.

    `block` and `stream`, float64 [N], are the summed squares of the layer's routed output (of a dense group: its own) and of
    the residual stream it is added to.
    """

    errors: np.ndarray
    block: np.ndarray
    stream: np.ndarray

    def losses(self, scale: Scale) -> np.ndarray:
        """float64 [N, K]: errors as they are, or relative to a layer's routed output or its residual stream.

        Layers differ in the size of what they write, and the stream grows with depth and is normalised before
        every block and the head, so an absolute error means less in a later layer. Which scale serves best is
        a matter of the model; a comparison should try all three.
        """
        if scale == "absolute":
            return self.errors
        return self.errors / (self.block if scale == "block" else self.stream)[:, None]


def proxy(table: CostTable, budget: Budget, errors: OutputErrors, scale: Scale = "block") -> Assignment:
    """The assignment with the least sum of errors within budget and floors, exactly. Raises BudgetError."""
    return knapsack(errors.losses(scale), table, budget)


@torch.no_grad()
def output_errors(model: AssignedModel, pool: TokenPool, progress: Progress) -> OutputErrors:
    """Measure every option of every expert on a pool. Raises StoreError where one is not quantised yet."""
    table, runner = model.table, model.runner
    states, (groups, options) = model.states([None]), table.costs.shape
    with progress.stage("measure output errors", len(pool)) as advance:

        def sums(ids: torch.Tensor) -> np.ndarray:
            layers = {layer: _Layer(state) for layer, state in states.items()}

            def experts(layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                return layers[layer].observe(x, logits)

            ids = ids.to(runner.device)
            h, context = runner.embed(ids)
            found = np.zeros((groups, options + 2))
            dense = DenseErrors(model, found, len(ids))
            dense.embeddings(ids, h)
            for index, layer in model.walk(states, model.dense([None], len(ids)), every=True):
                with dense.within(index, layer):
                    h = runner.step(index, layer, h, context, experts)
                dense.measure(index, layer, h)
                if index in layers:
                    rows, of = table.rows(index), layers[index]
                    found[rows, :options] = of.errors[:, :options].cpu().numpy()
                    found[rows, options:] = of.block, float(h.double().square().sum())
            dense.head(h)
            advance(min(len(pool), len(ids) * model.team.size))
            return found

        batches = [ids for _, ids in pool.batches(model.batch(pool.ids.shape[1]))]
        total = np.sum(model.team.map(sums, batches), axis=0)
    return OutputErrors(total[:, :options].copy(), total[:, options].copy(), total[:, options + 1].copy())


class _Layer:
    """Sums of one layer's errors over the tokens seen."""

    def __init__(self, state: LayerState) -> None:
        self._state = state
        shape = (state.bank.num_experts, state.bank.original + 1)
        self.errors = torch.zeros(shape, dtype=torch.float64, device=state.bank.device)
        self.block = 0.0

    def observe(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the original experts on x [T, H], adding what every option of every one would change."""
        state, k = self._state, self._state.top_k
        experts = state.bank.num_experts
        probabilities = torch.softmax(logits.float(), dim=-1)
        # One expert more than the model uses: it enters where one of the others is pruned.
        mass, ids = torch.topk(probabilities, min(k + 1, experts), dim=-1)
        total = mass[:, :k].sum(-1, keepdim=True) if state.renormalise else torch.ones_like(mass[:, :1])
        outputs = x.new_zeros((len(x), ids.shape[1], x.shape[1]))
        for expert, (token, slot) in enumerate(by_expert(ids, experts)):
            if not len(token):
                continue
            outputs[token, slot] = state.expert(x[token], expert, state.bank.original)
            routed = slot < k
            token, slot = token[routed], slot[routed]
            weight = mass[token, slot] / total[token, 0]
            for option in state.bank.quantities:
                change = state.expert(x[token], expert, option) - outputs[token, slot]
                squared = change.float().square().sum(-1) * weight.square()
                self.errors[expert, option] += squared.double().sum()
        y = ((mass[:, :k] / total)[..., None] * outputs[:, :k]).sum(1)
        self.block += float(y.double().square().sum())
        if state.bank.prune_index is not None:
            self._prune(probabilities, mass, ids, outputs, y)
        return y.to(x.dtype)

    def _prune(
        self,
        probabilities: torch.Tensor,
        mass: torch.Tensor,
        ids: torch.Tensor,
        outputs: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """Add the errors of pruning each expert: probabilities [T, E], y [T, H]; and of every token's best
        experts mass and ids [T, k + 1] and outputs [T, k + 1, H].
        """
        state, k = self._state, self._state.top_k
        errors = self.errors[:, state.bank.prune_index or 0]
        # Without the model's own normalisation: sums of all k + 1 terms, from which one at a time is taken.
        terms = mass[..., None] * outputs
        everything = terms.sum(1)
        for slot in range(k):
            rest = mass.sum(-1) - mass[:, slot] if state.renormalise else 1 - mass[:, slot]
            after = (everything - terms[:, slot]) / rest.clamp_min(1e-30)[:, None]
            errors.index_add_(0, ids[:, slot], (after - y).double().square().sum(-1))
        if not state.renormalise:
            # The softmax loses a term, so the weights of tokens not routed to the expert grow as well.
            odds = (probabilities / (1 - probabilities).clamp_min(1e-30)).scatter(1, ids[:, :k], 0.0)
            errors += (odds.double().square() * y.double().square().sum(-1, keepdim=True)).sum(0)
