"""The routed experts of one layer under one or several assignments, forward and backward.

Forward is the deployed model exactly: pruned experts are masked before top-k, the others use the weights of their option.
Backward gives the gradient of the input and, on request, measures every single move (see `effects.py`) with what it has at
hand. Weight gradients are never formed. Experts are taken one after the other, each once for all assignments: at most one
expert's weights have to be there.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """One expert at work on tokens routed to it; `token` and `slot` int64 [n] say which and in which column of the ids.

    before [n, 2I] is gate and up, output [n, H] what comes out of the down projection.
    """

    expert: int
    option: int
    token: torch.Tensor
    slot: torch.Tensor
    before: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class LayerState:
    """One layer under the assignments of one or more samples: `choices` [S][E] has an index into the bank's options (or
    `bank.original`) per expert. The tokens [T, ...] given to `forward` are S equal parts, one after the other.

    With `observe` set, the backward pass adds the effects of every move, measured on every `stride`-th token of a sample.
    With `recompute` it also runs the experts again that it needs, so that forward need not keep what came out of them; then
    forward gives zeros where gradients are wanted: nobody needs the rest of it.
    """

    bank: LayerBank
    choices: tuple[tuple[int, ...], ...]
    top_k: int
    renormalise: bool
    observe: EffectSums | None = None
    stride: int = 1
    recompute: bool = False

    @cached_property
    def options(self) -> torch.Tensor:
        """The choices, int64 [S, E]."""
        return torch.tensor(self.choices, device=self.bank.device)

    @cached_property
    def kept(self) -> torch.Tensor:
        """bool [S, E]"""
        prune = self.bank.prune_index
        return self.options != (-1 if prune is None else prune)

    def kept_at(self, tokens: int) -> torch.Tensor:
        """Which experts each of so many tokens may be routed to, bool [T, E], or [1, E] where that is the same for all."""
        samples = len(self.choices)
        return self.kept if samples == 1 else self.kept.repeat_interleave(tokens // samples, 0)

    def sample(self, token: torch.Tensor, tokens: int) -> torch.Tensor:
        """The sample each of some tokens belongs to, out of `tokens` in all."""
        return token // (tokens // len(self.choices))

    def expert(self, x: torch.Tensor, expert: int, option: int) -> torch.Tensor:
        """Output [n, H] of one expert with the weights of an option, before the routing weight."""
        gate_up, down = self.bank.weights(expert, option)
        return F.linear(self.bank.gated(F.linear(x, gate_up)), down)

    def by_option(self, expert: int, token: torch.Tensor, tokens: int) -> Iterator[tuple[int, Any]]:
        """Options that an expert has in some sample, each with the index of those of its tokens [n] that see it so."""
        options = {choice[expert] for choice in self.choices}
        if len(options) == 1:
            yield options.pop(), slice(None)
            return
        seen = self.options[:, expert][self.sample(token, tokens)]
        for option in sorted(options):
            part = (seen == option).nonzero().flatten()
            if len(part):
                yield option, part

    def run(self, x: torch.Tensor, ids: torch.Tensor) -> Iterator[Routed]:
        """Every expert that x [T, H] is routed to by ids [T, k], in order, before the routing weights."""
        for expert, (token, slot) in enumerate(by_expert(ids, len(self.choices[0]))):
            if not len(token):
                continue
            for option, part in self.by_option(expert, token, len(x)):
                gate_up, down = self.bank.weights(expert, option)
                before = F.linear(x[token[part]], gate_up)
                output = F.linear(self.bank.gated(before), down)
                yield Routed(expert, option, token[part], slot[part], before, output)

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x [T, H] and router logits [T, E] to the routed experts' output [T, H]; differentiable in both."""
        weights, ids = route(logits, self.top_k, self.renormalise, self.kept_at(len(x)))
        keep = torch.is_grad_enabled() and x.requires_grad
        return _Routed.apply(x, weights.to(x.dtype), ids, logits.detach(), self, keep)  # pyright: ignore[reportReturnType]


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        logits: torch.Tensor,
        state: LayerState,
        keep: bool,
    ) -> torch.Tensor:
        y, saved = torch.zeros_like(x), list[Routed]()
        ctx.state, ctx.saved = state, saved
        ctx.save_for_backward(x, weights, ids, logits)
        if keep and state.recompute:
            return y
        for at in state.run(x, ids):
            y.index_add_(0, at.token, at.output * weights[at.token, at.slot, None])
            if keep:
                saved.append(at)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        state: LayerState = ctx.state
        x, weights, ids, logits = ctx.saved_tensors
        g = grads[0]
        grad_x, score = torch.zeros_like(x), torch.zeros_like(weights)
        for at in state.run(x, ids) if state.recompute else ctx.saved:
            gate_up, down = state.bank.weights(at.expert, at.option)
            here = g[at.token]
            score[at.token, at.slot] = (here * at.output).sum(-1)
            with torch.enable_grad():
                leaf = at.before.detach().requires_grad_()
                hidden = state.bank.gated(leaf)
            weighted = here * weights[at.token, at.slot, None]
            (grad_before,) = torch.autograd.grad(hidden, leaf, weighted @ down)
            grad_x.index_add_(0, at.token, grad_before @ gate_up)
        if state.observe is not None:
            observe(
                state, state.observe, Tokens(x, g, ids, score, logits).every(state.stride, len(state.choices))
            )
        return grad_x, score, None, None, None, None
