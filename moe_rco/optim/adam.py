"""Adam on a budget manifold, after arXiv 2605.00649."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moe_rco.errors import UserError


class Manifold(Protocol):
    """What the optimiser needs of a manifold; all arguments and results are float64 [N, K]."""

    def project(self, logits: Tensor, vector: Tensor) -> Tensor: ...

    def retract(self, logits: Tensor) -> Tensor: ...

    def transport(self, logits: Tensor, vector: Tensor) -> Tensor: ...


class RiemannianAdam:
    """Adam whose every iterate lies on the manifold.

    The gradient is projected before it enters the moments; so is the step, because dividing by the second
    moment leaves the tangent plane; the first moment is transported to the new point. The second moment
    holds a scale per coordinate, not a direction, and stays as it is.
    """

    def __init__(
        self,
        manifold: Manifold,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not (lr > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise UserError(f"lr and eps must be positive and betas in [0, 1), got {lr}, {eps}, {betas}")
        self.manifold, self.lr, self.betas, self.eps = manifold, lr, betas, eps
        self.steps = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def step(self, logits: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """One step downhill from `logits` [N, K], which must be on the manifold; returns the new point."""
        gradient = self.manifold.project(logits, euclidean_gradient.detach().to(torch.float64))
        beta1, beta2 = self.betas
        first = torch.zeros_like(gradient) if self.first is None else self.first
        second = torch.zeros_like(gradient) if self.second is None else self.second
        self.steps += 1
        first = torch.lerp(gradient, first, beta1)
        self.second = torch.addcmul(second * beta2, gradient, gradient, value=1 - beta2)
        scale = (self.second / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        direction = self.manifold.project(logits, first / scale / (1 - beta1**self.steps))
        moved = self.manifold.retract(logits - self.lr * direction)
        self.first = self.manifold.transport(moved, first)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Step count and moments; the moments are absent before the first step."""
        state: dict[str, Any] = {"steps": self.steps}
        if self.first is not None and self.second is not None:
            state |= {"first": self.first.clone(), "second": self.second.clone()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`; the manifold and the hyperparameters are the constructor's."""
        self.steps = int(state["steps"])
        self.first = state["first"].clone() if "first" in state else None
        self.second = state["second"].clone() if "second" in state else None
