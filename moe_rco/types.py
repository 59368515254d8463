"""Frozen values shared by all rooms: options, groups, costs, budgets and assignments."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from moe_rco.errors import PlanError, RecipeError

Layout = Literal["mixed", "stock"]
"""How experts may differ: `mixed`, each for itself; `stock`, as readers without this package need it: every
layer keeps equally many experts, all experts of a layer at one precision.
"""

QUANTIZED_BITS = (2, 3, 4, 8)
_OPTION = re.compile(r"int([0-9]+)(?:-g([0-9]+))?")


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a group: remove it, quantise it, or keep it at 16 bits.

    `bits` is 0 for prune and 16 for bf16. `group_size` is the number of consecutive input weights that share one scale;
    None means one scale per output channel.
    """

    bits: int
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Option:
        """Read `prune`, `bf16`, `int4` (per channel) or `int4-g64`. Raises RecipeError."""
        if text == "prune":
            return PRUNE
        if text == "bf16":
            return BF16
        match = _OPTION.fullmatch(text)
        if match and int(match[1]) in QUANTIZED_BITS and (match[2] is None or int(match[2]) > 0):
            return cls(int(match[1]), int(match[2]) if match[2] else None)
        known = [
            "prune",
            "bf16",
            *(f"int{b}{g}" for b in QUANTIZED_BITS for g in ("", "-g32", "-g64", "-g128")),
        ]
        near = difflib.get_close_matches(text, known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(
            f"unknown option '{text}'{hint} (options are prune, bf16, and int2, int3, int4, int8 "
            "with an optional group size as in int4-g64)"
        )

    @property
    def name(self) -> str:
        if self.bits in (0, 16):
            return "prune" if self.bits == 0 else "bf16"
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    @property
    def is_prune(self) -> bool:
        return self.bits == 0

    @property
    def is_quantized(self) -> bool:
        return 0 < self.bits < 16

    @property
    def symmetric(self) -> bool:
        """Whether codes are centred on zero. 2 and 3 bits have too few levels to waste on symmetry."""
        return self.bits >= 4

    def __str__(self) -> str:
        return self.name


PRUNE = Option(0)
BF16 = Option(16)


@dataclass(frozen=True)
class Weight:
    """A matrix as named in the checkpoint on disk. `shape` is (output, input)."""

    name: str
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Group:
    """Weights that take one option together; today one routed expert.

    `layer` is the decoder layer, `index` the expert's id in it (the original id, also after pruning).
    """

    name: str
    layer: int
    index: int
    weights: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True, eq=False)
class CostTable:
    """Exact bytes on disk of every option of every group.

    `costs` is int64 [N, K] (N groups, K options), `original_bytes` what the groups take in the model as given.
    `floor` is the number of groups each layer must keep (the model's experts per token); `layout` says which
    assignments are allowed.
    """

    groups: tuple[Group, ...]
    options: tuple[Option, ...]
    costs: np.ndarray
    original_bytes: int
    floor: int
    layout: Layout = "mixed"

    @cached_property
    def layer(self) -> np.ndarray:
        """int64 [N]: the decoder layer of each group."""
        return np.array([group.layer for group in self.groups], dtype=np.int64)

    @cached_property
    def numel(self) -> int:
        return sum(group.numel for group in self.groups)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(int(layer) for layer in np.unique(self.layer))

    def rows(self, layer: int) -> np.ndarray:
        """int64 [E]: the rows of a layer's groups, in order of their index."""
        return np.flatnonzero(self.layer == layer)

    def option_index(self, option: Option) -> int:
        return self.options.index(option)

    @property
    def prune_index(self) -> int | None:
        return self.options.index(PRUNE) if PRUNE in self.options else None

    @cached_property
    def range(self) -> tuple[int, int]:
        """Smallest and largest cost any assignment with the per-layer floor can have, in bytes.

        They are the same for both layouts: the experts of a layer have one size, so the cheapest assignment
        keeps `floor` experts everywhere at the cheapest option, or all where prune is not an option.
        """
        cheapest = self.costs.min(1)
        cheapest_kept = np.where(self.costs > 0, self.costs, np.iinfo(np.int64).max).min(1)
        smallest = int(cheapest.sum())
        for layer in self.layers:
            rows = self.rows(layer)
            pruned = rows[cheapest[rows] == 0]
            must_keep = max(0, self.floor - (len(rows) - len(pruned)))
            smallest += int(np.sort(cheapest_kept[pruned])[:must_keep].sum())
        return smallest, int(self.costs.max(1).sum())


