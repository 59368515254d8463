"""First-order estimates of what a move does to the loss, other than the one that is used; and the published forward pass.

They take the place of `moe_rco.calib.effects.observe`, for `eval.estimators`. f_e is expert e's output at a token, y the
MoE block's, g the gradient of the loss there, w_e the routing weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal
from unittest.mock import patch

import torch
from torch.nn import functional as F

from moe_rco.adapters import route
from moe_rco.calib.dispatch import by_expert
from moe_rco.calib.effects import EffectSums, Tokens, observe
from moe_rco.calib.moe import LayerState

Pruning = Literal["routed again", "inside", "union", "scaled"]
"""What pruning or returning expert e is taken to do to y, at the tokens it is or would be chosen for.

routed again: exactly what it does, the next expert in line included (this is used)
inside: derivative of the renormalised mixture by e's mask, w_e (f_e - y)
union: w_e f_e; for a pruned expert with its weight among all experts, where it is in the top-k of all
scaled: the published one. Experts are routed as if none was pruned and the pruned ones' outputs scaled by 0; w_e f_e
"""
Width = Literal["output", "weight", "weight, prune too"]
"""The change of an expert's output, or the weight-space product <dL/dW, W_k - W_now>; with W_k = 0 to prune it as well."""

Observer = Callable[[LayerState, EffectSums, Tokens], None]
_forward = LayerState.forward


@dataclass(frozen=True)
class _Scaled(LayerState):
    """All experts at work; `present` bool [E] has those whose output counts."""

    present: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def _forward_scaled(state: LayerState, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if state.observe is None:
        return _forward(state, x, logits)  # judged as deployed
    whole = tuple(state.bank.original if o == state.bank.prune_index else o for o in state.choices[0])
    parts = {name: getattr(state, name) for name in ("bank", "top_k", "renormalise", "observe", "stride")}
    scaled = _Scaled(choices=(whole,), present=state.kept[0], **parts)
    with patch("moe_rco.calib.moe.route", _scaled_routing(state.kept[0])):
        return _forward(scaled, x, logits)


def _scaled_routing(present: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def routed(logits: torch.Tensor, top_k: int, renormalise: bool, _: torch.Tensor):
        weights, ids = route(logits, top_k, renormalise)
        return weights * present[ids], ids

    return routed


@contextmanager
def estimator(pruning: Pruning, width: Width) -> Iterator[None]:
    """Estimate so while this is open."""
    with ExitStack() as stack:
        if pruning == "scaled":
            stack.enter_context(patch.object(LayerState, "forward", _forward_scaled))
        if (pruning, width) != ("routed again", "output"):
            stack.enter_context(patch("moe_rco.calib.moe.observe", _observer(pruning, width)))
        yield


def _observer(pruning: Pruning, width: Width) -> Observer:
    def observed(state: LayerState, sums: EffectSums, tokens: Tokens) -> None:
        exact = EffectSums.zeros(len(state.choices[0]), state.bank.original)
        observe(state, exact, tokens)
        linear, present = exact.linear[0], getattr(state, "present", state.kept[0])
        if pruning != "routed again":
            out, back = _PRUNING[pruning](state, tokens)
            if state.bank.prune_index is not None:
                linear[:, state.bank.prune_index] = -out
            for option in state.bank.quantities:
                linear[~present, option] = back[~present]
        if width != "output":
            products, prune = _weight_products(state, tokens), state.bank.prune_index
            if width == "weight" and prune is not None:
                products[:, prune] = linear[:, prune]
            linear[present] = products[present]
        sums.tokens += exact.tokens
        sums.linear += linear
        sums.squared += exact.squared

    return observed


def _summed(ids: torch.Tensor, values: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(experts, dtype=torch.float64).index_add_(
        0, ids.reshape(-1), values.double().reshape(-1)
    )


def _score(state: LayerState, tokens: Tokens, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """g . f_e with the expert's original weights."""
    return (tokens.g[rows] * state.expert(tokens.x[rows], expert, state.bank.original)).sum(-1)


def _inside(state: LayerState, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    experts, logits = len(state.choices[0]), tokens.logits.float()
    masked = logits.masked_fill(~state.kept[0], float("-inf"))
    p = torch.softmax(masked, -1)
    mass = p.gather(1, tokens.ids)
    total = mass.sum(-1, keepdim=True) if state.renormalise else torch.ones_like(mass[:, :1])
    now = (mass / total * tokens.score).sum(-1, keepdim=True)
    out = _summed(tokens.ids, mass / total * (tokens.score - now), experts)
    if not state.renormalise:  # the softmax loses a term where the expert was not chosen as well
        out -= (p * now).scatter(1, tokens.ids, 0.0).double().sum(0)
    back = torch.zeros(experts, dtype=torch.float64)
    ratio = (logits - torch.logsumexp(masked, -1, keepdim=True)).exp()
    for expert in (~state.kept[0]).nonzero().flatten().tolist():
        r = ratio[:, expert]
        rows = (r > mass[:, -1]).nonzero().flatten()
        came = r[rows] / total[rows, 0] * _score(state, tokens, expert, rows)
        gone = (r / total[:, 0] * now[:, 0])[rows if state.renormalise else slice(None)]
        back[expert] = came.double().sum() - gone.double().sum()
    return out, back


def _union(state: LayerState, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    weights, _ = route(tokens.logits, state.top_k, state.renormalise, state.kept[0])
    out = _summed(tokens.ids, weights * tokens.score, len(state.choices[0]))
    weights, ids = route(tokens.logits, state.top_k, state.renormalise)
    back = torch.zeros_like(out)
    for expert, (rows, slot) in enumerate(by_expert(ids, len(state.choices[0]))):
        if len(rows) and not state.kept[0, expert]:
            back[expert] = (weights[rows, slot] * _score(state, tokens, expert, rows)).double().sum()
    return out, back


def _scaled(state: LayerState, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    weights, _ = route(tokens.logits, state.top_k, state.renormalise)
    every = _summed(tokens.ids, weights * tokens.score, len(state.choices[0]))
    return every, every


_PRUNING = {"inside": _inside, "union": _union, "scaled": _scaled}


def _weight_products(state: LayerState, tokens: Tokens) -> torch.Tensor:
    """<dL/dW, W_k - W_now> of every kept expert and option [E, K]."""
    bank, prune = state.bank, state.bank.prune_index
    weights, _ = route(tokens.logits, state.top_k, state.renormalise, state.kept[0])
    products = torch.zeros(len(state.choices[0]), bank.original, dtype=torch.float64)
    for expert, (rows, slot) in enumerate(by_expert(tokens.ids, len(state.choices[0]))):
        if not len(rows):
            continue
        x, g = tokens.x[rows], tokens.g[rows] * weights[rows, slot, None]
        gate_up, down = bank.weights(expert, state.choices[0][expert])
        with torch.enable_grad():
            before = F.linear(x, gate_up).requires_grad_()
            hidden = bank.gated(before)
        (grad,) = torch.autograd.grad(hidden, before, g @ down)
        inside, outside = grad.T @ x, g.T @ hidden.detach()
        for option in [*bank.quantities, *([] if prune is None else [prune])]:
            if option == state.choices[0][expert]:
                continue
            there = (0.0, 0.0) if option == prune else bank.weights(expert, option)
            moved = (inside * (there[0] - gate_up)).sum() + (outside * (there[1] - down)).sum()
            products[expert, option] = float(moved)
    return products
