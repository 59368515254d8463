"""How much a quantised weight changes a layer's output."""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(weight: Tensor, replaced: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared output error E |(W - W') x|^2 = tr(D H D^T) of each expert, float64 [E].

    `weight` and `replaced` are [E, R, C], `hessian` [E, C, C] is the mean of x x^T. The unit is that of the
    squared output, summed over its R entries.
    """
    errors = []
    for before, after, moment in zip(weight, replaced, hessian, strict=True):
        # One expert at a time in float64: a batch would hold several wide copies of a layer's experts.
        difference = before.double() - after.double()
        errors.append(((difference @ moment.double()) * difference).sum())
    return torch.stack(errors) if errors else torch.empty(0, dtype=torch.float64)
