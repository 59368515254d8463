"""The stored reference distribution against the whole vocabulary in float64."""

from __future__ import annotations

import torch

from moe_rco.calib.reference import TOP, Reference, divergence, log_remainder


def fill(reference: Reference, logits: torch.Tensor) -> None:
    """Take in logits [N, S, V], a few positions at a time."""
    length = logits.shape[1]
    for row, states in enumerate(logits):
        for positions in (slice(0, length // 2), slice(length // 2, length)):
            reference.fill(row, positions, states[positions])


def test_divergence_is_exact_where_the_vocabulary_is_kept_whole() -> None:
    vocabulary = TOP + 1  # all but one are kept, and the rest is that one
    p, q = (torch.randn(3, 7, vocabulary) for _ in range(2))
    reference = Reference.empty(3, 7, vocabulary)
    fill(reference, p)
    exact = torch.nn.functional.kl_div(
        torch.log_softmax(q.double(), -1),
        torch.log_softmax(p.double(), -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    torch.testing.assert_close(divergence(reference, q).double(), exact, rtol=1e-4, atol=1e-5)


def test_divergence_of_a_tail_is_a_lower_bound_and_zero_for_the_model_itself() -> None:
    p, q = (torch.randn(2, 5, 500) for _ in range(2))
    reference = Reference.empty(2, 5, 500)
    fill(reference, p)
    exact = torch.nn.functional.kl_div(
        torch.log_softmax(q, -1), torch.log_softmax(p, -1), log_target=True, reduction="none"
    ).sum(-1)
    kept = divergence(reference, q)
    assert bool((kept <= exact + 1e-5).all())
    assert bool((kept > 0).all())
    torch.testing.assert_close(divergence(reference, p), torch.zeros(2, 5), rtol=0, atol=1e-5)


def test_rows_and_sequences_are_taken_apart_rightly() -> None:
    p = torch.randn(4, 3, 100)
    reference = Reference.empty(4, 3, 100)
    fill(reference, p)
    some = reference.of(torch.tensor([3, 1]), torch.device("cpu"))
    torch.testing.assert_close(divergence(some.at(0, slice(0, 3)), p[3]), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        divergence(some.at(0, slice(1, 3)), p[3, 1:]), torch.zeros(2), rtol=0, atol=1e-5
    )
    assert float(divergence(some.at(1, slice(0, 3)), p[3]).mean()) > 0.01


def test_positions_count_by_their_weight() -> None:
    p, q, weights = torch.randn(2, 6, 100), torch.randn(2, 6, 100), torch.rand(2, 6)
    plain, weighted = Reference.empty(2, 6, 100), Reference.empty(2, 6, 100, weights)
    for reference in (plain, weighted):
        fill(reference, p)
    torch.testing.assert_close(divergence(weighted, q), weights * divergence(plain, q))
    part = weighted.of(slice(1, 2), torch.device("cpu")).at(0, slice(2, 5))
    torch.testing.assert_close(divergence(part, q[1, 2:5]), (weights * divergence(plain, q))[1, 2:5])


def test_the_remainder_is_finite_and_differentiable_when_nothing_remains() -> None:
    log_p = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.3]])).requires_grad_()
    remainder = log_remainder(log_p)
    remainder.sum().backward()
    assert bool(remainder.isfinite().all())
    assert log_p.grad is not None
    assert bool(log_p.grad.isfinite().all())
    assert remainder.detach()[1].item() == torch.log(torch.tensor(0.5)).item()
