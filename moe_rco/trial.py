"""A short measurement: the model's first MoE layer goes through what a run does to every layer, and that is multiplied."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moe_rco.baselines import output_errors
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.fisher import fisher_effects
from moe_rco.calib.losses import STRIDE
from moe_rco.calib.objective import AssignedModel, Pass
from moe_rco.calib.quantise import WORKSPACE, LayerQuantizer, RoutedTokens
from moe_rco.calib.reference import Reference, divergence
from moe_rco.calib.runner import Runner
from moe_rco.calib.search import knapsack
from moe_rco.calib.streaming import give_back
from moe_rco.calib.team import Team
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.store import Place, Store
from moe_rco.ckpt.workdir import TRIAL
from moe_rco.ckpt.writer import from_tensor, write_file
from moe_rco.job import Ready
from moe_rco.quant.packing import cost_table
from moe_rco.types import Budget, CostTable, Option, Silent

ENOUGH = 0.1
"""Seconds after which a call is long enough to be measured."""
_FIRST, _REPEATED = 64, 8
_WEIGHTS = 1 << 24
"""Weights that are quantised, read and written for the measurement, if one expert does not have more."""


Work = Callable[[AssignedModel, TokenPool], None]


@dataclass(frozen=True)
class Cost:
    """Seconds: of every call in a layer, of every token in a layer, and of every token before and after the layers."""

    call: float
    token: float
    outside: float

    def of(self, layers: int, tokens: int, calls: int) -> float:
        return layers * (calls * self.call + tokens * self.token) + tokens * self.outside


@dataclass(frozen=True)
class Costs:
    """What a run does, measured: running an assignment, a search step, measuring all options, and their output errors.

    `quantise` are seconds for an expert at every option, `hessian` for a token of its calibration text, and `load` for making
    all options of a layer, where they stay. `read`, `check` and `write` are for a byte: reading and hashing it, reading and
    looking at it, and writing it. `batch` and `pair` say how many sequences go through the model together, in one pass or two.
    """

    forward: Cost
    step: Cost
    fisher: Cost
    errors: Cost
    quantise: float
    hessian: float
    load: float
    read: float
    check: float
    write: float
    batch: int
    pair: int


def measure_costs(ready: Ready, place: Path | None = None) -> Costs:
    """Try it on the model's first MoE layer; files it needs are made in `place`, and removed. Raises ModelError, StoreError."""
    gc.freeze()  # what is there already need not be looked through
    try:
        with TemporaryDirectory(prefix=TRIAL, dir=place, ignore_cleanup_errors=True) as directory:
            trial = _Trial(ready, Path(directory))
            found = trial.costs()
            trial.bank.let_go()
        del trial
        gc.collect()
    finally:
        gc.unfreeze()
    give_back()
    return found


