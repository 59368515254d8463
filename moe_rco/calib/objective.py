"""The loss of the model under an assignment, and the effect of every single move, on calibration sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_rco.adapters import Adapter, Config
from moe_rco.calib.bank import LayerBank, OptionBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.dense import Dense, DenseState
from moe_rco.calib.dense_bank import Stored
from moe_rco.calib.effects import EffectSums, Measured
from moe_rco.calib.moe import LayerState
from moe_rco.calib.reference import Reference, divergence
from moe_rco.calib.runner import Experts, Runner
from moe_rco.calib.team import Team
from moe_rco.types import CostTable

HeadLoss = Callable[[int, slice, torch.Tensor], torch.Tensor]
"""(row of the batch, positions of its sequence, their logits [n, V]) to the loss summed over these positions."""
BATCH = 8
HEAD_LOGITS = 1 << 25
"""Logits made at once."""


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass: under `choice` [N], or with the original weights, of a loss at the head.

    Only moves to the options in `measured` are looked at, to all where it is None.
    """

    choice: np.ndarray | None
    loss: HeadLoss
    measured: Measured = None


@dataclass(frozen=True)
class Effects:
    """Effects of all moves, float64 [N, K] or of each sequence [B, N, K], per token: `linear` their mean, `squared` their mean
    square.

    Of dense groups it is the square of the sum over each sequence, divided by its tokens.
    """

    linear: np.ndarray
    squared: np.ndarray


