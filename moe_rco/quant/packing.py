"""Packed tensors as written to disk, and their exact size in bytes.

The form is "pack-quantized" of compressed-tensors 0.17, so that any reader of that format reads our experts.
Its packing function is used as it is: codes are stored with an offset of 2^(bits-1), `32 // bits` of
them in an int32 (3-bit codes therefore take 3.2 bits), zero points packed likewise along the output
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moe_rco.errors import RecipeError
from moe_rco.quant.grid import SCALE_DTYPE, Quantized, group_width
from moe_rco.types import CostTable, Group, Option, Weight

WEIGHT = "weight"
PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"


def layout(
    shape: tuple[int, int], option: Option, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> (shape, dtype) of each tensor that a weight of `shape` (output, input) is written as.

    `dtype` is that of a weight which is not quantised. A pruned weight is written as nothing.
    """
    if option.is_prune:
        return {}
    if not option.is_quantized:
        return {WEIGHT: (tuple(shape), dtype)}
    rows, columns = shape
    per_word = 32 // option.bits
    groups = columns // group_width(columns, option)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        PACKED: ((rows, math.ceil(columns / per_word)), torch.int32),
        SCALE: ((rows, groups), SCALE_DTYPE),
        SHAPE: ((2,), torch.int64),
    }
    if not option.symmetric:
        tensors[ZERO_POINT] = ((math.ceil(rows / per_word), groups), torch.int32)
    return tensors


def nbytes(shape: tuple[int, int], option: Option) -> int:
    """Bytes on disk of a weight of `shape` (output, input) under `option`: the cost the search counts."""
    return sum(math.prod(size) * dtype.itemsize for size, dtype in layout(shape, option).values())


def cost_table(
    groups: Sequence[Group], options: Sequence[Option], floor: int, original_bytes: int
) -> CostTable:
    """Bytes of every option of every group, with the floor and size of the model they belong to.

    Raises RecipeError where an option's group size does not divide an expert weight's input dimension. Dense groups do not
    have such an option; their costs of options they do not have are 0.
    """
    cache: dict[tuple[tuple[int, int], Option], int] = {}

    def cost(group: Group, option: Option) -> int:
        return sum(part(weight, option) for weight in group.weights) if group.admits(option) else 0

    def part(weight: Weight, option: Option) -> int:
        key = (weight.shape, option)
        if key not in cache:
            _check(weight, option)
            cache[key] = nbytes(weight.shape, option)
        return cache[key]

    costs = np.array(
        [[cost(group, option) for option in options] for group in groups],
        dtype=np.int64,
    ).reshape(len(groups), len(options))
    return CostTable(tuple(groups), tuple(options), costs, original_bytes, floor)


def _check(weight: Weight, option: Option) -> None:
    columns = weight.shape[1]
    if option.group_size is not None and columns % option.group_size:
        usable = [size for size in (128, 64, 32) if columns % size == 0]
        advice = f"int{option.bits}-g{usable[0]}" if usable else f"int{option.bits}"
        raise RecipeError(
            f"option '{option}': group size {option.group_size} does not divide the input dimension "
            f"{columns} of '{weight.name}'; use for example '{advice}'"
        )


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, option: Option) -> dict[str, Tensor]:
    """Tensors to write, by suffix.

    `codes` is int8 [..., R, C], `scale` [..., R, G], `zero` int8 [..., R, G] or None. Leading dimensions are
    kept in front of every tensor (`weight_shape` becomes [..., 2]), so that `tensor[e]` is what expert e is
    written as.
    """
    if (zero is None) != option.symmetric:
        raise ValueError(f"{option} needs {'no zero points' if option.symmetric else 'zero points'}")
    *lead, rows, columns = codes.shape
    tensors = {
        PACKED: _pack(codes, option.bits),
        SCALE: scale.to(SCALE_DTYPE).contiguous(),
        SHAPE: torch.tensor([rows, columns]).expand(*lead, 2).contiguous(),
    }
    if zero is not None:
        # compressed-tensors packs zero points along the output dimension.
        tensors[ZERO_POINT] = _pack(zero.transpose(-1, -2), option.bits).transpose(-1, -2).contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], option: Option, rows: slice | Tensor = slice(None)) -> Quantized:
    """The inverse of `pack`: codes int8 [..., R, C], scale and zero point; of some rows only where these are given."""
    count, columns = (int(size) for size in tensors[SHAPE].reshape(-1, 2)[0])
    codes = _unpack(tensors[PACKED][..., rows, :], option.bits, columns)
    zero = None
    if not option.symmetric:
        zero = _unpack(tensors[ZERO_POINT].transpose(-1, -2), option.bits, count).transpose(-1, -2)
        zero = zero[..., rows, :].contiguous()
    return Quantized(codes, tensors[SCALE][..., rows, :], zero)


def dequantize(
    tensors: Mapping[str, Tensor],
    option: Option,
    dtype: torch.dtype = torch.float32,
    rows: slice | Tensor = slice(None),
) -> Tensor:
    """The weights [..., R, C] that written tensors stand for, or some rows of them.

    A weight that is not quantised is only converted. Raises ValueError for prune, which is written as nothing
    and so has no shape.
    """
    if option.is_prune:
        raise ValueError("a pruned weight has no tensors to dequantize")
    if not option.is_quantized:
        return tensors[WEIGHT][..., rows, :].to(dtype)
    return unpack(tensors, option, rows).dequantize(dtype)


def _pack(values: Tensor, bits: int) -> Tensor:
    """Pack int8 [..., n] along the last dimension, all leading dimensions at once (the library loops)."""
    # Imported late: it costs seconds (all of transformers), and byte costs are wanted without it.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(values.reshape(-1, values.shape[-1]), bits)
    return packed.view(*values.shape[:-1], packed.shape[-1])


def _unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of the library's packing, without its detours: streamed weights are unpacked all the time."""
    packed = packed.contiguous()
    if bits == 8:
        values = (packed.view(torch.uint8) ^ 128).view(torch.int8)
    elif 8 % bits == 0:  # the codes are parts of bytes, lowest first
        table = (
            _codes(bits, 8 // bits, packed.device).view(torch.int16 if bits == 4 else torch.int32).flatten()
        )
        values = table.index_select(0, packed.view(torch.uint8).flatten().int())
        values = values.view(*packed.shape[:-1], -1).view(torch.int8)
    else:
        several = 32 // bits // 2
        width = several * bits
        halves = torch.stack([packed & ((1 << width) - 1), (packed >> width) & ((1 << width) - 1)], -1)
        values = _codes(bits, several, packed.device).index_select(0, halves.flatten())
        values = values.view(*packed.shape[:-1], -1)
    return values[..., :length].contiguous()


@cache
def _codes(bits: int, several: int, device: torch.device) -> Tensor:
    """The codes that a number stands for which holds `several` of them, lowest first: int8 [2^(bits several), several]."""
    numbers = torch.arange(1 << (bits * several), device=device)
    parts = [(numbers >> (bits * index)) & ((1 << bits) - 1) for index in range(several)]
    return (torch.stack(parts, -1) - (1 << (bits - 1))).to(torch.int8)
