from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rco.errors import RecipeError
from moe_rco.quant.grid import code_range
from moe_rco.quant.packing import PACKED, cost_table, dequantize, layout, nbytes, pack, unpack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import BF16, PRUNE, Group, Option, Weight
from tests.quant.strategies import options_and_shapes, seeds


def random_tensors(option: Option, shape: tuple[int, int], lead: tuple[int, ...], seed: int):
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(option.bits)
    rows, columns = shape
    groups = columns // (option.group_size or columns)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator, dtype=torch.int8)

    scale = torch.rand(*lead, rows, groups, generator=generator).to(torch.bfloat16)
    return (
        codes(*lead, rows, columns),
        scale,
        None if option.symmetric else codes(*lead, rows, groups),
    )


@given(options_and_shapes(), st.sampled_from([(), (1,), (3,), (2, 2)]), seeds)
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(case, lead, seed):
    option, shape = case
    codes, scale, zero = random_tensors(option, shape, lead, seed)
    back = unpack(pack(codes, scale, zero, option), option)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scale, scale)
    assert (back.zero is None) == (zero is None)
    if zero is not None and back.zero is not None:
        assert torch.equal(back.zero, zero)


@given(options_and_shapes(), seeds)
@settings(max_examples=60, deadline=None)
def test_cost_is_the_bytes_of_what_is_packed(case, seed):
    option, shape = case
    packed = pack(*random_tensors(option, shape, (), seed), option)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == layout(shape, option)
    assert sum(tensor.untyped_storage().nbytes() for tensor in packed.values()) == nbytes(shape, option)
    assert all(tensor.is_contiguous() for tensor in packed.values())


@given(options_and_shapes(), seeds)
@settings(max_examples=30, deadline=None)
def test_experts_packed_together_are_experts_packed_alone(case, seed):
    option, shape = case
    codes, scale, zero = random_tensors(option, shape, (3,), seed)
    together = pack(codes, scale, zero, option)
    for expert in range(3):
        alone = pack(codes[expert], scale[expert], None if zero is None else zero[expert], option)
        assert alone.keys() == together.keys()
        assert all(torch.equal(together[name][expert], alone[name]) for name in alone)


@given(options_and_shapes(), seeds, st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=40, deadline=None)
def test_compressed_tensors_reads_what_we_write(case, seed, dtype):
    option, shape = case
    packed = pack(*random_tensors(option, shape, (), seed), option)
    arguments = QuantizationArgs(
        num_bits=option.bits,
        symmetric=option.symmetric,
        strategy=QuantizationStrategy.GROUP if option.group_size else QuantizationStrategy.CHANNEL,
        group_size=option.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    # Its result has the type of the scales.
    theirs = PackedQuantizationCompressor.decompress(
        dict(packed, weight_scale=packed["weight_scale"].to(dtype)), scheme
    )["weight"]
    assert torch.equal(dequantize(packed, option, dtype), theirs)


@pytest.mark.parametrize("name", ["int3", "int3-g64"])
def test_what_no_code_uses_of_a_word_does_not_matter(name):
    """Ten codes of 3 bits leave two bits, which other writers may fill."""
    option = Option.parse(name)
    codes, scale, zero = random_tensors(option, (4, 128), (), 0)
    packed = pack(codes, scale, zero, option)
    packed[PACKED] = packed[PACKED] | -(1 << 30)
    assert torch.equal(unpack(packed, option).codes, codes)


def test_codes_are_stored_with_an_offset_lowest_bits_first():
    codes = torch.tensor([[-8, -7, 7, 0, 1, -1, 2, -2]], dtype=torch.int8)
    packed = pack(codes, torch.ones(1, 1), None, Option(4))["weight_packed"]
    assert packed.shape == (1, 1)
    assert int(packed) == 0x6A798F10


def test_sizes_of_known_shapes():
    # int4, groups of 64: half a byte a weight, two bytes a group, and 16 bytes of shape.
    assert nbytes((768, 2048), Option(4, 64)) == 768 * 2048 // 2 + 768 * 32 * 2 + 16
    # int2 has zero points, sixteen in a word along the output dimension.
    assert nbytes((768, 2048), Option(2, 64)) == 768 * 2048 // 4 + 768 * 32 * 2 + 48 * 32 * 4 + 16
    # Ten 3-bit codes a word: 13 words for 128.
    assert nbytes((20, 128), Option(3)) == 20 * 13 * 4 + 20 * 2 + 2 * 4 + 16
    assert nbytes((768, 2048), BF16) == 768 * 2048 * 2
    assert nbytes((768, 2048), PRUNE) == 0


def test_unquantised_weights_pass_through():
    weight = torch.randn(3, 5).bfloat16()
    assert layout((3, 5), BF16, torch.float32) == {"weight": ((3, 5), torch.float32)}
    assert torch.equal(dequantize({"weight": weight}, BF16), weight.float())
    with pytest.raises(ValueError, match="pruned"):
        dequantize({}, PRUNE)


def test_zero_points_must_fit_the_option():
    quantized = quantize_rtn(torch.randn(4, 8), Option(2))
    with pytest.raises(ValueError, match="int4 needs no zero points"):
        pack(*quantized, Option(4))
    with pytest.raises(ValueError, match="int2 needs zero points"):
        pack(quantized.codes, quantized.scale, None, Option(2))


def expert(index: int, columns: int = 64) -> Group:
    names = [f"layers.0.experts.{index}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    shapes = [(96, columns), (96, columns), (columns, 96)]
    weights = tuple(Weight(name, shape) for name, shape in zip(names, shapes, strict=True))
    return Group(f"layers.0.experts.{index}", 0, index, weights)


def test_cost_table_sums_a_groups_weights():
    options = (PRUNE, Option(4, 32), BF16)
    table = cost_table([expert(0), expert(1)], options, 1, 123)
    assert table.costs.dtype == np.int64
    expected = [0, 2 * nbytes((96, 64), options[1]) + nbytes((64, 96), options[1]), 3 * 96 * 64 * 2]
    assert table.costs.tolist() == [expected, expected]
    assert (table.floor, table.original_bytes, table.options) == (1, 123, options)


def test_group_size_must_divide_the_inputs():
    with pytest.raises(RecipeError) as raised:
        cost_table([expert(0)], (PRUNE, Option(4, 64)), 1, 0)
    for part in ("int4-g64", "96", "layers.0.experts.0.down_proj.weight", "int4-g32"):
        assert part in str(raised.value)
    with pytest.raises(RecipeError, match="use for example 'int8'"):
        cost_table([expert(0, columns=50)], (Option(8, 64),), 1, 0)
