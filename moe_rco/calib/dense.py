"""Dense groups under one or several assignments: forward as deployed, and the effects of moves from the backward pass.

With G the gradient of a sequence's loss with respect to a weight, moving it from W to W' changes the loss by <G, W' - W> to first
order. The square of that, with the loss -log p(y) of labels drawn from the model's own distribution, has twice the KL of the
sequence as its mean, in the Gauss-Newton approximation. Unlike for experts the sum over a sequence's tokens is squared: a
dense weight has its error at every one of them, and they add up where tokens attend to each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rco.calib.dense_bank import CHUNK, DenseBank
from moe_rco.calib.effects import Measured
from moe_rco.calib.runner import Context, Runner
from moe_rco.types import Group

Product = Callable[[int, Tensor, Tensor], Tensor]
"""(position of a weight in its group, inputs [..., C], the weight as it is in the model [R, C]) to outputs [..., R]."""


@dataclass(frozen=True)
class DenseState:
    """One group under the assignments of some samples, which are equal parts of `sequences`, one after the other.

    `sums`, float64 [sequences, K], gathers the effect of every measured move on each sequence's loss, from every `stride`-th
    token.
    """

    bank: DenseBank
    row: int
    choices: tuple[int, ...]
    sequences: int
    measured: Sequence[Measured]
    sums: Tensor | None
    stride: int = 1

    @property
    def group(self) -> Group:
        return self.bank.table.groups[self.row]

    def product(
        self, part: int, x: Tensor, original: Tensor, at: range | None = None, skip: int = 0
    ) -> Tensor:
        """x [..., C] times one of the group's weights, [..., R]; differentiable in x.

        x are tokens of the sequences `at`, of all where it is None, in equal parts; the first `skip` of each are not looked at.
        """
        at = range(self.sequences) if at is None else at
        return _Product.apply(x, self, part, original, at, skip)  # pyright: ignore[reportReturnType]

    def runs(self, at: range) -> Iterator[tuple[slice, int]]:
        """Neighbouring ones of some sequences that have the same option, and it."""
        per, start = self.sequences // len(self.choices), 0
        for option, found in itertools.groupby(self.choices[sequence // per] for sequence in at):
            stop = start + len(list(found))
            yield slice(start, stop), option
            start = stop

    def moves(self, sequence: int) -> list[int]:
        """The options to which moves are measured in a sequence."""
        sample = sequence // (self.sequences // len(self.choices))
        measured, now = self.measured[sample], self.choices[sample]
        every = self.bank.table.allowed[self.row].nonzero()[0].tolist()
        return [option for option in every if option != now and (measured is None or option in measured)]

    def observe(self, part: int, x: Tensor, g: Tensor, original: Tensor, at: range, skip: int) -> None:
        """Add what moves of a weight do, from x [n, t, C] and the gradients at its outputs g [n, t, R] of n sequences."""
        x, g = x[:, skip :: self.stride], g[:, skip :: self.stride]
        for run, now in self.runs(at):
            here = at[run]
            moves = self.moves(here[0])
            weights = {k: self.bank.weight((self.row, part, k), original) for k in (now, *moves)}
            step = max(1, CHUNK // x.shape[-1])
            for start in range(0, g.shape[-1], step) if moves else ():
                rows = slice(start, start + step)
                gradient = torch.bmm(g[run][:, :, rows].transpose(1, 2), x[run]).float().flatten(1)
                before = weights[now][rows].float()
                for option in moves:
                    self.add(here, option, gradient @ (weights[option][rows].float() - before).flatten())

    def add(self, at: range, option: int, effects: Tensor) -> None:
        """Add effects [n] of moving to an option on the loss of some sequences."""
        if self.sums is not None:
            self.sums[at.start : at.stop, option] += effects.double().cpu()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, state: DenseState, part: int, original: Tensor, at: range, skip: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.state, ctx.part, ctx.original, ctx.at, ctx.skip = state, part, original, at, skip
        by_sequence = x.reshape(len(at), -1, x.shape[-1])
        made = [
            F.linear(by_sequence[run], state.bank.weight((state.row, part, option), original))
            for run, option in state.runs(at)
        ]
        y = made[0] if len(made) == 1 else torch.cat(made)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), state = ctx.saved_tensors, ctx.state
        g = grads[0].reshape(len(ctx.at), -1, grads[0].shape[-1])
        made = [
            g[run] @ state.bank.weight((state.row, ctx.part, option), ctx.original)
            for run, option in state.runs(ctx.at)
        ]
        if state.sums is not None:
            inputs = x.reshape(len(ctx.at), -1, x.shape[-1])
            state.observe(ctx.part, inputs, g, ctx.original, ctx.at, ctx.skip)
        return torch.cat(made).view_as(x), None, None, None, None, None


class Dense:
    """All dense groups of a model under the assignments of some samples, used by its layers, embeddings and head."""

    def __init__(self, bank: DenseBank, states: Sequence[DenseState]) -> None:
        self._bank, self.states = bank, states
        self._layers: dict[int, list[DenseState]] = {}
        self._embedding = self._head = None
        for state in states:
            if state.group.kind == "embeddings":
                self._embedding = state
            elif state.group.kind == "head":
                self._head = state
            else:
                self._layers.setdefault(state.group.layer, []).append(state)

    @contextmanager
    def within(self, index: int, layer: nn.Module) -> Iterator[None]:
        """While this is open, the layer's linear maps are these groups'."""
        with self._bank.held(), ExitStack() as stack:
            for state in self._layers.get(index, ()):
                stack.enter_context(replaced(layer, state.group, state.product))
            yield

    def embed(self, runner: Runner, ids: Tensor) -> tuple[Tensor, Context]:
        """As `Runner.embed`."""
        state = self._embedding
        if state is None:
            return runner.embed(ids)
        made = [
            self._bank.look_up((state.row, 0, option), ids[run], runner.rows)
            for run, option in state.runs(range(len(ids)))
        ]
        h = torch.cat(made)
        return h, runner.context(h)

    def observe_embeddings(self, runner: Runner, ids: Tensor, g: Tensor) -> None:
        """Add what moves of the embeddings do, from the gradients g [n, t, H] at them."""
        state = self._embedding
        if state is None or state.sums is None:
            return
        ids, g = ids[:, :: state.stride], g[:, :: state.stride]
        for run, now in state.runs(range(len(ids))):
            here = range(len(ids))[run]
            before = self._bank.look_up((state.row, 0, now), ids[run], runner.rows).float()
            for option in state.moves(here[0]):
                after = self._bank.look_up((state.row, 0, option), ids[run], runner.rows).float()
                state.add(here, option, (g[run].float() * (after - before)).sum((1, 2)))

    @contextmanager
    def head(self, runner: Runner) -> Iterator[Callable[[Tensor, int, int], Tensor]]:
        """Maps last hidden states [t, H] of a sequence, its number and the position of the first to float32 logits [t, V]."""
        state = self._head
        if state is None and self._embedding is not None and runner.tied:
            state = self._embedding
        with self._bank.held(), runner.head() as plain:

            def logits(h: Tensor, sequence: int, start: int) -> Tensor:
                if state is None:
                    return plain(h)
                product, at, skip = state.product, range(sequence, sequence + 1), -start % state.stride
                return plain(h, lambda x, weight: product(0, x, weight, at, skip))

            yield logits


@contextmanager
def replaced(layer: nn.Module, group: Group, product: Product) -> Iterator[None]:
    """While this is open, a group's linear maps in a layer are products with a weight chosen elsewhere; biases stay."""
    paths = [weight.name.removeprefix(f"model.layers.{group.layer}.") for weight in group.weights]
    modules = [layer.get_submodule(path.removesuffix(".weight")) for path in paths]

    def forward(part: int, module: Any, x: Tensor) -> Tensor:
        y = product(part, x, module.weight)
        return y if module.bias is None else y + module.bias

    try:
        for part, module in enumerate(modules):
            module.forward = partial(forward, part, module)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