class AssignedModel:
    """A model whose experts follow an assignment; everything the search asks of the model goes through here.

    Where the bank streams, weights are there for one layer's use at a time: all passes asked for together go through a layer
    while it is there, what lies between two layers is kept in host memory, and the backward pass runs each layer again.
    """

    def __init__(
        self,
        runner: Runner,
        adapter: Adapter,
        config: Config,
        bank: OptionBank,
        store: Stored | None = None,
        team: Team | None = None,
    ) -> None:
        self.runner, self.bank, self.store, self.team = runner, bank, store, team or Team()
        if store is not None:
            bank.dense.check(store)
        self.table: CostTable = bank.table
        self.top_k, self.renormalise = adapter.top_k(config), adapter.renormalise(config)

    def layer_bank(self, layer: int) -> LayerBank:
        return self.bank.layer(layer, self.store)

    def batch(self, length: int, passes: int = 1) -> int:
        """How many sequences of a length to run at once; more where weights are streamed, to share a layer's time there."""
        streaming = self.bank.streaming
        return BATCH if streaming is None else max(1, streaming.tokens // (length * passes))

    def states(
        self,
        choices: Sequence[np.ndarray | None],
        measured: Sequence[Measured] | None = None,
        stride: int = 1,
    ) -> dict[int, LayerState]:
        """The MoE layers under some choices [N], or with their original weights; with `measured`, effects are gathered."""
        states = {}
        for layer in self.table.layers:
            bank, rows = self.layer_bank(layer), self.table.rows(layer)
            options = tuple(
                (bank.original,) * len(rows) if choice is None else tuple(map(int, choice[rows]))
                for choice in choices
            )
            sums = (
                None if measured is None else EffectSums.zeros(len(rows), len(self.table.options), measured)
            )
            states[layer] = LayerState(
                bank, options, self.top_k, self.renormalise, sums, stride, self.bank.streaming is not None
            )
        return states

    def dense(
        self,
        choices: Sequence[np.ndarray | None],
        sequences: int,
        measured: Sequence[Measured] | None = None,
        stride: int = 1,
    ) -> Dense:
        """The dense groups as `states` has the experts, where all samples together run on so many sequences."""
        bank, states = self.bank.dense, list[DenseState]()
        for row in self.table.dense.tolist():
            options = tuple(bank.original if choice is None else int(choice[row]) for choice in choices)
            if measured is None and set(options) == {bank.original}:
                continue
            shape = (sequences, len(self.table.options))
            sums = None if measured is None else torch.zeros(shape, dtype=torch.float64)
            states.append(
                DenseState(bank, row, options, sequences, measured or [None] * len(options), sums, stride)
            )
        return Dense(bank, states)

    def experts(self, choice: np.ndarray | None) -> Experts:
        return _through(self.states([choice]))

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, choice: np.ndarray | None = None) -> torch.Tensor:
        """Last hidden states [B, S, H] of ids [B, S]."""
        states, dense = self.states([choice]), self.dense([choice], len(ids))
        h, context = dense.embed(self.runner, ids.to(self.runner.device))
        for index, layer in self.walk(states, dense):
            h = self.runner.step(index, layer, h, context, _through(states))
        return h

    @contextmanager
    def head(self, choice: np.ndarray | None = None) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Maps last hidden states [..., H] to float32 logits [..., V]."""
        with self.dense([choice], 1).head(self.runner) as logits:
            yield lambda h: logits(h, 0, 0)

    def logits(self, h: torch.Tensor, choice: np.ndarray | None = None) -> torch.Tensor:
        """Last hidden states [..., H] to float32 logits [..., V]."""
        with self.head(choice) as logits:
            return logits(h)

    def walk(
        self, states: dict[int, LayerState], dense: Dense, reverse: bool = False, every: bool = False
    ) -> Iterator[tuple[int, nn.Module]]:
        """The decoder layers as `Runner.layers`, with dense weights as chosen.

        Experts of a layer and the next are expected as chosen, or at `every` option.
        """
        for index, layer in self.runner.layers(reverse):
            near = (at for at in (index, index + (-1 if reverse else 1)) if at in states)
            self.bank.expect((at, *pair) for at in near for pair in _needed(states[at], every))
            with dense.within(index, layer):
                yield index, layer

    def divergences(self, choice: np.ndarray, pool: TokenPool, reference: Reference) -> np.ndarray:
        """Mean KL to the reference of each sequence of a pool under `choice` [groups], float64 [sequences]."""

        def piece(at: tuple[slice, torch.Tensor]) -> np.ndarray:
            rows = np.full(size, np.nan)
            rows[: len(at[1])] = self.own_divergences(choice, at[1], reference.of(at[0], self.runner.device))
            return rows

        pieces = -(-len(pool) // self.batch(pool.ids.shape[1]))
        if self.bank.streaming is None:
            pieces += pieces % 2  # so that two processes have as much to do each, and one does not notice
        size = -(-len(pool) // pieces)
        return np.concatenate(self.team.map(piece, list(pool.batches(size))))[: len(pool)]

    @torch.no_grad()
    def own_divergences(self, choice: np.ndarray, ids: torch.Tensor, target: Reference) -> np.ndarray:
        """As `divergences`, of some sequences ids [B, S] together and by this process alone; the target is on the device."""
        rows, hidden = [], self.hidden(ids, choice)
        with self.head(choice) as logits:
            for row, states in enumerate(hidden):
                total = sum(
                    float(divergence(target.at(row, positions), logits(states[positions])).double().sum())
                    for positions in self.positions(len(states))
                )
                rows.append(total / len(states))
        return np.array(rows)

    def effects(
        self, passes: Sequence[Pass], ids: torch.Tensor, stride: int = 1
    ) -> list[tuple[float, Effects]]:
        """For each pass its loss summed over ids [B, S], and the effect of every move; passes are shared by the team."""
        size, shape = self.team.size, self.table.costs.shape
        shares = [passes[number::size] for number in range(min(size, len(passes)))]

        def run(share: Sequence[Pass]) -> np.ndarray:
            # All of a share have to have one shape, also where there is one pass more in it than in another.
            packed = np.zeros((-(-len(passes) // size), 1 + 2 * shape[0] * shape[1]))
            for row, (total, effects) in zip(packed, self.own_effects(share, ids, stride), strict=False):
                row[0], row[1:] = total, np.concatenate([effects.linear, effects.squared]).ravel()
            return packed

        found = self.team.map(run, shares)
        rows = (found[number % size][number // size] for number in range(len(passes)))
        return [(float(row[0]), Effects(*row[1:].reshape(2, *shape))) for row in rows]

    def own_effects(
        self, passes: Sequence[Pass], ids: torch.Tensor, stride: int = 1, apart: bool = False
    ) -> list[tuple[float, Effects]]:
        """As `effects`, by this process alone; with `apart` those of each sequence, [B, N, K]."""
        streaming, ids = self.bank.streaming, ids.to(self.runner.device)
        together = 1 if streaming is None else max(1, streaming.tokens // ids.numel())
        groups = (passes[start : start + together] for start in range(0, len(passes), together))
        return [found for group in groups for found in self._effects(group, ids, stride, apart)]

    def _effects(
        self, passes: Sequence[Pass], ids: torch.Tensor, stride: int, apart: bool
    ) -> list[tuple[float, Effects]]:
        choices, measured = [one.choice for one in passes], [one.measured for one in passes]
        parts = len(ids) if apart else 1
        each = [one for one in passes for _ in range(parts)]
        states = self.states([one.choice for one in each], [one.measured for one in each], stride)
        inputs = ids.repeat(len(passes), 1)
        dense = self.dense(choices, len(inputs), measured, stride)
        h, context = dense.embed(self.runner, inputs)
        experts, losses = _through(states), [one.loss for one in passes]
        if self.bank.streaming is not None:
            borders = list[torch.Tensor]()
            with torch.no_grad():
                for index, layer in self.walk(states, dense):
                    borders.append(h.cpu())
                    h = self.runner.step(index, layer, h, context, experts)
            totals, gradient = self._head(h, losses, dense)
            for index, layer in self.walk(states, dense, reverse=True, every=True):
                leaf = borders.pop().to(self.runner.device).requires_grad_()
                torch.autograd.backward(self.runner.step(index, layer, leaf, context, experts), gradient)
                gradient = leaf.grad
        else:
            last = first = h.requires_grad_()
            for index, layer in self.walk(states, dense):
                last = self.runner.step(index, layer, last, context, experts)
            totals, gradient = self._head(last, losses, dense)
            torch.autograd.backward(last, gradient)
            gradient = first.grad
        if gradient is not None:
            dense.observe_embeddings(self.runner, inputs, gradient)
        shape = (len(passes), parts, *self.table.costs.shape)
        linear, squared = np.zeros(shape), np.zeros(shape)
        for layer, state in states.items():
            sums, rows = state.observe, self.table.rows(layer)
            if sums is not None:
                for found, values in ((linear, sums.linear), (squared, sums.squared)):
                    found[:, :, rows] = values.view(*shape[:2], *values.shape[1:]).numpy() / sums.tokens
        tokens = len(ids) // parts * -(-ids.shape[1] // stride)
        for state in dense.states:
            if state.sums is not None:
                by_sequence = state.sums.view(*shape[:2], len(ids) // parts, -1).numpy()
                linear[:, :, state.row] = by_sequence.sum(2) / tokens
                squared[:, :, state.row] = np.square(by_sequence).sum(2) / tokens
        pairs = zip(linear, squared, strict=True)
        effects = [Effects(*pair) if apart else Effects(pair[0][0], pair[1][0]) for pair in pairs]
        return list(zip(totals, effects, strict=True))

    def _head(
        self, h: torch.Tensor, losses: Sequence[HeadLoss], dense: Dense
    ) -> tuple[list[float], torch.Tensor]:
        """Every loss at its equal part of h, and the gradient at h; some positions at a time: all logits may not fit."""
        gradient, batch = torch.empty_like(h), len(h) // len(losses)
        totals = [0.0] * len(losses)
        with dense.head(self.runner) as logits:
            for row, positions in itertools.product(range(len(h)), self.positions(h.shape[1])):
                leaf = h[row, positions].detach().requires_grad_()
                made = logits(leaf, row, positions.start)
                value = losses[row // batch](row % batch, positions, made)
                (gradient[row, positions],) = torch.autograd.grad(value, leaf)
                totals[row // batch] += float(value.detach())
        return totals, gradient

    def positions(self, length: int) -> list[slice]:
        """Parts of a sequence whose logits are made at once."""
        step = max(1, HEAD_LOGITS // self.runner.vocab_size)
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _through(states: dict[int, LayerState]) -> Experts:
    def experts(layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return states[layer].forward(x, logits)

    return experts


def _needed(state: LayerState, every: bool) -> Iterator[tuple[int, int]]:
    """(expert, option) pairs in the order they are used."""
    for expert in range(len(state.choices[0])):
        chosen = {choice[expert] for choice in state.choices}
        pruned = state.bank.prune_index in chosen
        wanted = chosen - {state.bank.prune_index}
        if every:
            wanted |= {*state.bank.quantities, *([state.bank.original] if pruned else [])}
        yield from ((expert, option) for option in sorted(wanted))
