"""The weights a search may choose from: the original experts and every option of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers.activations import ACT2FN

from moe_rco.calib.dense_bank import DenseBank, Stored, read_packed
from moe_rco.calib.streaming import Streaming
from moe_rco.calib.transfer import Mover
from moe_rco.calib.window import Window
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError, StoreError
from moe_rco.quant.grid import Quantized
from moe_rco.quant.packing import WEIGHT, unpack
from moe_rco.types import CostTable

Stacked = tuple[torch.Tensor, torch.Tensor]
"""Gate and up joined [E, 2I, H], and down [E, H, I]."""
Compact = tuple[Mapping[str, torch.Tensor], ...]
"""Gate, up and down as they are on disk, by suffix."""
Key = tuple[int, int, int]
"""Layer, expert, and option of the cost table (or `original`)."""


@dataclass(frozen=True)
class LayerBank(ABC):
    """The experts of one layer under every option. Index `original` stands for the unchanged weights.

    `quantities` are the indices of the options that keep an expert; none before anything was quantised.
    """

    device: torch.device
    activation: Callable[[torch.Tensor], torch.Tensor]
    prune_index: int | None
    original: int
    num_experts: int
    quantities: tuple[int, ...]

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Gate and up projections [n, 2I] to what goes into the down projection, [n, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    @abstractmethod
    def weights(self, expert: int, option: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up [2I, H], down [H, I]) of one expert under an option."""


@dataclass(frozen=True)
class StackedLayer(LayerBank):
    """All of a layer in memory."""

    stacks: Mapping[int, Stacked]

    def weights(self, expert: int, option: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = self.stacks[option]
        return gate_up[expert], down[expert]


@dataclass(frozen=True)
class StreamedLayer(LayerBank):
    """One expert at a time, from a window over the files."""

    layer: int
    full: Callable[[Key], tuple[torch.Tensor, torch.Tensor]]

    def weights(self, expert: int, option: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.full((self.layer, expert, option))


class OptionBank:
    """Gives the experts of each layer under every option of a cost table, in `dtype` on `device`.

    Layers stay resident once read; or, with `streaming`, experts are read when they are needed, held on `device` as they are
    on disk while they fit, and made full one at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        table: CostTable,
        device: torch.device,
        dtype: torch.dtype,
        streaming: Streaming | None = None,
    ) -> None:
        self.table, self.device, self.dtype, self.streaming = table, device, dtype, streaming
        self.dense = DenseBank(checkpoint, table, device, dtype, streaming)
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._activation = _activation(str(checkpoint.config.get("hidden_act", "silu")))
        self._layers: dict[tuple[int, bool], LayerBank] = {}
        self._store: Stored | None = None
        self._stored: dict[tuple[int, int], Mapping[str, TensorInfo]] = {}
        self._mover = Mover(device)
        self._window: Window[Key, Compact] | None = None
        if streaming is not None:
            self._window = Window(self._load, _nbytes, streaming.window)

    @property
    def original(self) -> int:
        """The index that stands for unchanged weights."""
        return len(self.table.options)

    def layer(self, layer: int, store: Stored | None = None) -> LayerBank:
        """A layer's experts: only the unchanged ones without a store. Raises StoreError where it lacks an option."""
        key = (layer, store is not None)
        if key not in self._layers:
            self._layers[key] = self._made(layer, store)
        return self._layers[key]

    def expect(self, keys: Iterable[Key]) -> None:
        """Say which (layer, expert, option) are needed next, in this order."""
        if self._window is not None:
            self._window.expect(dict.fromkeys(map(self._source, keys)))

    def let_go(self) -> None:
        """Give back what was read ahead."""
        if self._window is not None:
            self._window.clear()

    def _made(self, layer: int, store: Stored | None) -> LayerBank:
        original, rows = self.original, self.table.rows(layer)
        self._store = store or self._store
        kept = [i for i, option in enumerate(self.table.options) if not option.is_prune and store is not None]
        facts = (self.device, self._activation, self.table.prune_index, original, len(rows), tuple(kept))
        if self._window is not None:
            for option in kept:  # that they are there and sound is to be known now, not in the middle
                if self.table.options[option].is_quantized:
                    self._infos(layer, option)
            return StreamedLayer(*facts, layer, self._full)
        plain = self._layers.get((layer, False))
        stacks = (
            dict(plain.stacks)
            if isinstance(plain, StackedLayer)
            else {original: self._stack(layer, original)}
        )
        for option in kept:
            stacks[option] = self._stack(layer, option, stacks[original])
        return StackedLayer(*facts, stacks)

    def _stack(self, layer: int, option: int, originals: Stacked | None = None) -> Stacked:
        if originals is not None and not self.table.options[option].is_quantized:
            gate_up, down = originals
            return gate_up.bfloat16().to(self.dtype), down.bfloat16().to(self.dtype)
        pairs = [self._full((layer, expert, option)) for expert in range(len(self.table.rows(layer)))]
        return torch.stack([gate_up for gate_up, _ in pairs]), torch.stack([down for _, down in pairs])

    def _source(self, key: Key) -> Key:
        """The key of what is read from disk for another: weights that are not quantised are made of the original ones."""
        layer, expert, option = key
        plain = option == self.original or not self.table.options[option].is_quantized
        return (layer, expert, self.original) if plain else key

    def _full(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        source = self._source(key)
        compact = self._load(source) if self._window is None else self._window.get(source)
        if source[2] == self.original:
            gate, up, down = (part[WEIGHT] for part in compact)
            if source != key:  # an option, so written in bfloat16
                gate, up, down = gate.bfloat16(), up.bfloat16(), down.bfloat16()
            return torch.cat([gate, up]).to(self.dtype), down.to(self.dtype)
        option = self.table.options[key[2]]
        gate, up, down = (unpack(part, option) for part in compact)
        zero = None if gate.zero is None or up.zero is None else torch.cat([gate.zero, up.zero])
        joined = Quantized(torch.cat([gate.codes, up.codes]), torch.cat([gate.scale, up.scale]), zero)
        return joined.dequantize().to(self.dtype), down.dequantize().to(self.dtype)

    def _load(self, key: Key) -> Compact:
        layer, expert, option = key
        weights = self.table.groups[self.table.rows(layer)[expert]].weights
        if option == self.original:
            return tuple({WEIGHT: self._mover(self.checkpoint.read(weight.name))} for weight in weights)
        infos = self._infos(layer, option)
        return tuple(read_packed(infos, weight, self._mover) for weight in weights)

    def _infos(self, layer: int, option: int) -> Mapping[str, TensorInfo]:
        if (layer, option) not in self._stored:
            named = self.table.options[option]
            if self._store is None:
                raise StoreError(f"no store of quantised experts to read layer {layer} at {named} from")
            self._stored[layer, option] = self._store.tensors(layer, named)
        return self._stored[layer, option]


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name not in ACT2FN:
        raise ModelError(f"config.json: hidden_act '{name}' is not known to transformers")
    return ACT2FN[name]


def _nbytes(compact: Compact) -> int:
    return sum(tensor.nbytes for part in compact for tensor in part.values())
