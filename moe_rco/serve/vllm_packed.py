"""Packed weights dequantised whenever they are used, by operators that vLLM's compiler takes as they are.

Linear maps on a CPU, where vLLM has no kernel for all of our options, and embeddings everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rco.quant.packing import PACKED, SCALE, SHAPE, ZERO_POINT, dequantize, layout
from moe_rco.serve.vllm_compat import direct_register_custom_op
from moe_rco.types import Option

CHUNK = 1 << 22
"""Weights made full at once."""
_library = torch.library.Library("moe_rco", "FRAGMENT")


class PackedWeights(nn.Module):
    """One or several matrices of `inputs` columns, one above the other, of so many rows each.

    Outputs are padded with zeros to `outputs`. `dtype` is that of embeddings that are looked up. `shape`, all processes'
    together, is what vLLM's kernels on a GPU have to know; it is not needed here.
    """

    dtype = torch.float32

    def __init__(
        self,
        option: Option,
        sizes: Sequence[int],
        inputs: int,
        outputs: int,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.option, self.sizes, self.inputs, self.outputs = option, sizes, inputs, outputs
        for number, size in enumerate(sizes):
            forms = layout((size, inputs), option)
            for suffix in (PACKED, SCALE, ZERO_POINT):
                form, dtype = forms.get(suffix, ((0,), torch.int32))
                self.register_buffer(f"{suffix}_{number}", torch.zeros(form, dtype=dtype), persistent=False)

    def load(self, number: int, suffix: str, tensor: Tensor) -> None:
        """Put one tensor as written (of this process's share) in its place."""
        self.get_buffer(f"{suffix}_{number}").copy_(tensor)

    def prepare(self) -> None:
        """Nothing is to be done: weights stay as they are on disk."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs], in x's dtype."""
        made = [
            torch.ops.moe_rco.packed_linear(x, *self._packed(number)) for number in range(len(self.sizes))
        ]
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        if y.shape[-1] < self.outputs:
            y = F.pad(y, (0, self.outputs - y.shape[-1]))
        return y if bias is None else y + bias

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., inputs]"""
        return torch.ops.moe_rco.packed_rows(ids, *self._packed(0), self.dtype)

    def _packed(self, number: int) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
        tensors = (self.get_buffer(f"{suffix}_{number}") for suffix in (PACKED, SCALE, ZERO_POINT))
        return (*tensors, self.sizes[number], self.inputs, self.option.bits, self.option.group_size or 0)  # pyright: ignore[reportReturnType]


def _dequantized(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    shape: tuple[int, int],
    option: Option,
    dtype: torch.dtype,
    rows: slice | Tensor,
) -> Tensor:
    tensors = {PACKED: words, SCALE: scales, ZERO_POINT: zeros, SHAPE: torch.tensor(shape)}
    return dequantize(tensors, option, dtype, rows)


def _packed_linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, size: int, inputs: int, bits: int, group: int
) -> Tensor:
    option, made, step = Option(bits, group or None), [], max(1, CHUNK // inputs)
    for start in range(0, size, step):
        part = slice(start, start + step)
        made.append(F.linear(x, _dequantized(words, scales, zeros, (size, inputs), option, x.dtype, part)))
    return torch.cat(made, -1) if made else x.new_zeros(*x.shape[:-1], 0)


def _packed_linear_shape(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, size: int, inputs: int, bits: int, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def _packed_rows(
    ids: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    size: int,
    inputs: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    if not size:  # a process whose rows are all padding
        return scales.new_zeros(*ids.shape, inputs, dtype=dtype)
    option = Option(bits, group or None)
    found = _dequantized(words, scales, zeros, (size, inputs), option, dtype, ids.flatten())
    return found.view(*ids.shape, inputs)


def _packed_rows_shape(
    ids: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    size: int,
    inputs: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty(*ids.shape, inputs, dtype=dtype)


direct_register_custom_op(
    "packed_linear", _packed_linear, fake_impl=_packed_linear_shape, target_lib=_library
)
direct_register_custom_op("packed_rows", _packed_rows, fake_impl=_packed_rows_shape, target_lib=_library)
