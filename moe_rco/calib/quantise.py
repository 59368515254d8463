"""Quantises the experts of one layer at every option that is missing, some experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rco.calib.bank import LayerBank
from moe_rco.calib.dispatch import by_expert
from moe_rco.calib.team import Team
from moe_rco.ckpt.store import Store
from moe_rco.quant.errors import output_error
from moe_rco.quant.gptq import quantize_gptq
from moe_rco.quant.grid import Quantized
from moe_rco.quant.hessian import HessianAccumulator, shrink
from moe_rco.quant.packing import pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import CostTable, Option

TOKENS = 1 << 15
"""Tokens that one expert is run on at once."""
WORKSPACE = 1 << 32
"""Bytes for the experts that are quantised at once."""


@dataclass(frozen=True)
class RoutedTokens:
    """A layer's calibration tokens: x [T, H], wherever there is room for it, and weights and ids [T, k] of their experts.

    The first `recorded` of them count for statistics.
    """

    x: Tensor
    weights: Tensor
    ids: Tensor
    recorded: int
    experts: int

    @cached_property
    def _by_expert(self) -> list[tuple[Tensor, Tensor]]:
        return by_expert(self.ids, self.experts)

    def of(self, expert: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For parts of an expert's tokens: their numbers [n], and on `device` inputs [n, H] and routing weights [n]."""
        token, slot = self._by_expert[expert]
        for t, s in zip(token.split(TOKENS), slot.split(TOKENS), strict=True):
            if len(t):
                yield t, self.x[t].to(device), self.weights[t, s].to(device)

    @cached_property
    def counts(self) -> Tensor:
        """Recorded tokens of each expert, int64 [E]."""
        return torch.bincount(self.ids[: self.recorded].flatten(), minlength=self.experts)

    @cached_property
    def shares(self) -> Tensor:
        """float32 [E]: what w^2 x x^T of an expert's token counts in the layer's pooled second moment.

        That is the mean, by counts, of every expert's mean by w^2.
        """
        ids, squares = (
            self.ids[: self.recorded].flatten(),
            self.weights[: self.recorded].flatten().double().square(),
        )
        mass = torch.zeros(self.experts, dtype=torch.float64).index_add_(0, ids, squares)
        return (self.counts / self.counts.sum().clamp_min(1) / mass.clamp_min(1e-300)).float()