class _Trial:
    """The first MoE layer of a model, some experts of which are quantised and stand for the others."""

    def __init__(self, ready: Ready, directory: Path) -> None:
        self.ready, self.sized, self.directory = ready, ready.sized, directory
        self.layer = self.sized.table.layers[0]
        self.table = self._part(None)
        self.pool = ready.pools[0]
        self.few = self._part(max(1, _WEIGHTS // self.table.groups[0].numel))
        self.store, self.bank = Store(directory, ""), self._bank(self.table)
        repeated = _Repeated(self.store, self.table, self.few)
        self.empty, self.model = (
            AssignedModel(
                self._runner(layers), self.sized.adapter, ready.checkpoint.config, self.bank, repeated
            )
            for layers in (0, self.layer + 1)
        )
        ready.checkpoint.check_finite(self.few.groups)

    def _part(self, experts: int | None) -> CostTable:
        table = self.sized.table.experts
        groups = [group for group in table.groups if group.layer == self.layer][:experts]
        original = sum(group.numel for group in groups) * table.original_bytes // table.numel
        return cost_table(groups, table.options, min(table.floor, len(groups)), original)

    def _bank(self, table: CostTable) -> OptionBank:
        ready, sized = self.ready, self.sized
        return OptionBank(ready.checkpoint, table, sized.device, sized.dtype, ready.streaming)

    def _runner(self, layers: int) -> Runner:
        ready, sized = self.ready, self.sized
        return Runner(ready.checkpoint, sized.adapter, sized.device, sized.dtype, ready.streaming, layers)

    def costs(self) -> Costs:
        length = self.pool.ids.shape[1]
        batch, pair = (self.model.batch(length, passes) for passes in (1, 2))
        quantise, hessian = self._quantise()
        load = self._seconds(lambda: self.model.states([None]))
        forward, step, fisher, errors = (self._cost(work, batch * length) for work in self._works())
        read, check, write = self._files()
        return Costs(
            forward, step, fisher, errors, quantise, hessian, load, read, check, write, batch, pair
        )  # fmt: skip

    def _works(self) -> tuple[Work, Work, Work, Work]:
        """What the first four of the costs are of."""
        budget = self.sized.budgets[0].bytes * self.table.original_bytes // self.sized.table.original_bytes
        losses = np.random.default_rng(0).random(self.table.costs.shape)
        low, high = self.table.range
        choice = knapsack(losses, self.table, Budget(min(max(budget, low), high), "")).choice

        def forward(model: AssignedModel, pool: TokenPool) -> None:
            model.own_divergences(choice, pool.ids, reference(len(pool), pool.ids.shape[1]))

        def step(model: AssignedModel, pool: TokenPool) -> None:
            target = reference(len(pool), pool.ids.shape[1])

            def loss(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
                return divergence(target.at(row, positions), logits).sum()

            model.own_effects([Pass(choice, loss)], pool.ids, STRIDE)

        def fisher(model: AssignedModel, pool: TokenPool) -> None:
            fisher_effects(model, pool, 0, Silent())

        def errors(model: AssignedModel, pool: TokenPool) -> None:
            output_errors(model, pool, Silent())

        def reference(sequences: int, length: int) -> Reference:
            made = Reference.empty(sequences, length, self.model.runner.vocab_size)
            for part in (made.ids, made.log_p, made.log_rest):
                part.fill_(-5 if part.is_floating_point() else 1)
            return made.of(slice(None), self.sized.device)

        return forward, step, fisher, errors

    def _cost(self, work: Work, most: int) -> Cost:
        """From a call of up to `most` tokens and one of a quarter."""
        # A quarter of it still comes to nearly all experts: what they take to be read is not to count for the tokens.
        tokens = min(most, max(_FIRST, 16 * len(self.table.groups) // self.model.top_k))
        with np.errstate(invalid="ignore"):  # without layers, what is measured in them is of no tokens
            while (long := self._time(work, self.model, tokens)) < ENOUGH and 2 * tokens <= most:
                tokens *= 2
            short = max(1, tokens // 4)
            outside = self._time(work, self.empty, tokens) / tokens
            inside, less = long - outside * tokens, self._time(work, self.model, short) - outside * short
        token = max(0.0, (inside - less) / max(1, tokens - short))
        return Cost(max(0.0, inside - token * tokens), token, outside)

    def _time(self, work: Work, model: AssignedModel, tokens: int) -> float:
        pool = self._text(tokens)
        return self._warm(lambda: work(model, pool))

    def _text(self, tokens: int) -> TokenPool:
        """About so many tokens of the calibration text."""
        length = min(tokens, self.pool.ids.shape[1])
        rows = torch.arange(max(1, tokens // length)) % len(self.pool)
        return TokenPool(self.pool.ids[rows, :length], tuple(self.pool.domains[row] for row in rows))

    def _warm(self, work: Callable[[], Any]) -> float:
        """Seconds of the faster of two calls, if the first did not take so long that what only it does is little of it."""
        first = self._seconds(work)
        return first if first > 10 * ENOUGH else min(first, self._seconds(work))

    def _seconds(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if self.sized.device.type == "cuda":
            torch.cuda.synchronize(self.sized.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def _quantise(self) -> tuple[float, float]:
        """Seconds for an expert, and for a token of its calibration text."""
        runner, few = self.model.runner, self.few
        experts, options = len(few.groups), [option for option in few.options if option.is_quantized]
        x = self._inputs(self._text(2 * _FIRST).ids)
        ids = torch.arange(experts, device=x.device).expand(len(x), -1)
        tokens = RoutedTokens(x, torch.ones(ids.shape, device=x.device), ids, len(x), experts)
        method = self.ready.recipe.quantizer.method if options else "rtn"
        streaming, bank = self.ready.streaming, self._bank(few).layer(self.layer)
        workspace = WORKSPACE if streaming is None else streaming.workspace
        quantizer = LayerQuantizer(bank, tokens, method, workspace)
        (part,) = tokens.of(0, runner.device)
        number, inputs, weight = (values.repeat(_REPEATED, *[1] * (values.ndim - 1)) for values in part)
        hidden = bank.gated(F.linear(inputs, bank.weights(0, bank.original)[0]))
        # Every token counts for its expert's second moments and for the layer's.
        hessian = 2 * self._warm(lambda: quantizer.see(0, number, inputs, weight, hidden)) / len(inputs)

        def quantise() -> None:
            quantizer.quantise(self.layer, options, few, self.store, lambda _: None, Team())

        return self._warm(quantise) / experts, hessian  # what is done only once is nothing beside all experts

    def _inputs(self, ids: torch.Tensor) -> torch.Tensor:
        """What goes into the layer's experts, [T, H]."""
        runner = self.model.runner
        h, context = runner.embed(ids.to(runner.device))
        for index, layer in runner.layers():
            h, x = runner.attend(index, layer, h, context)
        return x.flatten(0, 1)

    def _files(self) -> tuple[float, float, float]:
        """Seconds for reading and hashing a byte, for reading an expert's and looking at it, and for writing one."""
        names = [weight.name for weight in self.table.groups[0].weights]
        values = [self.ready.checkpoint.read(name) for name in names]
        size = sum(value.nbytes for value in values)
        read = self._seconds(lambda: [self.ready.checkpoint.read(name) for name in names])
        look = self._seconds(lambda: [bool(torch.isfinite(value).all()) for value in values])
        digest = self._seconds(lambda: [hashlib.sha256(v.view(torch.uint8).numpy().data) for v in values])
        entries = [from_tensor(name, value) for name, value in zip(names, values, strict=True)]
        write = self._seconds(lambda: write_file(self.directory / "written.safetensors", entries))
        return (read + digest) / size, (read + look) / size, (read + write) / size


@dataclass(frozen=True)
class _Repeated:
    """The store of a few experts of a layer, as one of all of them."""

    store: Store
    table: CostTable
    few: CostTable

    def tensors(self, place: Place, option: Option) -> dict[str, TensorInfo]:
        found, all_of_them = self.store.tensors(place, option), {}
        for number, group in enumerate(self.table.groups):
            stands = self.few.groups[number % len(self.few.groups)]
            for weight, other in zip(group.weights, stands.weights, strict=True):
                prefix = other.name.removesuffix("weight")
                for name, info in found.items():
                    if name.startswith(prefix):
                        all_of_them[weight.name.removesuffix("weight") + name.removeprefix(prefix)] = info
        return all_of_them
