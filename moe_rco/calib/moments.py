"""Second moments of what goes into the linear maps of dense groups: what quantising them needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rco.calib.dense import replaced
from moe_rco.calib.runner import Project
from moe_rco.quant.hessian import HessianAccumulator
from moe_rco.types import Group


class Moments:
    """Sums of x x^T over the tokens of the first `sequences` of what goes through, for every weight of some groups."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.groups, self._device = groups, device
        self._found: dict[tuple[str, int], HessianAccumulator] = {}
        self.sequences = 0

    def of(self, group: Group, part: int) -> HessianAccumulator:
        """Of the inputs of one weight of a group."""
        place = (group.name, source(group, part))
        if place not in self._found:
            self._found[place] = HessianAccumulator(1, group.weights[part].shape[1], self._device)
        return self._found[place]

    @contextmanager
    def within(self, layer: nn.Module, batch: int) -> Iterator[None]:
        """While this is open, what the groups' linear maps in a layer are given is looked at, `batch` sequences at a time."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(replaced(layer, group, self._seen(group, batch)))
            yield

    def at_head(self, group: Group) -> Project:
        """As `Runner.head` takes it: multiplies, and looks at inputs [t, C] of one sequence."""

        def project(x: Tensor, weight: Tensor) -> Tensor:
            if self.sequences:
                self.of(group, 0).add(0, x)
            return F.linear(x, weight)

        return project

    def _seen(self, group: Group, batch: int) -> Callable[[int, Tensor, Tensor], Tensor]:
        def product(part: int, x: Tensor, weight: Tensor) -> Tensor:
            if self.sequences and source(group, part) == part:
                seen = x.reshape(batch, -1, x.shape[-1])[: self.sequences]
                self.of(group, part).add(0, seen.flatten(0, 1))
            return F.linear(x, weight)

        return product


def source(group: Group, part: int) -> int:
    """The first weight of a group with the same inputs as one of them."""
    return part if group.kind == "shared_experts" and part == 2 else 0
