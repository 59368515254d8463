"""Loads and runs in vLLM what is quantised besides experts: linear maps of the layers, embeddings and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_rco.errors import ModelError
from moe_rco.quant.packing import PACKED, SCALE, SHAPE, ZERO_POINT, layout
from moe_rco.serve.vllm_compat import (
    ParallelLMHead,
    QuantizeMethodBase,
    VocabParallelEmbedding,
    current_platform,
)
from moe_rco.serve.vllm_packed import PackedWeights
from moe_rco.serve.vllm_shard import columns, rows
from moe_rco.types import Group, Option

_SUFFIXES = (PACKED, SCALE, ZERO_POINT, SHAPE)
Shard = str | int | None
"""vLLM's name of a matrix in a layer that fuses several; None in one that does not."""
_FUSED: dict[str, dict[Shard, int]] = {
    "qkv_proj": {"q": 0, "k": 1, "v": 2},
    "o_proj": {None: 0},
    "gate_up_proj": {0: 0, 1: 1},
    "down_proj": {None: 2},
    "embed_tokens": {None: 0},
    "lm_head": {None: 0},
}


def matrices_of(prefix: str) -> Mapping[Shard, int]:
    """Which of its group's weights a layer of vLLM has, by its name."""
    return _FUSED[prefix.rpartition(".")[2]]


class DenseMethod(QuantizeMethodBase):
    """What vLLM calls for one layer with weights of a dense group at a quantised option.

    matrices: which of the group's weights it has, in the order of their rows. tied: whether the layer is a head that has
    the embeddings' weights, which are loaded there.
    """

    def __init__(
        self, group: Group, option: Option, matrices: Mapping[Shard, int], tied: bool = False
    ) -> None:
        super().__init__()
        self.group, self.option, self.matrices, self.tied = group, option, matrices, tied
        self._loaded: set[tuple[int, str]] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate what is on disk for this process, and register handles by which vLLM passes us tensors."""
        if self.tied:
            return
        self._columns = self._share(layer, input_size, input_size_per_partition)
        self._rows = {
            matrix: self._rows_of(layer, matrix, size)
            for matrix, size in zip(self.matrices.values(), output_partition_sizes, strict=True)
        }
        kind: Callable[..., nn.Module] = PackedWeights
        if current_platform.is_cuda() and self.group.kind != "embeddings":
            from moe_rco.serve.vllm_cuda_dense import CudaLinear

            kind = CudaLinear
        sizes = [end - begin for begin, end in self._rows.values()]
        shape = (input_size, output_size)
        layer.packed = kind(self.option, sizes, input_size_per_partition, sum(output_partition_sizes), shape)
        layer.packed.dtype = params_dtype
        for suffix in _SUFFIXES:
            handle = nn.Parameter(torch.empty(0), requires_grad=False)
            handle.weight_loader = partial(self._load, layer, suffix)  # pyright: ignore[reportAttributeAccessIssue]
            layer.register_parameter(suffix, handle)

    def _share(self, layer: Any, size: int, per_process: int) -> tuple[int, int]:
        """The range of so many rows or columns that this process has; several may have the same."""
        begin = layer.tp_rank * (size // per_process) // layer.tp_size * per_process
        return begin, begin + per_process

    def _rows_of(self, layer: Any, matrix: int, size: int) -> tuple[int, int]:
        if isinstance(layer, VocabParallelEmbedding):  # padded
            return layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        return self._share(layer, self.group.weights[matrix].shape[0], size)

    def _load(
        self, layer: Any, suffix: str, param: nn.Parameter, loaded_weight: Tensor, shard_id: Shard = None
    ) -> None:
        matrix = self.matrices[shard_id]
        weight = self.group.weights[matrix]
        name = f"{weight.name.removesuffix('.weight')}.{suffix}"
        promised = layout(weight.shape, self.option).get(suffix)
        if promised is None:
            raise ModelError(
                f"tensor {name} does not belong to a weight of option {self.option}; copy the model again"
            )
        if (tuple(loaded_weight.shape), loaded_weight.dtype) != promised:
            raise ModelError(
                f"tensor {name} is {_said(loaded_weight.dtype)} {list(loaded_weight.shape)}, quantization_config promises "
                f"{_said(promised[1])} {list(promised[0])}; copy the model again"
            )
        if suffix == SHAPE:
            if loaded_weight.tolist() != list(weight.shape):
                raise ModelError(
                    f"tensor {name} is {loaded_weight.tolist()}, not {list(weight.shape)}; copy the model again"
                )
        else:
            part = rows(loaded_weight, suffix, self.option, *self._rows[matrix])
            if self._columns[1] - self._columns[0] < weight.shape[1]:
                part = columns(part, suffix, self.option, *self._columns)
            layer.packed.load(list(self.matrices.values()).index(matrix), suffix, part)
        self._loaded.add((matrix, suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a layer with a tensor missing; make the rest ready to run."""
        if self.tied:
            return
        for matrix in self.matrices.values():
            weight = self.group.weights[matrix]
            for suffix in layout(weight.shape, self.option):
                if (matrix, suffix) not in self._loaded:
                    name = f"{weight.name.removesuffix('.weight')}.{suffix}"
                    raise ModelError(f"tensor {name} is missing; copy the model again")
        layer.packed.prepare()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., C] -> this process's outputs [..., R]."""
        return layer.packed(x, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """ids [...] of this process's rows -> [..., H]."""
        return layer.packed.rows(input_)

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> ParallelLMHead:
        """Let a head use the embeddings' weights."""
        head: Any = layer
        head.packed = embed_tokens.packed
        return layer


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