class LayerQuantizer:
    """Quantises a layer's experts, as many at a time as `workspace` bytes allow; by GPTQ with the moments of their inputs."""

    def __init__(self, bank: LayerBank, tokens: RoutedTokens, method: str, workspace: int) -> None:
        self._bank, self._tokens = bank, tokens
        self._pooled: list[HessianAccumulator] | None = None
        hidden, inner = bank.weights(0, bank.original)[1].shape
        self._together = max(1, workspace // working_bytes(hidden, inner))
        if method == "gptq":
            self._pooled = [HessianAccumulator(1, size, bank.device) for size in (hidden, inner)]

    def see(self, expert: int, number: Tensor, x: Tensor, weight: Tensor, hidden: Tensor) -> None:
        """Take in some tokens of an expert, by their numbers: inputs [n, H], routing weights [n], and hidden [n, I]."""
        recorded = (number < self._tokens.recorded).to(x.device)
        if self._pooled is not None and bool(recorded.any()):
            share = weight[recorded].square() * float(self._tokens.shares[expert])
            for pooled, values in zip(self._pooled, (x, hidden), strict=True):
                pooled.add(0, values[recorded], share)

    def quantise(
        self,
        layer: int,
        options: list[Option],
        table: CostTable,
        store: Store,
        advance: Callable[[int], None],
        team: Team,
    ) -> None:
        """Write every option to the store, and the errors beside them. The team shares the experts."""
        count, per = self._bank.num_experts, self._together

        def quantised(start: int) -> np.ndarray:
            """Summed errors: of nothing at all, of RTN and GPTQ at every option; then which experts saw few tokens."""
            experts = list(range(start, min(start + per, count)))
            names = [table.groups[table.rows(layer)[expert]].weights for expert in experts]
            prefixes = [[weight.name.removesuffix("weight") for weight in group] for group in names]
            originals = [self._bank.weights(expert, self._bank.original) for expert in experts]
            weights = [torch.stack([pair[part] for pair in originals]).float() for part in (0, 1)]
            few = set[int]()
            hessians = self._hessians(experts, few)
            found = np.zeros(1 + 2 * len(options) + count)
            found[1 + 2 * len(options) + np.array(sorted(few), dtype=int)] = 1
            if hessians is not None:
                found[0] = sum(map(_error, weights, map(torch.zeros_like, weights), hessians))
            for index, option in enumerate(options):
                chosen = rounded = [quantize_rtn(weight, option) for weight in weights]
                if hessians is not None:
                    chosen = [quantize_gptq(w, h, option) for w, h in zip(weights, hessians, strict=True)]
                    for place, made in enumerate((rounded, chosen), 1 + 2 * index):
                        values = (quantized.dequantize() for quantized in made)
                        found[place] = sum(map(_error, weights, values, hessians))
                store.write_part(layer, option, start, _tensors(prefixes, chosen, option))
            advance(min(count - start, len(experts) * team.size))
            return found

        sums = np.sum(team.map(quantised, list(range(0, count, per))), axis=0)
        if team.leads and self._pooled is not None:
            few = np.flatnonzero(sums[1 + 2 * len(options) :]).tolist()
            store.update_stats(layer, {"undersampled": few})
            for option, errors in zip(options, sums[1 : 1 + 2 * len(options)].reshape(-1, 2), strict=True):
                relative = errors / max(sums[0], 1e-300)
                store.update_stats(
                    layer,
                    {"error": {option.name: dict(zip(("rtn", "gptq"), relative.tolist(), strict=True))}},
                )
        team.wait()
        if team.leads:
            for option in options:
                store.join(layer, option)
        team.wait()
        store.refresh()

    def _hessians(self, experts: list[int], few: set[int]) -> list[Tensor] | None:
        """Second moments [n, C, C] of the inputs of both matrices of some experts; notes whose are mixed with the pooled."""
        if self._pooled is None:
            return None
        bank = self._bank
        own = [
            HessianAccumulator(len(experts), len(pooled.hessians()[0]), bank.device)
            for pooled in self._pooled
        ]
        for place, expert in enumerate(experts):
            gate_up, _ = bank.weights(expert, bank.original)
            for number, x, weight in self._tokens.of(expert, bank.device):
                recorded = (number < self._tokens.recorded).to(x.device)
                x, weight = x[recorded], weight[recorded].square()
                own[0].add(place, x, weight)
                own[1].add(place, bank.gated(F.linear(x, gate_up)), weight)
        found = []
        for moments, pooled in zip(own, self._pooled, strict=True):
            shrunk = shrink(moments.hessians(), moments.counts, pooled=pooled.hessians()[0])
            found.append(shrunk.hessian)
            few.update(experts[place] for place in shrunk.experts)
        return found


def working_bytes(hidden: int, inner: int) -> int:
    """What quantising one expert takes at most: gate and up [2I, H], down [H, I], and a Hessian for each."""
    # Weights, codes and grids in float32, Hessians and their factors in float64, with some copies of each.
    return 24 * 3 * hidden * inner + 40 * (hidden**2 + inner**2)


def _error(weight: Tensor, replaced: Tensor, hessian: Tensor) -> float:
    return float(output_error(weight, replaced, hessian).sum())


def _tensors(prefixes: list[list[str]], quantized: list[Quantized], option: Option) -> dict[str, Tensor]:
    """Some quantised experts as they are written, under their names' prefixes [n][gate, up, down]: gate and up apart."""
    joined, down = quantized
    half = joined.codes.shape[1] // 2
    parts = [
        Quantized(
            joined.codes[:, rows],
            joined.scale[:, rows],
            None if joined.zero is None else joined.zero[:, rows],
        )
        for rows in (slice(0, half), slice(half, None))
    ]
    tensors: dict[str, Tensor] = {}
    for position, part in enumerate((*parts, down)):
        packed = pack(part.codes, part.scale, part.zero, option)
        for place, names in enumerate(prefixes):
            for suffix, stacked in packed.items():
                tensors[names[position] + suffix] = stacked[place].cpu()
    return tensors
