"""The experts of a layer on a CUDA GPU: one launch of vLLM's fused kernels for each precision in the layer, summed.

Written against the source of vLLM 0.26 to 0.32, unverified on a GPU.

Every launch is given all tokens and an expert map in which experts of other precisions are -1, as under expert
parallelism. Shapes do not depend on the routing and nothing waits for the device, so CUDA graphs can record it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    marlin_moe_padded_intermediate,
    marlin_moe_permute_scales,
)
from vllm.scalar_type import scalar_types

from moe_rco.quant.packing import PACKED, SCALE, WEIGHT
from moe_rco.types import Option

# Both are stored with an offset of half their range, as our codes are on disk.
_MARLIN_TYPES = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}


class CudaExperts(nn.Module):
    """The experts of one layer, grouped by option.

    options: of every expert this process holds, by its global id; the others add nothing to the output.
    """

    def __init__(
        self, options: Mapping[int, Option], num_experts: int, hidden: int, intermediate: int
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.places: dict[int, tuple[_Precision, int]] = {}
        self.precisions = nn.ModuleList()
        for option in dict.fromkeys(options.values()):
            experts = [expert for expert, taken in options.items() if taken == option]
            precision = _Precision(option, experts, num_experts, hidden, intermediate)
            self.precisions.append(precision)
            self.places |= {expert: (precision, index) for index, expert in enumerate(experts)}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def load(self, expert: int, matrix: int, suffix: str, tensor: Tensor) -> None:
        """Put one tensor as written (of this process's share of the rows and columns) in its place."""
        precision, index = self.places[expert]
        precision.load(index, matrix, suffix, tensor)

    def prepare(self) -> None:
        """Bring the weights into the kernels' layout, which is as large (intermediate padded to 64)."""
        for precision in self.precisions:
            precision.prepare()  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T, H], weights float32 [T, k] and global ids int32 [T, k] -> [T, H], in x's dtype."""
        result = None
        for precision in self.precisions:
            part = precision(x, weights, ids)
            result = part if result is None else result.add_(part)
        return torch.zeros_like(x) if result is None else result


class _Precision(nn.Module):
    """The n experts of one option: `w13` and `w2`, and for quantised ones `w13_scale` and `w2_scale`."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor
    w2_scale: Tensor
    expert_map: Tensor

    def __init__(
        self, option: Option, experts: list[int], num_experts: int, hidden: int, intermediate: int
    ) -> None:
        super().__init__()
        self.option, self.hidden, self.intermediate = option, hidden, intermediate
        self.num_experts = num_experts
        mapping = torch.full((num_experts,), -1, dtype=torch.int32)
        mapping[experts] = torch.arange(len(experts), dtype=torch.int32)
        self.register_buffer("expert_map", mapping, persistent=False)
        # vLLM builds the model with its dtype as torch's default; the kernels want scales in it, too.
        dtype = torch.get_default_dtype()
        for name, rows, columns in (("w13", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
            if not option.is_quantized:
                self._register(name, torch.empty(len(experts), rows, columns, dtype=dtype))
                continue
            words, groups = columns * option.bits // 32, columns // (option.group_size or columns)
            self._register(name, torch.empty(len(experts), rows, words, dtype=torch.int32))
            self._register(f"{name}_scale", torch.empty(len(experts), rows, groups, dtype=dtype))

    def _register(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def load(self, index: int, matrix: int, suffix: str, tensor: Tensor) -> None:
        name = "w2" if matrix == 2 else "w13"
        target = getattr(self, f"{name}_scale" if suffix == SCALE else name).data[index]
        if suffix not in (WEIGHT, PACKED, SCALE):
            raise ValueError(f"{suffix} of {self.option}")
        if matrix < 2:
            target = target[matrix * self.intermediate : (matrix + 1) * self.intermediate]
        target.copy_(tensor)

    def prepare(self) -> None:
        if not self.option.is_quantized:
            return
        bits, group = self.option.bits, self.option.group_size or -1
        padded = marlin_moe_padded_intermediate(self.intermediate, group)
        extra = padded - self.intermediate
        # Marlin wants the input dimension first: [n, input / per word, output] and [n, groups, output].
        w13, w13_scale, w2, w2_scale = (
            getattr(self, name).data.transpose(1, 2).contiguous()
            for name in ("w13", "w13_scale", "w2", "w2_scale")
        )
        if extra:
            # Zero scales make the added outputs of gate and up zero, so what meets them in down is of no effect.
            w13, w13_scale = (
                nn.functional.pad(tensor.unflatten(2, (2, self.intermediate)), (0, extra)).flatten(2)
                for tensor in (w13, w13_scale)
            )
            w2 = nn.functional.pad(w2, (0, 0, 0, padded * bits // 32 - w2.shape[1]))
            groups = padded // group if group > 0 else 1
            w2_scale = nn.functional.pad(w2_scale, (0, 0, 0, groups - w2_scale.shape[1]))
        for name, weight, scale, columns, rows in (
            ("w13", w13, w13_scale, self.hidden, 2 * padded),
            ("w2", w2, w2_scale, padded, self.hidden),
        ):
            self._register(name, _repack(weight.contiguous(), columns, rows, bits))
            self._register(
                f"{name}_scale", marlin_moe_permute_scales(scale.contiguous(), columns, rows, group)
            )

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if not self.option.is_quantized:
            return fused_experts(
                x,
                self.w13,
                self.w2,
                weights,
                ids,
                global_num_experts=self.num_experts,
                expert_map=self.expert_map,
            )
        return fused_marlin_moe(
            x,
            self.w13,
            self.w2,
            None,
            None,
            self.w13_scale,
            self.w2_scale,
            weights,
            ids,
            quant_type_id=_MARLIN_TYPES[self.option.bits].id,
            global_num_experts=self.num_experts,
            expert_map=self.expert_map,
        )


def _repack(weight: Tensor, columns: int, rows: int, bits: int) -> Tensor:
    """int32 [n, columns / per word, rows] in Marlin's tiles."""
    settings: dict[str, Any] = {}
    if "perm" in inspect.signature(ops.gptq_marlin_moe_repack).parameters:  # vLLM 0.26: order of activations
        settings["perm"] = torch.empty(weight.shape[0], 0, dtype=torch.int32, device=weight.device)
    return ops.gptq_marlin_moe_repack(weight, size_k=columns, size_n=rows, num_bits=bits, **settings)
