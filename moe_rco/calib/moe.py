"""The routed experts of one layer under an assignment, forward and backward.

Forward is the deployed model exactly: pruned experts are masked before top-k, the others use the weights of their option.
Backward gives the gradient of the input and, on request, measures every single move (see `effects.py`) with what it has at
hand. Weight gradients are never formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from moe_rco.adapters import route
from moe_rco.calib.bank import LayerBank
from moe_rco.calib.dispatch import by_expert
from moe_rco.calib.effects import EffectSums, Tokens, observe


@dataclass(frozen=True)
class Routed:
    """One expert at work on the tokens routed to it; `token` and `slot` int64 [n] say which and in which column of the ids.

    before [n, 2I] is gate and up, hidden [n, I] what goes into the down projection, output [n, H] what comes out of it.
    """

    expert: int
    token: torch.Tensor
    slot: torch.Tensor
    before: torch.Tensor
    hidden: torch.Tensor
    output: torch.Tensor


def run_experts(
    bank: LayerBank, choice: Sequence[int], x: torch.Tensor, ids: torch.Tensor
) -> Iterator[Routed]:
    """Every expert that x [T, H] is routed to by ids [T, k], in order, before the routing weights."""
    for expert, (token, slot) in enumerate(by_expert(ids, len(choice))):
        if len(token):
            gate_up, down = bank.weights(expert, choice[expert])
            before = F.linear(x[token], gate_up)
            hidden = bank.gated(before)
            yield Routed(expert, token, slot, before, hidden, F.linear(hidden, down))


@dataclass(frozen=True)
class LayerState:
    """One layer under an assignment: `choice` [E] has an index into the bank's options (or `bank.original`) per expert.

    With `observe` set, the backward pass adds the effects of every move, measured on every `stride`-th token.
    """

    bank: LayerBank
    choice: tuple[int, ...]
    top_k: int
    renormalise: bool
    observe: EffectSums | None = None
    stride: int = 1

    @cached_property
    def kept(self) -> torch.Tensor:
        """bool [E]"""
        prune = self.bank.prune_index
        return torch.tensor([option != prune for option in self.choice], device=self.bank.device)

    def expert(self, x: torch.Tensor, expert: int, option: int) -> torch.Tensor:
        """Output [n, H] of one expert with the weights of an option, before the routing weight."""
        gate_up, down = self.bank.weights(expert, option)
        return F.linear(self.bank.gated(F.linear(x, gate_up)), down)

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x [T, H] and router logits [T, E] to the routed experts' output [T, H]; differentiable in both."""
        weights, ids = route(logits, self.top_k, self.renormalise, self.kept)
        return _Routed.apply(x, weights.to(x.dtype), ids, logits.detach(), self)  # pyright: ignore[reportReturnType]


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        logits: torch.Tensor,
        state: LayerState,
    ) -> torch.Tensor:
        y, saved = torch.zeros_like(x), []
        for at in run_experts(state.bank, state.choice, x, ids):
            y.index_add_(0, at.token, at.output * weights[at.token, at.slot, None])
            saved.append((at.expert, at.token, at.slot, at.before, at.output))
        ctx.state, ctx.saved = state, saved
        ctx.save_for_backward(x, weights, ids, logits)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        state: LayerState = ctx.state
        x, weights, ids, logits = ctx.saved_tensors
        g = grads[0]
        grad_x, score = torch.zeros_like(x), torch.zeros_like(weights)
        for expert, token, slot, before, output in ctx.saved:
            gate_up, down = state.bank.weights(expert, state.choice[expert])
            here = g[token]
            score[token, slot] = (here * output).sum(-1)
            with torch.enable_grad():
                leaf = before.detach().requires_grad_()
                hidden = state.bank.gated(leaf)
            (grad_before,) = torch.autograd.grad(hidden, leaf, (here * weights[token, slot, None]) @ down)
            grad_x.index_add_(0, token, grad_before @ gate_up)
        if state.observe is not None:
            observe(state, state.observe, Tokens(x, g, ids, score, logits).every(state.stride))
        return grad_x, score, None, None, None
