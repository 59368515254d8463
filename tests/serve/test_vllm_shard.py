"""Shares of packed tensors: what every process decodes is its part of the whole weight."""

from __future__ import annotations

import pytest
import torch

from moe_rco.errors import ModelError
from moe_rco.quant.packing import SHAPE, WEIGHT, dequantize, pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.serve.vllm_shard import check_split, shard, slice_packed
from moe_rco.types import Option, Weight
from tests.serve.reference import unpack

OPTIONS = ("bf16", "int8", "int8-g32", "int4", "int4-g16", "int3", "int3-g32", "int3-g16", "int2", "int2-g16")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shares_decode_to_parts_of_the_weight(name: str, down: bool, parts: int) -> None:
    option, shape = Option.parse(name), (48, 96) if down else (96, 48)
    if option.group_size == 32:
        shape = (48, 192) if down else (96, 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tensors = {WEIGHT: weight.bfloat16()}
    if option.is_quantized:
        quantised = quantize_rtn(weight, option, search=False)
        tensors = pack(quantised.codes, quantised.scale, quantised.zero, option)
    whole = dequantize(tensors, option)
    for rank, expected in enumerate(whole.chunk(parts, dim=int(down))):
        share = {
            suffix: shard(tensor, suffix, option, shape, down, rank, parts)
            for suffix, tensor in tensors.items()
            if suffix != SHAPE
        }
        share[SHAPE] = torch.tensor(expected.shape)
        assert torch.equal(dequantize(share, option), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_columns_are_cut_anywhere(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3, 5), generator=torch.Generator().manual_seed(bits)).int()
    columns = 5 * (32 // bits)
    codes = unpack(words.numpy(), bits, columns)
    for begin in range(columns):
        for end in range(begin + 1, columns + 1):
            part = slice_packed(words, bits, begin, end)
            assert part.shape[1] == -(-(end - begin) // (32 // bits)) or begin % (32 // bits) == 0
            assert (unpack(part.numpy(), bits, end - begin) == codes[:, begin:end]).all()


def test_a_split_group_is_refused() -> None:
    down = Weight("model.layers.0.mlp.experts.3.down_proj.weight", (64, 128))
    check_split(down, Option.parse("int4-g64"), 2)
    check_split(down, Option.parse("int4"), 4)
    with pytest.raises(
        ModelError, match=r"experts\.3\.down_proj.* is int4-g64: 4 processes would get 32 inputs"
    ):
        check_split(down, Option.parse("int4-g64"), 4)
    with pytest.raises(ModelError, match="128 inputs, which 3 processes cannot share"):
        check_split(down, Option.parse("bf16"), 3)
