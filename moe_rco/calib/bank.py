"""The weights a search may choose from: the original experts and every option of them, dequantised a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.activations import ACT2FN

from moe_rco.adapters import Adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Store
from moe_rco.quant.packing import dequantize
from moe_rco.types import CostTable, Option

Stacked = tuple[torch.Tensor, torch.Tensor]
"""Gate and up joined [E, 2I, H], and down [E, H, I]."""


@dataclass(frozen=True)
class LayerBank:
    """The experts of one layer under every option. Index `original` stands for the unchanged weights."""

    device: torch.device
    activation: Callable[[torch.Tensor], torch.Tensor]
    prune_index: int | None
    stacks: dict[int, Stacked]
    original: int

    @property
    def quantities(self) -> list[int]:
        """Indices of the options that keep an expert."""
        return [option for option in self.stacks if option != self.original]

    @property
    def num_experts(self) -> int:
        return len(self.stacks[self.original][0])

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Gate and up projections [n, 2I] to what goes into the down projection, [n, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    def weights(self, expert: int, option: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up [2I, H], down [H, I]) of one expert under an option."""
        gate_up, down = self.stacks[option]
        return gate_up[expert], down[expert]


class OptionBank:
    """Gives the experts of each layer under every option of a cost table, read from the model and the store.

    Layers stay resident once read, in `dtype` on `device`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        table: CostTable,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.table, self.device, self.dtype = table, device, dtype
        self._checkpoint, self._adapter = checkpoint, adapter
        self._activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[
            checkpoint.config.get("hidden_act", "silu")
        ]
        self._originals: dict[int, Stacked] = {}
        self._layers: dict[int, LayerBank] = {}

    def original(self, layer: int) -> LayerBank:
        """A layer's unchanged experts only; needs no store."""
        return self._bank(layer, {})

    def layer(self, layer: int, store: Store) -> LayerBank:
        """A layer's experts under every option. Raises StoreError where the store lacks one."""
        if layer not in self._layers:
            kept = {i: option for i, option in enumerate(self.table.options) if not option.is_prune}
            self._layers[layer] = self._bank(
                layer, {index: self._stack(layer, option, store) for index, option in kept.items()}
            )
        return self._layers[layer]

    def _bank(self, layer: int, stacks: dict[int, Stacked]) -> LayerBank:
        original = len(self.table.options)
        stacks = {**stacks, original: self._original(layer)}
        return LayerBank(self.device, self._activation, self.table.prune_index, stacks, original)

    def _original(self, layer: int) -> Stacked:
        if layer not in self._originals:
            self._originals[layer] = self._join(layer, self._checkpoint.read)
        return self._originals[layer]

    def _stack(self, layer: int, option: Option, store: Store) -> Stacked:
        if not option.is_quantized:
            gate_up, down = self._original(layer)
            return gate_up.bfloat16().to(self.dtype), down.bfloat16().to(self.dtype)
        stored = store.read(layer, option)

        def weight(name: str) -> torch.Tensor:
            prefix = name.removesuffix("weight")
            tensors = {
                key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)
            }
            return dequantize(tensors, option)

        return self._join(layer, weight)

    def _join(self, layer: int, read: Callable[[str], torch.Tensor]) -> Stacked:
        gate_up, down = [], []
        for row in self.table.rows(layer):
            gate, up, out = (
                read(weight.name).to(self.device, self.dtype) for weight in self.table.groups[row].weights
            )
            gate_up.append(torch.cat([gate, up]))
            down.append(out)
        return torch.stack(gate_up), torch.stack(down)
