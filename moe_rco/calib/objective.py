"""The loss of the model under an assignment, and the effect of every single move, on calibration sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from moe_rco.adapters import Adapter, Config
from moe_rco.calib.bank import LayerBank, OptionBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.effects import EffectSums
from moe_rco.calib.moe import LayerState
from moe_rco.calib.reference import Reference, divergence
from moe_rco.calib.runner import Experts, Runner
from moe_rco.ckpt.store import Store
from moe_rco.types import Assignment, CostTable

HeadLoss = Callable[[int, torch.Tensor], torch.Tensor]
"""(row of the batch, its logits [S, V]) to the loss summed over its positions."""


@dataclass(frozen=True)
class Effects:
    """Effects of all moves, float64 [N, K], per token: `linear` their mean, `squared` their mean square."""

    linear: np.ndarray
    squared: np.ndarray


class AssignedModel:
    """A model whose experts follow an assignment; everything the search asks of the model goes through here."""

    def __init__(
        self, runner: Runner, adapter: Adapter, config: Config, bank: OptionBank, store: Store | None = None
    ) -> None:
        self.runner, self.bank, self.store = runner, bank, store
        self.table: CostTable = bank.table
        self.top_k, self.renormalise = adapter.top_k(config), adapter.renormalise(config)

    def layer_bank(self, layer: int) -> LayerBank:
        return self.bank.original(layer) if self.store is None else self.bank.layer(layer, self.store)

    def states(
        self,
        choice: np.ndarray | None,
        observe: bool = False,
        stride: int = 1,
        measured: Collection[int] | None = None,
    ) -> dict[int, LayerState]:
        """The MoE layers under `choice` [N], or with their original weights."""
        states = {}
        for layer in self.table.layers:
            bank, rows = self.layer_bank(layer), self.table.rows(layer)
            options = (
                [bank.original] * len(rows) if choice is None else [int(option) for option in choice[rows]]
            )
            sums = EffectSums.zeros(len(rows), len(self.table.options), measured) if observe else None
            states[layer] = LayerState(bank, tuple(options), self.top_k, self.renormalise, sums, stride)
        return states

    def experts(self, choice: np.ndarray | None) -> Experts:
        return route_through(self.states(choice))

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, choice: np.ndarray | None = None) -> torch.Tensor:
        """Last hidden states [B, S, H] of ids [B, S]."""
        return self.runner.run(ids.to(self.runner.device), self.experts(choice))

    @torch.no_grad()
    def divergences(
        self, assignment: Assignment, pool: TokenPool, reference: Reference, batch: int = 8
    ) -> np.ndarray:
        """Mean KL to the reference of each sequence of a pool, float64 [N]."""
        rows = []
        for part, ids in pool.batches(batch):
            target = reference.of(part, self.runner.device)
            for row, states in enumerate(self.hidden(ids, assignment.choice)):
                rows.append(float(divergence(target.row(row), self.runner.logits(states)).double().mean()))
        return np.array(rows)

    def effects(
        self,
        choice: np.ndarray | None,
        ids: torch.Tensor,
        loss: HeadLoss,
        stride: int = 1,
        measured: Collection[int] | None = None,
    ) -> tuple[float, Effects]:
        """Loss summed over ids [B, S] and the effect of every move, from one forward and one backward pass.

        Only moves to the options in `measured` are looked at, to all where it is None; the others' effects are 0.
        """
        states = self.states(choice, observe=True, stride=stride, measured=measured)
        h, context = self.runner.embed(ids.to(self.runner.device))
        h.requires_grad_()
        last = h
        experts = route_through(states)
        for index, layer in self.runner.layers():
            last = self.runner.step(index, layer, last, context, experts)
        total, gradient = self._head(last.detach(), loss)
        torch.autograd.backward(last, gradient)
        linear = np.zeros((len(self.table.groups), len(self.table.options)))
        squared = np.zeros_like(linear)
        for layer, state in states.items():
            sums, rows = state.observe, self.table.rows(layer)
            if sums is not None:
                linear[rows] = sums.linear.numpy() / sums.tokens
                squared[rows] = sums.squared.numpy() / sums.tokens
        return total, Effects(linear, squared)

    def _head(self, h: torch.Tensor, loss: HeadLoss) -> tuple[float, torch.Tensor]:
        """Loss and its gradient at the last hidden states, a sequence at a time: logits of a batch may not fit."""
        gradient, total = torch.empty_like(h), 0.0
        for row in range(len(h)):
            leaf = h[row].requires_grad_()
            value = loss(row, self.runner.logits(leaf))
            (gradient[row],) = torch.autograd.grad(value, leaf)
            total += float(value.detach())
        return total, gradient


def route_through(states: dict[int, LayerState]) -> Experts:
    def experts(layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return states[layer].forward(x, logits)

    return experts