@dataclass(frozen=True)
class Room:
    """What of the GPUs that a budget is to fit is taken by what, in bytes, all of them together.

    `usable` is what vLLM may take, `reserve` what CUDA takes for itself; `serve` are the options of vLLM it is meant for.
    """

    serve: str
    usable: int
    other_weights: int
    kv_cache: int
    activations: int
    reserve: int

    @property
    def experts(self) -> int:
        """What is left for the routed experts; may be less than nothing."""
        return self.usable - self.other_weights - self.kv_cache - self.activations - self.reserve


@dataclass(frozen=True)
class Budget:
    """The resolved budget. `text` is how the recipe put it, for messages and reports only; `name` is fit for a file.

    `room` is how it came about where it was said what the model is to fit.
    """

    bytes: int
    text: str
    name: str = ""
    room: Room | None = None


@dataclass(frozen=True, eq=False)
class Assignment:
    """One option per group. `choice` is int64 [N], an index into `table.options`."""

    table: CostTable
    choice: np.ndarray

    @classmethod
    def uniform(cls, table: CostTable, option: Option) -> Assignment:
        return cls(table, np.full(len(table.groups), table.option_index(option), dtype=np.int64))

    @property
    def cost(self) -> int:
        return int(self.table.costs[np.arange(len(self.choice)), self.choice].sum())

    def option(self, row: int) -> Option:
        return self.table.options[int(self.choice[row])]

    def layer_options(self, layer: int) -> Sequence[Option]:
        return [self.option(int(row)) for row in self.table.rows(layer)]

    def kept(self, layer: int) -> list[int]:
        """The ids of the experts a layer keeps."""
        rows = self.table.rows(layer)
        return [self.table.groups[row].index for row in rows if not self.option(row).is_prune]

    def counts(self) -> dict[str, int]:
        return {
            option.name: int(np.sum(self.choice == index)) for index, option in enumerate(self.table.options)
        }

    def check(self, budget: Budget) -> None:
        """Raise PlanError where the budget, a layer's floor or the table's layout is violated."""
        if self.cost > budget.bytes:
            raise PlanError(f"the assignment needs {self.cost} bytes, the budget is {budget.bytes} bytes")
        for layer in self.table.layers:
            if len(self.kept(layer)) < self.table.floor:
                raise PlanError(
                    f"layer {layer} keeps {len(self.kept(layer))} experts, but {self.table.floor} are used per token"
                )
        if self.table.layout == "stock":
            self._check_stock()

    def _check_stock(self) -> None:
        first = self.table.layers[0]
        for layer in self.table.layers:
            kept = {option.name for option in self.layer_options(layer) if not option.is_prune}
            if len(kept) > 1:
                raise PlanError(
                    f"layer {layer} keeps experts at {' and '.join(sorted(kept))}, "
                    "but with layout stock a layer has one precision"
                )
            if len(self.kept(layer)) != len(self.kept(first)):
                raise PlanError(
                    f"layer {layer} keeps {len(self.kept(layer))} experts and layer {first} "
                    f"{len(self.kept(first))}, but with layout stock all layers keep equally many"
                )


class Progress(Protocol):
    """Where long work reports to. The command line draws bars; the default is silent."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a stage of `total` units; the value yielded advances it by a number of units."""
        ...


class Silent:
    """A Progress that shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda units: None
