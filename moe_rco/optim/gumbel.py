"""Gumbel noise, straight-through samples and the temperature schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_rco.errors import UserError


def gumbel_noise(shape: tuple[int, int], count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`count` draws of float64 standard Gumbel noise, in antithetic pairs.

    The partner of -log(-log u) is -log(-log(1 - u)): unlike the mirrored noise -g it is Gumbel distributed
    itself, so every sample has the right distribution and the pair is as negatively correlated as it can be.
    """
    tiny = torch.finfo(torch.float64).tiny
    u = torch.empty(0)
    for index in range(count):
        if index % 2 == 0:
            u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
            log_u = torch.log(u.clamp(min=tiny))
        else:
            log_u = torch.log1p(-u)
        yield -torch.log((-log_u).clamp(min=tiny))


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """A tensor with the value of `hard` and the gradient of `soft`."""
    return hard + (soft - soft.detach())


def temperature(step: int, steps: int, tau: tuple[float, float]) -> float:
    """Exponential decay from tau[0] at step 0 to tau[1] at the last step, number `steps` - 1."""
    start, end = tau
    if not (start > 0 and end > 0):
        raise UserError(f"temperatures must be positive, got {tau}")
    return start * (end / start) ** (step / max(1, steps - 1))
