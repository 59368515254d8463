from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rco.quant.grid import code_range, dequantize_codes, fit_grid, quantize_to_grid
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import QUANTIZED_BITS, Option
from tests.quant.strategies import options_and_shapes, seeds


def groups_of(weight: torch.Tensor, option: Option) -> torch.Tensor:
    return weight.unflatten(-1, (-1, option.group_size or weight.shape[-1]))


def squared_error(weight: torch.Tensor, option: Option, **settings) -> float:
    return float((quantize_rtn(weight, option, **settings).dequantize() - weight).square().sum())


@given(options_and_shapes(), seeds, st.booleans(), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_error_is_half_a_step_where_the_grid_reaches(case, seed, search, magnitude):
    option, shape = case
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    quantized = quantize_rtn(weight, option, search=search)
    low, high = code_range(option.bits)
    assert quantized.codes.dtype == torch.int8
    assert int(quantized.codes.min()) >= low
    assert int(quantized.codes.max()) <= high
    zero = torch.zeros_like(quantized.scale) if quantized.zero is None else quantized.zero
    scale, zero = quantized.scale.double().unsqueeze(-1), zero.double().unsqueeze(-1)
    ends = torch.stack([(low - zero) * scale, (high - zero) * scale])
    values = groups_of(weight, option).double()
    nearest = values.clamp(ends.amin(0), ends.amax(0))
    error = (groups_of(quantized.dequantize(torch.float64), option) - nearest).abs()
    assert bool((error <= scale.abs() / 2 * (1 + 1e-5)).all())


@given(options_and_shapes(), seeds)
@settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest_on_the_stored_grid(case, seed):
    option, shape = case
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grid = fit_grid(weight, option)
    assert grid.scale.dtype == torch.bfloat16
    chosen = (dequantize_codes(quantize_to_grid(weight, grid, option), *grid) - weight).abs()
    low, high = code_range(option.bits)
    for code in range(low, high + 1, 1 if option.bits < 8 else 15):
        other = dequantize_codes(torch.full(shape, code, dtype=torch.int8), *grid)
        assert bool((chosen <= (other - weight).abs() + 1e-6).all())


@given(
    options_and_shapes(),
    seeds,
    st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e30, 1e37, 3.3e38]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_finite_whatever_the_magnitude(case, seed, magnitude, search):
    option, shape = case
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    quantized = quantize_rtn(weight * magnitude, option, search=search)
    assert bool(quantized.scale.isfinite().all())
    assert bool((quantized.scale != 0).all())
    assert bool(quantized.dequantize().isfinite().all())
    if magnitude >= 1e-30:
        # Not lost to overflow either, though the scales of the very largest weights are limited.
        assert float(quantized.dequantize().abs().max()) > 0.4 * float((weight * magnitude).abs().max())
    if 1e-30 <= magnitude <= 1e37:
        # Scaling by powers of two apart, the relative error does not depend on the magnitude.
        plain = quantize_rtn(weight, option, search=search).dequantize() - weight
        scaled = quantized.dequantize().double() / magnitude - weight
        assert float(scaled.norm()) == pytest.approx(
            float(plain.norm()), rel=0.2, abs=0.02 * float(weight.norm())
        )


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("search", [False, True])
def test_zeros_are_exact(bits, search):
    option = Option(bits, 4)
    weight = torch.tensor([[0.0, 0, 0, 0, 0.3, 0, -0.7, 0]])
    result = quantize_rtn(weight, option, search=search).dequantize()
    assert bool((result[weight == 0] == 0).all())


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("value", [0.37, -0.37, 1e-20])
def test_constant_groups_keep_their_value(bits, value):
    weight = torch.full((2, 64), value)
    result = quantize_rtn(weight, Option(bits, 32)).dequantize()
    assert torch.allclose(result, weight, rtol=2**-8, atol=0)


def test_a_value_on_the_grid_is_kept_exactly():
    scale = torch.tensor(0.0078125)
    for option in (Option(2), Option(3), Option(4), Option(8)):
        low, high = code_range(option.bits)
        weight = torch.arange(low, high + 1).float().expand(3, -1) * scale
        assert torch.equal(quantize_rtn(weight, option).dequantize(), weight), option


@pytest.mark.parametrize(("name", "most"), [("int2-g64", 0.70), ("int3-g64", 0.90), ("int4-g64", 0.85)])
def test_search_lowers_the_squared_error(name, most):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    option = Option.parse(name)
    assert squared_error(weight, option) < most * squared_error(weight, option, search=False)


def test_more_bits_and_smaller_groups_err_less():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [squared_error(weight, Option.parse(f"int{bits}-g64")) for bits in QUANTIZED_BITS]
    assert errors == sorted(errors, reverse=True)
    for bits in QUANTIZED_BITS:
        widths = [squared_error(weight, Option(bits, width)) for width in (32, 64, 128, None)]
        assert widths == sorted(widths)


def test_importance_moves_the_error_to_where_it_matters_less():
    weight = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(4, 64)
    importance[1, :8] = 100
    option = Option.parse("int2-g64")
    plain = (quantize_rtn(weight, option).dequantize() - weight).square()
    weighted = (quantize_rtn(weight, option, importance=importance).dequantize() - weight).square()
    # Only expert 1 has unequal columns.
    assert torch.equal(plain[[0, 2, 3]], weighted[[0, 2, 3]])
    assert float(weighted[1, :, :8].sum()) < 0.8 * float(plain[1, :, :8].sum())
    assert float((weighted[1] * importance[1]).sum()) < float((plain[1] * importance[1]).sum())


def test_columns_without_importance_still_get_a_grid():
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(1, 64)
    importance[:, :32] = 0
    option = Option(3, 32)
    zeros = quantize_rtn(weight, option, importance=torch.zeros(1, 64)).dequantize()
    part = quantize_rtn(weight, option, importance=importance).dequantize()
    plain = quantize_rtn(weight, option).dequantize()
    assert torch.equal(zeros, plain)
    assert torch.equal(part, plain)


def test_batched_is_one_at_a_time(monkeypatch):
    weight = torch.randn(5, 16, 96, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(5, 96, generator=torch.Generator().manual_seed(1))
    whole = quantize_rtn(weight, Option(3, 32), importance=importance)
    # Also when the search works through the matrices in pieces.
    monkeypatch.setattr("moe_rco.quant.grid._CHUNK", {"cpu": 7 * 96})
    for expert in range(5):
        alone = quantize_rtn(weight[expert], Option(3, 32), importance=importance[expert])
        assert all(
            torch.equal(together[expert], single)
            for together, single in zip(whole, alone, strict=True)
            if together is not None and single is not None
        )


def test_bfloat16_weights_are_searched_in_float32():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, high = quantize_rtn(weight, Option(4)), quantize_rtn(weight.float(), Option(4))
    assert torch.equal(low.codes, high.codes)
    assert torch.equal(low.scale, high.scale)
