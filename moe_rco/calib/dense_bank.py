"""The weights of dense groups at every option: of the layers' linear maps, the embeddings and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rco.calib.streaming import Streaming
from moe_rco.calib.transfer import Mover
from moe_rco.ckpt.data import read_tensor
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Place, place_of
from moe_rco.errors import StoreError
from moe_rco.quant.packing import PACKED, SCALE, SHAPE, ZERO_POINT, dequantize
from moe_rco.types import CostTable, Option, Weight

CHUNK = 1 << 22
"""Weights made full at once, beside what is made of them."""
Key = tuple[int, int, int]
"""Row of the cost table, position among the group's weights, and option of the table (or `original`)."""


class Stored(Protocol):
    """Where quantised tensors are read from: a store, or a written checkpoint."""

    def tensors(self, place: Place, option: Option) -> Mapping[str, TensorInfo]:
        """The quantised tensors in a place at an option, by name, others perhaps beside them. Raises StoreError."""
        ...


def read_packed(infos: Mapping[str, TensorInfo], weight: Weight, move: Mover) -> dict[str, Tensor]:
    """The tensors that a quantised weight is written as, by suffix, moved to where they are used; its shape stays here."""
    prefix = weight.name.removesuffix("weight")
    found = {suffix: infos.get(prefix + suffix) for suffix in (PACKED, SCALE, ZERO_POINT)}
    part = {suffix: move(read_tensor(info)) for suffix, info in found.items() if info is not None}
    return {**part, SHAPE: torch.tensor(weight.shape)}


class DenseBank:
    """Full weights in `dtype` on `device`, kept once made; with `streaming` only while they are `held`.

    What is not quantised is made of `original`, the weight as it is in the model, which whoever asks has at hand.
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
        self.original = len(table.options)
        self.store: Stored | None = None
        self._checkpoint, self._mover = checkpoint, Mover(device)
        self._full: dict[Key, Tensor] = {}
        self._infos: dict[tuple[Place, int], Mapping[str, TensorInfo]] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """While weights are used again and again."""
        try:
            yield
        finally:
            if self.streaming is not None:
                self._full.clear()

    def weight(self, key: Key, original: Tensor) -> Tensor:
        """[R, C] of one weight at an option."""
        if self._is_plain(key):
            return self._plain(key, original)
        if key not in self._full:
            compact, option = self._compact(key), self.table.options[key[2]]
            rows, columns = self._shape(key)
            full, step = (
                torch.empty(rows, columns, dtype=self.dtype, device=self.device),
                max(1, CHUNK // columns),
            )
            for start in range(0, rows, step):
                part = slice(start, start + step)
                full[part] = dequantize(compact, option, rows=part).to(self.dtype)
            self._full[key] = full
        return self._full[key]

    def look_up(self, key: Key, ids: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [..., C] of one weight at an option; `original` gives those of the model as it is."""
        if self._is_plain(key):
            return self._plain(key, original(ids))
        if self.streaming is None:
            return F.embedding(ids, self.weight(key, ids))
        rows = dequantize(self._compact(key), self.table.options[key[2]], rows=ids.flatten())
        return rows.to(self.dtype).view(*ids.shape, -1)

    def check(self, store: Stored) -> None:
        """Read from a store from now on. Raises StoreError where it lacks an option of a group, or one is damaged."""
        self.store = store
        for row in self.table.dense.tolist():
            for option, named in enumerate(self.table.options):
                if named.is_quantized and self.table.allowed[row, option]:
                    self._tensors(row, option)

    def _shape(self, key: Key) -> tuple[int, int]:
        return self.table.groups[key[0]].weights[key[1]].shape

    def _is_plain(self, key: Key) -> bool:
        return key[2] == self.original or not self.table.options[key[2]].is_quantized

    def _plain(self, key: Key, values: Tensor) -> Tensor:
        """The original values, or these as an option: written in bfloat16."""
        return values if key[2] == self.original else values.bfloat16().to(self.dtype)

    def _compact(self, key: Key) -> dict[str, Tensor]:
        weight = self.table.groups[key[0]].weights[key[1]]
        return read_packed(self._tensors(key[0], key[2]), weight, self._mover)

    def _tensors(self, row: int, option: int) -> Mapping[str, TensorInfo]:
        place, named = place_of(self.table.groups[row]), self.table.options[option]
        if (place, option) not in self._infos:
            if self.store is None:
                raise StoreError(f"no store of quantised weights to read {place} at {named} from")
            self._infos[place, option] = self.store.tensors(place, named)
        return self._infos[place, option]
