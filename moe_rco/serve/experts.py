"""Torch modules that run a layer's routed experts from the tensors on disk, each at its own precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rco.adapters.base import route
from moe_rco.quant.packing import dequantize, layout
from moe_rco.types import Group, Option


class PackedLinear(nn.Module):
    """A matrix kept as its packed tensors (buffers named as on disk) and dequantised whenever it is used.

    `shape` is (output, input). The buffers are created on the meta device, to be filled by a loader. `bias` is a parameter
    as it is in the module whose place this takes, if there is one.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], option: Option, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape, self.option = shape, option
        self.register_parameter("bias", bias)
        for suffix, (size, dtype) in layout(shape, option).items():
            self.register_buffer(suffix, torch.empty(size, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., input] -> [..., output], in x's dtype."""
        tensors: dict[str, Any] = dict(self._buffers)
        return F.linear(x, dequantize(tensors, self.option, x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # `model.half()` or `.to(dtype)` is about the dtype computed in. The packed tensors only move.
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.option}"


class PackedEmbedding(PackedLinear):
    """Rows of a matrix kept as its packed tensors, dequantised in `dtype` when they are looked up."""

    def __init__(self, shape: tuple[int, int], option: Option, dtype: torch.dtype) -> None:
        super().__init__(shape, option)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """ids x [...] -> [..., H]"""
        tensors: dict[str, Any] = dict(self._buffers)
        rows = dequantize(tensors, self.option, self.dtype, rows=x.flatten())
        return rows.view(*x.shape, self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        device = next(buffer.device for buffer in self._buffers.values() if buffer is not None)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self


class TiedHead(nn.Module):
    """A head that multiplies by the packed embeddings."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is nobody's child twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., V], in x's dtype."""
        return PackedLinear.forward(self._embedding[0], x)


class Expert(nn.Module):
    """One gated MLP. Its children have the names of the group's weights on disk, in the order gate, up,
    down.
    """

    def __init__(self, group: Group, option: Option, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.names = [weight.name.split(".")[-2] for weight in group.weights]
        for name, weight in zip(self.names, group.weights, strict=True):
            self.add_module(name, PackedLinear(weight.shape, option))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H]"""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(gate(x)) * up(x))


class RoutedExperts(nn.Module):
    """The kept experts of a layer under their original ids; takes the place of transformers' fused
    experts.
    """

    def __init__(
        self, groups: Sequence[Group], options: Sequence[Option], activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.num_experts = len(groups)
        for group, option in zip(groups, options, strict=True):
            if not option.is_prune:
                self.add_module(str(group.index), Expert(group, option, activation))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> the weighted sum of experts [T,
        H].
        """
        result = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        for expert, pairs in enumerate(order.split(counts)):
            if len(pairs):
                token = pairs // top_k_index.shape[1]
                output = getattr(self, str(expert))(hidden_states[token])
                output = output * top_k_weights.flatten()[pairs, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result


class PrunedRouting:
    """A forward hook for a transformers router: chooses again, among the kept experts only.

    The router returns (logits [T, E], weights [T, k], ids [T, k]); the logits are passed on as they are.
    """

    def __init__(self, options: Sequence[Option], top_k: int, renormalise: bool) -> None:
        self.kept = torch.tensor([not option.is_prune for option in options], device="cpu")
        self.top_k, self.renormalise = top_k, renormalise

    def __call__(
        self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, _ = output
        if self.kept.device != logits.device:
            self.kept = self.kept.to(logits.device)
        chosen, ids = route(logits, self.top_k, self.renormalise, self.kept)
        return logits, chosen.to(weights.dtype), ids
