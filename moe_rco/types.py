"""Frozen values shared by all rooms: options, groups, costs, budgets, assignments and scores."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, get_args

import numpy as np

from moe_rco.errors import PlanError, RecipeError

Layout = Literal["mixed", "stock"]
"""How experts may differ: `mixed`, each for itself; `stock`, as readers without this package need it: every
layer keeps equally many experts, all experts of a layer at one precision.
"""

Kind = Literal["experts", "attention", "shared_experts", "embeddings", "head"]
"""What a group is made of. All but routed experts are called dense: every token uses them, and none is pruned."""
KINDS: tuple[Kind, ...] = get_args(Kind)

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
    """Weights that take one option together: a routed expert, or a dense group.

    `layer` is the decoder layer, `index` the expert's id in it (the original id, also after pruning). Dense groups have no
    index; embeddings are in layer -1, the head is behind the last.
    """

    name: str
    layer: int
    index: int
    weights: tuple[Weight, ...]
    kind: Kind = "experts"

    @property
    def is_dense(self) -> bool:
        return self.kind != "experts"

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    def admits(self, option: Option) -> bool:
        """Whether the option is one of this group's: a dense group is not pruned, and takes only what fits its widths."""
        if not self.is_dense:
            return True
        size = option.group_size
        return not option.is_prune and all(size is None or w.shape[1] % size == 0 for w in self.weights)


@dataclass(frozen=True, eq=False)
class CostTable:
    """Exact bytes on disk of every option of every group: routed experts first, then the dense groups.

    `costs` is int64 [N, K] (N groups, K options), of no meaning where an option is not `allowed`; `original_bytes` what the
    groups take in the model as given.
    `floor` is the number of experts each layer must keep (the model's experts per token); `layout` says which
    assignments are allowed.
    """

    groups: tuple[Group, ...]
    options: tuple[Option, ...]
    costs: np.ndarray
    original_bytes: int
    floor: int
    layout: Layout = "mixed"

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool [N, K]: the options of each group."""
        return np.array([[group.admits(option) for option in self.options] for group in self.groups])

    @cached_property
    def dense(self) -> np.ndarray:
        """int64: the rows of the dense groups."""
        return np.flatnonzero([group.is_dense for group in self.groups])

    @cached_property
    def experts(self) -> CostTable:
        """The routed experts alone."""
        if not len(self.dense):
            return self
        count = len(self.groups) - len(self.dense)
        groups = self.groups[:count]
        original = sum(group.numel for group in groups) * self.original_bytes // self.numel
        return replace(self, groups=groups, costs=self.costs[:count], original_bytes=original)

    @cached_property
    def layer(self) -> np.ndarray:
        """int64 [N]: the decoder layer of each expert, and of all dense groups one that no expert is in."""
        layers = np.array([group.layer for group in self.groups], dtype=np.int64)
        if len(self.dense):
            layers[self.dense] = self.layers[-1] + 1
        return layers

    @cached_property
    def floors(self) -> np.ndarray | int:
        """How many groups must be kept of those with the same `layer`, by `layer`."""
        if not len(self.dense):
            return self.floor
        floors = np.zeros(self.layers[-1] + 2, dtype=np.int64)
        floors[list(self.layers)] = self.floor
        return floors

    @cached_property
    def numel(self) -> int:
        return sum(group.numel for group in self.groups)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers with routed experts."""
        return tuple(sorted({group.layer for group in self.groups if not group.is_dense}))

    def rows(self, layer: int) -> np.ndarray:
        """int64 [E]: the rows of a layer's experts, in order of their index."""
        return np.flatnonzero(self.experts.layer == layer)

    def option_index(self, option: Option) -> int:
        return self.options.index(option)

    def like(self, option: Option) -> np.ndarray:
        """int64 [N]: the index of an option, or where a group does not have it, of the next wider one or else of the widest."""
        order = sorted(range(len(self.options)), key=lambda index: self.options[index].bits)
        wider = [index for index in order if self.options[index].bits >= option.bits]
        preferred = [self.option_index(option), *wider, *reversed(order)]
        first = self.allowed[:, preferred].argmax(1)
        return np.array(preferred, dtype=np.int64)[first]

    @property
    def prune_index(self) -> int | None:
        return self.options.index(PRUNE) if PRUNE in self.options else None

    @cached_property
    def range(self) -> tuple[int, int]:
        """Smallest and largest cost any assignment with the per-layer floor can have, in bytes.

        They are the same for both layouts: the experts of a layer have one size, so the cheapest assignment
        keeps `floor` experts everywhere at the cheapest option, or all where prune is not an option.
        """
        most = np.iinfo(np.int64).max
        cheapest = np.where(self.allowed, self.costs, most).min(1)
        cheapest_kept = np.where(self.allowed & (self.costs > 0), self.costs, most).min(1)
        smallest = int(cheapest.sum())
        for layer in self.layers:
            rows = self.rows(layer)
            pruned = rows[cheapest[rows] == 0]
            must_keep = max(0, self.floor - (len(rows) - len(pruned)))
            smallest += int(np.sort(cheapest_kept[pruned])[:must_keep].sum())
        return smallest, int(np.where(self.allowed, self.costs, 0).max(1).sum())


def covered(table: CostTable) -> str:
    """What the budget covers, in words."""
    return "the groups that the budget covers" if len(table.dense) else "the routed experts"


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
    def left(self) -> int:
        """What is left for the groups that the budget covers; may be less than nothing."""
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
        """Every expert at an option, and dense groups at what is like it."""
        return cls(table, table.like(option))

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
        """How many experts take each option."""
        experts = self.choice[: len(self.table.experts.groups)]
        return {option.name: int(np.sum(experts == index)) for index, option in enumerate(self.table.options)}

    def dense(self) -> Iterator[tuple[Group, Option, int]]:
        """The dense groups, each with its option and what it costs."""
        for row in self.table.dense.tolist():
            yield self.table.groups[row], self.option(row), int(self.table.costs[row, self.choice[row]])

    def check(self, budget: Budget) -> None:
        """Raise PlanError where the budget, a group's options, a layer's floor or the table's layout is violated."""
        for group, option, _ in self.dense():
            if not group.admits(option):
                raise PlanError(f"{group.name} cannot take the option {option}")
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


@dataclass(frozen=True)
class Score:
    """Means over tokens, in nats: next-token loss before and after, KL(before || after) and its standard error.

    The standard error is over sequences, whose tokens are not independent; None where there is one sequence only.
    """

    name: str
    tokens: int
    loss_before: float
    loss_after: float
    kl: float
    kl_stderr: float | None


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
