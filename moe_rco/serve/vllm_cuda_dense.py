"""Linear maps and heads on a CUDA GPU: by the scheme that vLLM has for compressed-tensors checkpoints.

Written against the source of vLLM 0.32, unverified on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

from moe_rco.types import Option


class CudaLinear(nn.Module):
    """As `PackedWeights`, of a symmetric option: the scheme's parameters are ours, one matrix above the other.

    `shape` is (inputs, outputs) of all processes together.
    """

    def __init__(
        self, option: Option, sizes: Sequence[int], inputs: int, outputs: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, torch.get_default_dtype()
        self._scheme = CompressedTensorsWNA16(
            strategy="group" if option.group_size else "channel",
            num_bits=option.bits,
            group_size=option.group_size,
            symmetric=True,
        )
        self._scheme.create_weights(
            self,
            output_size=shape[1],
            input_size=shape[0],
            output_partition_sizes=[outputs],
            input_size_per_partition=inputs,
            params_dtype=self.dtype,
            weight_loader=lambda *_: None,
        )
        for parameter in self.parameters():
            parameter.data.zero_()  # what pads a head's rows

    def load(self, number: int, suffix: str, tensor: Tensor) -> None:
        """Put one tensor as written (of this process's share) in its place."""
        start = sum(self.sizes[:number])
        self.get_parameter(suffix).data[start : start + len(tensor)].copy_(tensor)

    def prepare(self) -> None:
        """Bring the weights into the kernel's layout."""
        self._scheme.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs]"""
        return self._scheme.apply_weights(self, x, bias)
