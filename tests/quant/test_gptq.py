from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_rco.quant.errors import output_error
from moe_rco.quant.gptq import quantize_gptq
from moe_rco.quant.grid import Grid, Quantized, code_range, fit_grid, quantize_to_grid
from moe_rco.quant.hessian import HessianAccumulator, shrink
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import Option
from tests.quant.strategies import correlated

OPTIONS = ("int2-g32", "int3-g32", "int4-g64", "int4", "int8-g64", "int2")


def reference(weight: Tensor, hessian: Tensor, option: Option, damping: float, act_order: bool) -> Tensor:
    """The published algorithm for one matrix, column by column and without blocks; returns codes."""
    rows, columns = weight.shape
    scale, zero = fit_grid(weight, option)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    current = weight[:, order].clone()
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    low, high = code_range(option.bits)
    for position, column in enumerate(order.tolist()):
        group = column // (option.group_size or columns)
        step = scale[:, group].double()
        shift = torch.zeros(rows) if zero is None else zero[:, group]
        code = (torch.round(current[:, position] / step) + shift).clamp(low, high)
        error = (current[:, position] - (code - shift) * step) / factor[position, position]
        current[:, position:] -= error[:, None] * factor[position, None, position:]
        codes[:, column] = code.to(torch.int8)
    return codes


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("act_order", [False, True])
def test_same_codes_as_the_plain_algorithm(name, act_order):
    option = Option.parse(name)
    # 192 columns: more than one block, and the last one is not full.
    weight, hessian, _ = correlated(3, 16, 192, 400, seed=1)
    weight, hessian = weight.double(), hessian.double()
    ours = quantize_gptq(weight, hessian, option, act_order=act_order, weighted_grid=False)
    for expert in range(3):
        expected = reference(weight[expert], hessian[expert], option, 0.01, act_order)
        assert torch.equal(ours.codes[expert], expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_is_as_good_as_float64(name):
    option = Option.parse(name)
    weight, hessian, _ = correlated(3, 16, 192, 400, seed=1)
    single = quantize_gptq(weight, hessian, option)
    double = quantize_gptq(weight.double(), hessian.double(), option)
    errors = [output_error(weight, q.dequantize(), hessian).sum() for q in (single, double)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=0.02)


@pytest.mark.parametrize("weighted_grid", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_less_output_error_than_rounding(name, weighted_grid):
    option = Option.parse(name)
    weight, hessian, fresh = correlated(6, 32, 128, 1000, seed=2)
    gptq = quantize_gptq(weight, hessian, option, weighted_grid=weighted_grid).dequantize()
    rtn = quantize_rtn(weight, option).dequantize()
    for moments in (hessian, fresh):
        ratio = output_error(weight, gptq, moments) / output_error(weight, rtn, moments)
        assert float(ratio.max()) < 0.7


def test_both_refinements_pay():
    option = Option.parse("int3-g64")
    weight, hessian, fresh = correlated(6, 32, 128, 1000, seed=3)

    def error(act_order: bool, weighted_grid: bool) -> float:
        result = quantize_gptq(weight, hessian, option, act_order=act_order, weighted_grid=weighted_grid)
        return float(output_error(weight, result.dequantize(), fresh).sum())

    assert error(True, False) < 0.95 * error(False, False)
    assert error(True, True) < 0.95 * error(True, False)


def test_batched_is_one_at_a_time(monkeypatch):
    weight, hessian, _ = correlated(5, 8, 96, 300, seed=4)
    weight, hessian = weight.double(), hessian.double()
    option = Option.parse("int3-g32")
    whole = quantize_gptq(weight, hessian, option)
    # Factorised two at a time.
    monkeypatch.setattr("moe_rco.quant.gptq._FACTOR_CHUNK", 2 * 96 * 96)
    pieces = quantize_gptq(weight, hessian, option)
    assert torch.equal(whole.codes, pieces.codes)
    for expert in range(5):
        part = slice(expert, expert + 1)
        alone = quantize_gptq(weight[part], hessian[part], option)
        assert torch.equal(whole.codes[part], alone.codes)
        assert torch.equal(whole.scale[part], alone.scale)


def finite(result: Quantized) -> bool:
    return bool(result.dequantize().isfinite().all())


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("name", ["int2-g32", "int4"])
def test_degenerate_hessians(name, damping):
    option = Option.parse(name)
    weight, hessian, _ = correlated(7, 16, 64, 300, seed=5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    hessian[0] = 0
    hessian[1] = torch.outer(direction, direction)
    hessian[2] *= 1e30
    hessian[3] *= 1e-30
    hessian[4, :, 10] = hessian[4, 10, :] = 0
    hessian[5] = -hessian[5]
    result = quantize_gptq(weight, hessian, option, damping=damping)
    assert finite(result)
    rtn = quantize_rtn(weight, option)
    # Nothing known about the inputs: plain rounding.
    assert torch.equal(result.codes[0], rtn.codes[0])
    assert torch.equal(result.scale[0], rtn.scale[0])
    # One broken expert does not touch its neighbours.
    alone = quantize_gptq(weight[6:], hessian[6:], option, damping=damping)
    assert torch.equal(result.codes[6:], alone.codes)
    error = output_error(weight, result.dequantize(), hessian)
    plain = output_error(weight, rtn.dequantize(), hessian)
    for expert in (1, 2, 3, 4, 6):
        assert float(error[expert]) < float(plain[expert])


def test_the_scale_of_the_hessian_does_not_matter():
    weight, hessian, _ = correlated(2, 8, 64, 300, seed=6)
    option = Option.parse("int3-g32")
    # Powers of two, so that the scaling itself is exact.
    small, large = (quantize_gptq(weight, hessian * factor, option) for factor in (2.0**-40, 2.0**40))
    assert torch.equal(small.codes, large.codes)


def test_unseen_columns_are_rounded():
    weight, hessian, _ = correlated(1, 8, 64, 300, seed=7)
    hessian[0, :, 5] = hessian[0, 5, :] = 0
    result = quantize_gptq(weight, hessian, Option(8))
    rounded = quantize_to_grid(weight, Grid(result.scale, result.zero), Option(8))
    assert torch.equal(result.codes[:, :, 5], rounded[:, :, 5])
    assert not torch.equal(result.codes, rounded)


def test_a_hessian_that_is_not_finite_is_refused():
    weight, hessian, _ = correlated(2, 4, 32, 100, seed=8)
    hessian[1, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_gptq(weight, hessian, Option(4))


def test_shrinking_helps_experts_with_few_tokens():
    generator = torch.Generator().manual_seed(9)
    mix = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q * torch.arange(1, 65) ** -0.5
    mix = mix @ torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    weight = torch.randn(4, 16, 64, generator=generator)
    accumulator = HessianAccumulator(4, 64)
    for expert, tokens in enumerate([20, 40, 1000, 1000]):
        accumulator.add(expert, torch.randn(tokens, 64, generator=generator) @ mix)
    hessian, option = accumulator.hessians(), Option.parse("int3-g32")
    shrunk = shrink(hessian, accumulator.counts)
    assert shrunk.experts == [0, 1]
    true = (mix.T @ mix).expand(4, 64, 64)
    plain, better = (
        output_error(weight, quantize_gptq(weight, h, option).dequantize(), true)
        for h in (hessian, shrunk.hessian)
    )
    assert bool((better[:2] < 0.8 * plain[:2]).all())
