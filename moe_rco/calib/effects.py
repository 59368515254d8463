"""What moving one group to another option would do to the loss, measured in output space.

For group e, option k and token t the effect is g_t . (y_t after the move - y_t), where y_t is the MoE block's output and g_t the
gradient of the loss there. Summed over tokens it is the first-order change of the loss. Half its mean square, with g_t the
gradient of -log p(y) for y drawn from the model's own distribution, is the move's own contribution to the KL in the
Gauss-Newton approximation: the Fisher seed (`fisher.py`). A move that removes or returns an expert is routed again, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from moe_rco.calib.dispatch import by_expert

if TYPE_CHECKING:
    from moe_rco.calib.moe import LayerState


Measured = Collection[int] | None
"""The options to which moves are looked at; None for all."""


@dataclass
class EffectSums:
    """Sums over tokens of the effects of one layer's moves, float64 [S, E, K] for S samples; `tokens` of each were looked at.

    Only moves to the options in a sample's `measured` [S] are.
    """

    linear: torch.Tensor
    squared: torch.Tensor
    measured: Sequence[Measured]
    tokens: int = 0

    @classmethod
    def zeros(cls, experts: int, options: int, measured: Sequence[Measured] = (None,)) -> EffectSums:
        shape = (len(measured), experts, options)
        return cls(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), measured)

    def samples(self, option: int) -> list[int]:
        """Samples in which moves to an option are measured."""
        return [s for s, measured in enumerate(self.measured) if measured is None or option in measured]

    def add(
        self, expert: int | torch.Tensor, option: int, effect: torch.Tensor, sample: torch.Tensor
    ) -> None:
        """Add the effects [n] of moving an expert, or experts [n], to one option at tokens of `sample` [n]."""
        effect, sample = effect.double().cpu(), sample.cpu()
        place = sample * self.linear.shape[1] + (expert.cpu() if isinstance(expert, torch.Tensor) else expert)
        for sums, values in ((self.linear, effect), (self.squared, effect.square())):
            column = torch.zeros(sums.shape[0] * sums.shape[1], dtype=torch.float64)
            sums[:, :, option] += column.index_add_(0, place, values).view(sums.shape[:2])


@dataclass(frozen=True)
class Tokens:
    """What the backward pass of a layer knows of some tokens, in equal parts one sample after the other.

    x, g [T, H]; routing ids [T, k] of the chosen experts; score [T, k] = g . f for their outputs f; logits [T, E].
    """

    x: torch.Tensor
    g: torch.Tensor
    ids: torch.Tensor
    score: torch.Tensor
    logits: torch.Tensor

    def every(self, stride: int, samples: int) -> Tokens:
        """Every `stride`-th token of each sample."""
        if stride == 1:
            return self
        parts = (self.x, self.g, self.ids, self.score, self.logits)
        return Tokens(*(p.unflatten(0, (samples, -1))[:, ::stride].flatten(0, 1) for p in parts))


@dataclass(frozen=True)
class _Routing:
    """Probabilities of one layer's tokens among the kept experts, and what the block's output contributes to the loss.

    `sample` [T] is the sample of each token, `log_total` [T] the logarithm of what the probabilities were divided by. `mass`
    [T, k] are the chosen experts' probabilities, `total` [T] and `dot` [T] their sum and their sum times score.
    """

    sample: torch.Tensor
    log_total: torch.Tensor
    probabilities: torch.Tensor
    mass: torch.Tensor
    total: torch.Tensor
    dot: torch.Tensor
    now: torch.Tensor


def observe(state: LayerState, sums: EffectSums, tokens: Tokens) -> None:
    """Add the effects of every single move in a layer under its assignments to `sums`."""
    count, samples = len(tokens.x), len(state.choices)
    sums.tokens += count // samples
    sample = state.sample(torch.arange(count, device=tokens.x.device), count)
    masked = tokens.logits.float().masked_fill(~state.kept_at(count), float("-inf"))
    probabilities = torch.softmax(masked, dim=-1)
    mass = probabilities.gather(1, tokens.ids)
    total, dot = mass.sum(-1), (mass * tokens.score).sum(-1)
    now = dot / total if state.renormalise else dot
    routing = _Routing(sample, torch.logsumexp(masked, -1), probabilities, mass, total, dot, now)
    _requantise(state, sums, tokens, routing)
    prune = state.bank.prune_index
    if prune is not None and (measuring := sums.samples(prune)):
        rows = _in(sample, measuring, samples)
        _remove(state, sums, Tokens(*_rows(tokens, rows)), _Routing(*_rows(routing, rows)), prune)
    if not bool(state.kept.all()):
        _return(state, sums, tokens, routing)


def _in(sample: torch.Tensor, wanted: list[int], samples: int) -> Any:
    """Index of the tokens that are of the wanted ones of all samples."""
    if len(wanted) == samples:
        return slice(None)
    return torch.isin(sample, torch.tensor(wanted, device=sample.device)).nonzero().flatten()


def _rows(parts: Tokens | _Routing, rows: Any) -> Iterator[torch.Tensor]:
    return (getattr(parts, field.name)[rows] for field in fields(parts))


def _requantise(state: LayerState, sums: EffectSums, tokens: Tokens, routing: _Routing) -> None:
    weights = routing.mass / routing.total[:, None] if state.renormalise else routing.mass
    for expert, (token, slot) in enumerate(by_expert(tokens.ids, len(state.choices[0]))):
        if not len(token):
            continue
        sample = routing.sample[token]
        for option in state.bank.quantities:
            moving = [s for s in sums.samples(option) if state.choices[s][expert] != option]
            if not moving:
                continue
            part = _in(sample, moving, len(state.choices))
            at, column = token[part], slot[part]
            if len(at):
                moved = (tokens.g[at] * state.expert(tokens.x[at], expert, option)).sum(-1)
                effect = weights[at, column] * (moved - tokens.score[at, column])
                sums.add(expert, option, effect, sample[part])


def _remove(state: LayerState, sums: EffectSums, tokens: Tokens, routing: _Routing, prune: int) -> None:
    """A kept expert leaves: the next one in line enters and the softmax is taken over the rest."""
    k = tokens.ids.shape[1]
    mass, score = routing.mass, tokens.score
    total, dot = routing.total[:, None] - mass, routing.dot[:, None] - mass * score
    if routing.probabilities.shape[1] > k:
        next_mass, next_id = (part[:, -1:] for part in torch.topk(routing.probabilities, k + 1, dim=-1))
        # Where no more than k are kept, what comes next is a pruned one, with a mass of zero.
        next_score = _scores(state, tokens, next_id, routing.sample, next_mass[:, 0] > 0)
        total, dot = total + next_mass, dot + next_mass * next_score[:, None]
    after = dot / total.clamp_min(1e-30) if state.renormalise else dot / (1 - mass).clamp_min(1e-30)
    effect = after - routing.now[:, None]
    sums.add(tokens.ids.reshape(-1), prune, effect.reshape(-1), routing.sample.repeat_interleave(k))
    if not state.renormalise:  # every other token's weights grow as well, because the softmax loses a term
        odds = routing.probabilities / (1 - routing.probabilities).clamp_min(1e-30)
        elsewhere = (routing.now[:, None] * odds).scatter(1, tokens.ids, 0.0).double().cpu()
        sample = routing.sample.cpu()
        sums.linear[:, :, prune].index_add_(0, sample, elsewhere)
        sums.squared[:, :, prune].index_add_(0, sample, elsewhere.square())


def _return(state: LayerState, sums: EffectSums, tokens: Tokens, routing: _Routing) -> None:
    """A pruned expert comes back: where it beats the last chosen one it takes its place.

    Its own quantisation error is left out here (the curvature term has it), so all of its options share one effect.
    """
    for expert in (~state.kept).any(0).nonzero().flatten().tolist():
        rows = (~state.kept[routing.sample, expert]).nonzero().flatten()
        r = (tokens.logits[rows, expert].float() - routing.log_total[rows]).exp()
        now = routing.now[rows]
        enters = (r > routing.mass[rows, -1]).nonzero().flatten()
        effect = torch.zeros_like(now) if state.renormalise else -now * r / (1 + r)
        if len(enters):
            at = rows[enters]
            last, came = routing.mass[at, -1], r[enters]
            output = state.expert(tokens.x[at], expert, state.bank.original)
            score = (tokens.g[at] * output).sum(-1)
            total = routing.total[at] - last + came
            dot = routing.dot[at] - last * tokens.score[at, -1] + came * score
            effect[enters] = dot / (total if state.renormalise else 1 + came) - now[enters]
        sample = routing.sample[rows]
        for option in state.bank.quantities:
            part = _in(sample, sums.samples(option), len(state.choices))
            sums.add(expert, option, effect[part], sample[part])


def _scores(
    state: LayerState, tokens: Tokens, ids: torch.Tensor, sample: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """g . f [T] of one expert of ids [T, 1] per token, with the weights it has now in the token's sample; 0 if not wanted."""
    scores = torch.zeros_like(tokens.score[:, 0])
    for expert, (token, _) in enumerate(by_expert(ids, len(state.choices[0]))):
        token = token[wanted[token]]
        seen = state.options[:, expert][sample[token]]
        for option in seen.unique().tolist():
            at = token[seen == option]
            scores[at] = (tokens.g[at] * state.expert(tokens.x[at], expert, option)).sum(-1)
    return scores
