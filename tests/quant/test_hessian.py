from __future__ import annotations

import pytest
import torch

from moe_rco.errors import ModelError
from moe_rco.quant.errors import output_error
from moe_rco.quant.hessian import HessianAccumulator, shrink


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_add_up_to_the_mean_outer_product():
    x = normal(50, 6)
    accumulator = HessianAccumulator(2, 6)
    for part in x.split(20):
        accumulator.add(1, part)
    hessian = accumulator.hessians()
    assert torch.allclose(hessian[1], x.T @ x / 50, atol=1e-6)
    assert bool((hessian[0] == 0).all())
    assert accumulator.counts.tolist() == [0, 50]


def test_weights_count_as_repetitions():
    x, weight = normal(10, 4), torch.randint(0, 4, (10,))
    weighted, repeated = HessianAccumulator(1, 4), HessianAccumulator(1, 4)
    weighted.add(0, x, weight)
    repeated.add(0, x.repeat_interleave(weight, 0))
    assert torch.allclose(weighted.hessians(), repeated.hessians(), atol=1e-6)
    # Tokens are counted as seen, whatever their weight.
    assert weighted.counts.tolist() == [10]


def test_routed_tokens_reach_their_experts():
    x, ids = normal(40, 5), torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    weight = torch.rand(40, 2)
    together, alone = HessianAccumulator(4, 5), HessianAccumulator(4, 5)
    together.add_routed(x, ids, weight)
    for expert in range(4):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        alone.add(expert, x[token], weight[token, slot])
    assert together.counts.tolist() == alone.counts.tolist()
    assert torch.allclose(together.hessians(), alone.hessians(), atol=1e-6)
    together.add_routed(x[:0], ids[:0])
    assert together.counts.tolist() == alone.counts.tolist()


def test_activations_that_are_not_finite_are_named():
    accumulator = HessianAccumulator(3, 2)
    accumulator.add(2, torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ModelError, match=r"experts \[2\]"):
        accumulator.hessians()


def test_shrinking_mixes_with_the_pooled_mean():
    hessian = torch.tensor([[[1.0, 0.5], [0.5, 1]], [[3, 1], [1, 2]], [[7, 7], [7, 7]]])
    result = shrink(hessian, torch.tensor([30, 10, 0]), 20)
    pooled = 0.75 * hessian[0] + 0.25 * hessian[1]
    # Half of what lies off the diagonal is dropped.
    target = torch.where(torch.eye(2, dtype=torch.bool), pooled, pooled / 2)
    assert result.experts == [1, 2]
    assert torch.equal(result.hessian[0], hessian[0])
    assert torch.allclose(result.hessian[1], 0.5 * hessian[1] + 0.5 * target)
    assert torch.allclose(result.hessian[2], target)
    # The default asks for four tokens a column.
    assert shrink(hessian, torch.tensor([30, 8, 7])).experts == [2]


def test_no_tokens_at_all_give_the_identity():
    result = shrink(torch.zeros(3, 4, 4), torch.zeros(3, dtype=torch.int64), 10)
    assert torch.equal(result.hessian, torch.eye(4).expand(3, 4, 4))
    assert result.experts == [0, 1, 2]


def test_output_error_is_that_of_the_tokens():
    x, before, after = normal(30, 6), normal(2, 5, 6, seed=1), normal(2, 5, 6, seed=2)
    hessian = (x.T @ x / 30).expand(2, 6, 6)
    expected = [float((x @ (before[e] - after[e]).T).square().sum(1).mean()) for e in range(2)]
    assert output_error(before, after, hessian).tolist() == pytest.approx(expected, rel=1e-5)
    assert output_error(before, before, hessian).tolist() == [0, 0]
