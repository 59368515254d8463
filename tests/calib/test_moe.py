"""The routed experts of a layer: against a plain implementation, and every move's effect against making the move."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from moe_rco.adapters import route
from moe_rco.calib.bank import StackedLayer
from moe_rco.calib.effects import EffectSums
from moe_rco.calib.moe import LayerState

EXPERTS, HIDDEN, INNER, TOKENS = 6, 8, 12, 40
PRUNE, LOW, HIGH, ORIGINAL = 0, 1, 2, 3


def make_bank(seed: int) -> StackedLayer:
    generator = torch.Generator().manual_seed(seed)

    def stack() -> tuple[torch.Tensor, torch.Tensor]:
        shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
        gate_up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return gate_up, down

    original = stack()
    return StackedLayer(
        torch.device("cpu"),
        F.silu,
        PRUNE,
        ORIGINAL,
        EXPERTS,
        (LOW, HIGH),
        {LOW: stack(), HIGH: original, ORIGINAL: original},
    )


def reference(state: LayerState, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Token by token, in the plainest way."""
    bank, (choice,) = state.bank, state.choices
    assert isinstance(bank, StackedLayer)
    rows = []
    for token, scores in zip(x, logits, strict=True):
        kept = [e for e, option in enumerate(choice) if option != PRUNE]
        p = torch.zeros_like(scores)
        p[kept] = torch.softmax(scores[kept].float(), 0).to(p)
        chosen = torch.topk(p, state.top_k).indices.tolist()
        total = sum(p[e] for e in chosen) if state.renormalise else 1.0
        row = torch.zeros_like(token)
        for e in chosen:
            gate_up, down = bank.stacks[choice[e]]
            gate, up = (gate_up[e] @ token).chunk(2)
            row = row + p[e] / total * (down[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    shapes = ((TOKENS, HIDDEN), (TOKENS, EXPERTS), (TOKENS, HIDDEN))
    x, logits, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, logits, g


CHOICES = [
    (ORIGINAL,) * EXPERTS,
    (HIGH, LOW, LOW, HIGH, LOW, HIGH),
    (HIGH, PRUNE, LOW, PRUNE, LOW, HIGH),
    (PRUNE, PRUNE, HIGH, PRUNE, LOW, LOW),
]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_forward_and_gradients_equal_the_plain_implementation(
    choice: tuple[int, ...], renormalise: bool
) -> None:
    state = LayerState(make_bank(0), (choice,), 2, renormalise)
    x, logits, g = problem(0)
    results = []
    for function in (state.forward, lambda x, logits: reference(state, x, logits)):
        leaves = [x.clone().requires_grad_(), logits.clone().requires_grad_()]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad((y * g).sum(), leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # routing weights are float32


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_effects_equal_making_every_move(choice: tuple[int, ...], renormalise: bool) -> None:
    bank = make_bank(1)
    sums = EffectSums.zeros(EXPERTS, 3)
    state = LayerState(bank, (choice,), 2, renormalise, sums)
    x, logits, g = problem(1)
    y = state.forward(x.clone().requires_grad_(), logits)
    y.backward(g)
    assert sums.tokens == TOKENS
    kept = sum(option != PRUNE for option in choice)
    for expert in range(EXPERTS):
        for option in (PRUNE, LOW, HIGH):
            if option == PRUNE and kept == 2 and choice[expert] != PRUNE:
                continue  # fewer than top-k would be left; no search makes this move
            moved = [*choice]
            moved[expert] = option
            if choice[expert] == PRUNE and option != PRUNE:
                moved[expert] = ORIGINAL  # a return is measured with the original weights
            after = dataclasses.replace(state, choices=(tuple(moved),), observe=None)
            effect = (g * (after.forward(x, logits) - y.detach())).sum(-1)
            assert float(sums.linear[0, expert, option]) == pytest.approx(
                float(effect.sum()), rel=1e-5, abs=1e-3
            )
            assert float(sums.squared[0, expert, option]) == pytest.approx(
                float(effect.square().sum()), rel=1e-5
            )


def test_effects_on_every_other_token_are_those_tokens_effects() -> None:
    bank, (x, logits, g) = make_bank(2), problem(2)
    totals = []
    for stride, part in ((2, slice(None)), (1, slice(None, None, 2))):
        sums = EffectSums.zeros(EXPERTS, 3)
        LayerState(bank, (CHOICES[1],), 2, True, sums, stride).forward(
            x[part].requires_grad_(), logits[part]
        ).backward(g[part])
        totals.append(sums)
    torch.testing.assert_close(totals[0].linear, totals[1].linear)
    assert totals[0].tokens == totals[1].tokens == TOKENS // 2


def test_pruned_experts_are_never_routed_to() -> None:
    logits = torch.randn(50, EXPERTS)
    kept = torch.tensor([True, False, True, False, True, True])
    weights, ids = route(logits, 3, True, kept)
    assert set(ids.unique().tolist()) <= {0, 2, 4, 5}
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
