"""One process's share of a weight's tensors under tensor parallelism, cut from the tensors on disk.

An expert's gate and up give each process a range of their rows, down a range of its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rco.errors import ModelError
from moe_rco.quant.packing import PACKED, WEIGHT, ZERO_POINT
from moe_rco.types import Option, Weight


def check_split(weight: Weight, option: Option, parts: int) -> None:
    """Raise ModelError if `parts` processes cannot share the input dimension of a weight."""
    inputs = weight.shape[1]
    instead = " or --enable-expert-parallel" if ".experts." in weight.name else ""
    if inputs % parts:
        raise ModelError(
            f"{weight.name} has {inputs} inputs, which {parts} processes cannot share evenly; "
            f"use another --tensor-parallel-size{instead}"
        )
    if option.group_size is not None and inputs // parts % option.group_size:
        raise ModelError(
            f"{weight.name} is {option}: {parts} processes would get {inputs // parts} inputs each, not a "
            f"multiple of {option.group_size}; use a smaller --tensor-parallel-size{instead}"
        )


def shard(
    tensor: Tensor, suffix: str, option: Option, shape: tuple[int, int], down: bool, rank: int, parts: int
) -> Tensor:
    """The part of one tensor as written, `suffix` of a weight of `shape`, that process `rank` of `parts` keeps.

    A scale per output channel of a down projection is kept whole by everyone. Codes and zero points that do
    not begin at a word are packed anew.
    """
    if parts == 1:
        return tensor
    size = shape[1 if down else 0] // parts
    return (columns if down else rows)(tensor, suffix, option, rank * size, (rank + 1) * size)


def rows(tensor: Tensor, suffix: str, option: Option, begin: int, end: int) -> Tensor:
    """What belongs to some rows of a weight, of one of its tensors as written."""
    if suffix == ZERO_POINT:
        return slice_packed(tensor.T, option.bits, begin, end).T
    return tensor[begin:end]


def columns(tensor: Tensor, suffix: str, option: Option, begin: int, end: int) -> Tensor:
    """What belongs to some columns of a weight, of one of its tensors as written."""
    if suffix == WEIGHT:
        return tensor[:, begin:end]
    if suffix == PACKED:
        return slice_packed(tensor, option.bits, begin, end)
    group = option.group_size
    return tensor if group is None else tensor[:, begin // group : end // group]


def slice_packed(packed: Tensor, bits: int, begin: int, end: int) -> Tensor:
    """Columns begin..end of int32 [n, W] that packs `32 // bits` codes a word, lowest bits first; int32 [n, w]."""
    per_word = 32 // bits
    first = begin // per_word
    words = packed[:, first : -(-end // per_word)]
    if begin % per_word == 0 and (end % per_word == 0 or end >= packed.shape[1] * per_word):
        return words
    codes = unpack_words(words, bits)[:, begin - first * per_word : end - first * per_word]
    codes = F.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    return (codes << torch.arange(per_word, device=packed.device) * bits).sum(-1).to(torch.int32)


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """Every code in int32 [n, W] as it is stored, without a sign: int64 [n, W * (32 // bits)]."""
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    return ((packed.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
