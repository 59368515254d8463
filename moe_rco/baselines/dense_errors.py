"""What every option of a dense group does to the group's own outputs, on some inputs of the uncompressed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_rco.calib.moments import Moments
from moe_rco.calib.objective import AssignedModel
from moe_rco.quant.errors import output_error

CHUNK = 1 << 24
"""Weights compared at once."""


class DenseErrors:
    """Adds up, for a batch of so many sequences, in the dense groups' rows of `found` [N, K + 2]: errors of every option, the
    outputs' summed squares, and those of the residual stream.
    """

    def __init__(self, model: AssignedModel, found: np.ndarray, batch: int) -> None:
        self._model, self._found, self._batch = model, found, batch
        self._rows: dict[int, list[int]] = {}
        for row in model.table.dense.tolist():
            self._rows.setdefault(model.table.groups[row].layer, []).append(row)
        self._moments = self._of(-1)

    def _of(self, layer: int) -> Moments:
        groups = [self._model.table.groups[row] for row in self._rows.get(layer, ())]
        moments = Moments(groups, self._model.runner.device)
        moments.sequences = self._batch
        return moments

    @contextmanager
    def within(self, index: int, layer: nn.Module) -> Iterator[None]:
        """While this is open, inputs of the layer's groups are looked at."""
        self._moments = self._of(index)
        with self._moments.within(layer, self._batch):
            yield

    def measure(self, index: int, layer: Any, h: Tensor) -> None:
        """Compare the groups of a layer, h [B, S, H] being what comes out of it."""
        for row in self._rows.get(index, ()):
            for part, weight in enumerate(self._model.table.groups[row].weights):
                path = weight.name.removeprefix(f"model.layers.{index}.")
                self._compare(row, part, layer.get_parameter(path), h)

    def embeddings(self, ids: Tensor, h: Tensor) -> None:
        """h [B, S, H] are the embeddings of ids [B, S]."""
        bank, runner = self._model.bank.dense, self._model.runner
        for row in self._rows.get(-1, ()):
            for option in self._options(row):
                after = bank.look_up((row, 0, option), ids, runner.rows)
                self._found[row, option] = float((after.double() - h.double()).square().sum())
            self._found[row, -2:] = float(h.double().square().sum())

    def head(self, h: Tensor) -> None:
        """h [B, S, H] are the last hidden states."""
        runner = self._model.runner
        for row in self._rows.get(runner.num_layers, ()):
            self._moments = self._of(runner.num_layers)
            seen = self._moments.at_head(self._model.table.groups[row])

            def project(x: Tensor, weight: Tensor, row: int = row, seen: Any = seen) -> Tensor:
                seen(x, weight[:1])
                self._compare(row, 0, weight, h)
                return x

            with runner.head() as head:
                head(h.flatten(0, 1), project)

    def _options(self, row: int) -> list[int]:
        return self._model.table.allowed[row].nonzero()[0].tolist()

    def _compare(self, row: int, part: int, weight: Tensor, h: Tensor) -> None:
        """Add the errors of one weight [R, C]; of the stream, h, there is one for all weights of a group."""
        bank, found = self._model.bank.dense, self._found[row]
        group = self._model.table.groups[row]
        moments = self._moments.of(group, part)
        hessian, tokens = moments.hessians(), int(moments.counts[0])

        def squared(values: Tensor) -> float:
            step, total = max(1, CHUNK // weight.shape[1]), 0.0
            for start in range(0, len(weight), step):
                rows = slice(start, start + step)
                total += float(output_error(weight[None, rows], values[None, rows], hessian).sum())
            return total * tokens

        for option in self._options(row):
            found[option] += squared(bank.weight((row, part, option), weight))
        found[-2] += squared(torch.zeros_like(weight))
        found[-1] = float(h.double().square().sum())
