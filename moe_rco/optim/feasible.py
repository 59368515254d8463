"""What a search needs to know of the assignments it may choose from."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_rco.optim.mckp import MCKPSolution


class FeasibleSet(Protocol):
    """The assignments of options to N groups that keep a budget and other constraints."""

    def solve(self, values: Any, *, warm: MCKPSolution | None = None) -> MCKPSolution:
        """The assignment with the largest sum of `values` float64 [N, K]. `warm`, the solution for similar
        values, may save time and never changes the result's value.
        """
        ...

    def checked(self, choice: Any, name: str) -> NDArray[np.int64]:
        """The choice as int64 [N]; raises BudgetError or UserError, calling it `name`, unless it is in the
        set.
        """
        ...

    def cost_of(self, choice: NDArray[np.int64]) -> int:
        """Total cost of a choice int64 [N]."""
        ...

    def hint(self, multiplier: float) -> MCKPSolution:
        """A warm start that knows only the multiplier of an earlier solution."""
        ...
