"""How a search keeps softmax logits near a budget: on the manifold, or by one of the two classical means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from moe_rco.optim.adam import RiemannianAdam
from moe_rco.optim.manifold import BudgetManifold


class Relaxation(Protocol):
    """Moves logits float64 [N, K] downhill while keeping their expected cost near, or at, a budget."""

    exact: bool
    """Whether the expected cost equals the budget throughout, so that samples may be held to it as well."""

    def start(self, logits: Tensor) -> Tensor: ...

    def step(self, logits: Tensor, gradient: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OnManifold:
    """Riemannian Adam: every iterate's expected cost is the budget (arXiv 2605.00649)."""

    exact = True

    def __init__(self, manifold: BudgetManifold, lr: float, betas: tuple[float, float]) -> None:
        self._manifold, self._adam = manifold, RiemannianAdam(manifold, lr=lr, betas=betas)

    def start(self, logits: Tensor) -> Tensor:
        return self._manifold.retract(logits)

    def step(self, logits: Tensor, gradient: Tensor) -> Tensor:
        return self._adam.step(logits, gradient)

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state)


class Penalized:
    """Plain Adam on the loss plus a price for missing the budget by e = C / B - 1.

    The price is `weight` e^2, and with `dual` the augmented Lagrangian's m e besides, the multiplier m going up by
    `weight` e / 10 every step (dual ascent); without the first term it swings around the budget.
    """

    exact = False

    def __init__(
        self, manifold: BudgetManifold, lr: float, betas: tuple[float, float], weight: float, *, dual: bool
    ) -> None:
        self._manifold, self._weight, self._dual = manifold, weight, dual
        self._adam = RiemannianAdam(_Free(), lr=lr, betas=betas)
        self._multiplier = 0.0

    def start(self, logits: Tensor) -> Tensor:
        return self._manifold.retract(logits)

    def step(self, logits: Tensor, gradient: Tensor) -> Tensor:
        budget = max(float(self._manifold.budgets), 1.0)
        missed = (float(self._manifold.expected_cost(logits)) - float(self._manifold.budgets)) / budget
        if self._dual:
            self._multiplier += self._weight / 10 * missed
        price = self._multiplier + 2 * self._weight * missed
        return self._adam.step(logits, gradient + price / budget * self._manifold.normal(logits))

    def state_dict(self) -> dict[str, Any]:
        return {**self._adam.state_dict(), "multiplier": self._multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._multiplier = float(state["multiplier"])
        self._adam.load_state_dict({name: value for name, value in state.items() if name != "multiplier"})


class _Free:
    """No constraint: on it Riemannian Adam is Adam."""

    def project(self, logits: Tensor, vector: Tensor) -> Tensor:
        return vector

    def retract(self, logits: Tensor) -> Tensor:
        return logits

    def transport(self, logits: Tensor, vector: Tensor) -> Tensor:
        return vector
