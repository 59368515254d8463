"""What moving one group to another option would do to the loss, measured in output space.

For group e, option k and token t the effect is g_t . (y_t after the move - y_t), where y_t is the MoE block's output and g_t the
gradient of the loss there. Summed over tokens it is the first-order change of the loss. Half its mean square, with g_t the
gradient of -log p(y) for y drawn from the model's own distribution, is the move's own contribution to the KL in the
Gauss-Newton approximation: the Fisher seed (`fisher.py`). A move that removes or returns an expert is routed again, exactly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_rco.calib.dispatch import by_expert

if TYPE_CHECKING:
    from moe_rco.calib.moe import LayerState


@dataclass
class EffectSums:
    """Sums over tokens of the effects of one layer's moves, float64 [E, K] each; `tokens` were looked at.

    Only moves to the options in `measured` are, to all where it is None.
    """

    linear: torch.Tensor
    squared: torch.Tensor
    measured: Collection[int] | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, experts: int, options: int, measured: Collection[int] | None = None) -> EffectSums:
        shape = (experts, options)
        return cls(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), measured)

    def measures(self, option: int) -> bool:
        return self.measured is None or option in self.measured

    def add(self, expert: int, option: int, effect: torch.Tensor) -> None:
        """Add the effects [n] of one move at the tokens it touches."""
        effect = effect.double()
        self.linear[expert, option] += effect.sum().cpu()
        self.squared[expert, option] += effect.square().sum().cpu()

    def add_many(self, experts: torch.Tensor, option: int, effect: torch.Tensor) -> None:
        """Add effects [n] of moving `experts` [n] to one option."""
        effect, experts = effect.double().cpu(), experts.cpu()
        self.linear[:, option].index_add_(0, experts, effect)
        self.squared[:, option].index_add_(0, experts, effect.square())


@dataclass(frozen=True)
class Tokens:
    """What the backward pass of a layer knows of some tokens.

    x, g [T, H]; routing ids [T, k] of the chosen experts; score [T, k] = g . f for their outputs f; logits [T, E].
    """

    x: torch.Tensor
    g: torch.Tensor
    ids: torch.Tensor
    score: torch.Tensor
    logits: torch.Tensor

    def every(self, stride: int) -> Tokens:
        parts = (self.x, self.g, self.ids, self.score, self.logits)
        return Tokens(*(part[::stride] for part in parts)) if stride > 1 else self


@dataclass(frozen=True)
class _Routing:
    """Probabilities of one layer's tokens among the kept experts, and what the block's output contributes to the loss.

    `mass` [T, k] are the chosen experts' probabilities, `total` [T] and `dot` [T] their sum and their sum times score.
    """

    probabilities: torch.Tensor
    mass: torch.Tensor
    total: torch.Tensor
    dot: torch.Tensor
    now: torch.Tensor


def observe(state: LayerState, sums: EffectSums, tokens: Tokens) -> None:
    """Add the effects of every single move in a layer under an assignment to `sums`."""
    sums.tokens += len(tokens.x)
    masked = tokens.logits.float().masked_fill(~state.kept, float("-inf"))
    probabilities = torch.softmax(masked, dim=-1)
    mass = probabilities.gather(1, tokens.ids)
    total, dot = mass.sum(-1), (mass * tokens.score).sum(-1)
    routing = _Routing(probabilities, mass, total, dot, dot / total if state.renormalise else dot)
    _requantise(state, sums, tokens, mass / total[:, None] if state.renormalise else mass)
    prune = state.bank.prune_index
    if prune is not None and sums.measures(prune):
        _remove(state, sums, tokens, routing, prune)
    if not bool(state.kept.all()):
        _return(state, sums, tokens, masked, routing)


def _requantise(state: LayerState, sums: EffectSums, tokens: Tokens, weights: torch.Tensor) -> None:
    for expert, (token, slot) in enumerate(by_expert(tokens.ids, len(state.choice))):
        if not len(token):
            continue
        x, g = tokens.x[token], tokens.g[token]
        for option in filter(sums.measures, state.bank.quantities):
            if option != state.choice[expert]:
                moved = (g * state.expert(x, expert, option)).sum(-1)
                sums.add(expert, option, weights[token, slot] * (moved - tokens.score[token, slot]))


def _remove(state: LayerState, sums: EffectSums, tokens: Tokens, routing: _Routing, prune: int) -> None:
    """A kept expert leaves: the next one in line enters and the softmax is taken over the rest."""
    k = tokens.ids.shape[1]
    mass, score = routing.mass, tokens.score
    total, dot = routing.total[:, None] - mass, routing.dot[:, None] - mass * score
    if int(state.kept.sum()) > k:
        next_mass, next_id = (part[:, -1] for part in torch.topk(routing.probabilities, k + 1, dim=-1))
        next_score = _scores(state, tokens, next_id)
        total, dot = total + next_mass[:, None], dot + (next_mass * next_score)[:, None]
    after = dot / total.clamp_min(1e-30) if state.renormalise else dot / (1 - mass).clamp_min(1e-30)
    effect = after - routing.now[:, None]
    sums.add_many(tokens.ids.reshape(-1), prune, effect.reshape(-1))
    if not state.renormalise:  # every other token's weights grow as well, because the softmax loses a term
        odds = routing.probabilities / (1 - routing.probabilities).clamp_min(1e-30)
        elsewhere = (routing.now[:, None] * odds).scatter(1, tokens.ids, 0.0).double().cpu()
        sums.linear[:, prune] += elsewhere.sum(0)
        sums.squared[:, prune] += elsewhere.square().sum(0)


def _return(
    state: LayerState, sums: EffectSums, tokens: Tokens, masked: torch.Tensor, routing: _Routing
) -> None:
    """A pruned expert comes back: where it beats the last chosen one it takes its place.

    Its own quantisation error is left out here (the curvature term has it), so all of its options share one effect.
    """
    ratio = (tokens.logits.float() - torch.logsumexp(masked, -1, keepdim=True)).exp()
    for expert in (~state.kept).nonzero().flatten().tolist():
        r = ratio[:, expert]
        enters = (r > routing.mass[:, -1]).nonzero().flatten()
        effect = torch.zeros_like(routing.now) if state.renormalise else -routing.now * r / (1 + r)
        if len(enters):
            last, came = routing.mass[enters, -1], r[enters]
            output = state.expert(tokens.x[enters], expert, state.bank.original)
            score = (tokens.g[enters] * output).sum(-1)
            total = routing.total[enters] - last + came
            dot = routing.dot[enters] - last * tokens.score[enters, -1] + came * score
            effect[enters] = dot / (total if state.renormalise else 1 + came) - routing.now[enters]
        for option in filter(sums.measures, state.bank.quantities):
            sums.add(expert, option, effect)


def _scores(state: LayerState, tokens: Tokens, experts: torch.Tensor) -> torch.Tensor:
    """g . f [T] of one expert per token, with the weights it has now."""
    scores = torch.zeros_like(tokens.score[:, 0])
    for expert, (token, _) in enumerate(by_expert(experts[:, None], len(state.choice))):
        if len(token):
            output = state.expert(tokens.x[token], expert, state.choice[expert])
            scores[token] = (tokens.g[token] * output).sum(-1)
    return scores
