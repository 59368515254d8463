"""Checks and small tensor helpers shared by the manifolds: groups of options with costs.

A problem has N groups; group i takes one of K options, option k of group i costs `costs[i, k]`. Options that
a group does not have are `False` in the mask `allowed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rco.errors import UserError

# |C - B| <= TOLERANCE * B after every retraction.
TOLERANCE = 1e-12
# The root finders aim lower, so that an independent evaluation of the same probabilities agrees with the
# promise. Rounding logits of magnitude 1,200 moves C by up to 2.3e-13 of itself, so much less than this
# cannot be had.
AIM = 5e-13
_BLOCK = 512


def checked_mask(allowed: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The mask as a bool tensor [N, K], or None when every option is available.

    Raises UserError on a wrong shape and when a group has no option at all.
    """
    if allowed is None:
        return None
    mask = torch.as_tensor(allowed, device=device)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise UserError(f"allowed must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    empty = (~mask.any(dim=1)).nonzero()
    if len(empty):
        raise UserError(f"group {int(empty[0])} has no allowed option")
    return None if bool(mask.all()) else mask


def checked_costs(costs: Tensor, dims: int) -> Tensor:
    """The costs as float64; raises UserError unless they are finite, not negative and have `dims`
    dimensions."""
    result = torch.as_tensor(costs).to(torch.float64)
    if result.dim() != dims or 0 in result.shape:
        raise UserError(f"costs must have {dims} non-empty dimensions, got shape {list(result.shape)}")
    if not bool(torch.isfinite(result).all()) or bool((result < 0).any()):
        raise UserError("costs must be finite and not negative")
    return result


def softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Row-wise softmax in which options that are not allowed get exactly 0, whatever their logit."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.softmax(logits, dim=1)


class SegmentSum:
    """Sums one number per group into one number per segment: [N] -> [S].

    Both paths add in blocks. A running sum over a million groups would lose the digits that the tolerance
    needs.
    """

    def __init__(self, segments: Tensor | None, count: int):
        self.index = None if count == 1 else segments
        self.count = count
        if self.index is not None:
            order = torch.argsort(self.index, stable=True)
            sizes = torch.bincount(self.index, minlength=count)
            first = torch.cumsum(sizes, 0) - sizes
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order), device=order.device) - first[self.index[order]]
            blocks = torch.div(sizes + _BLOCK - 1, _BLOCK, rounding_mode="floor")
            offset = torch.cumsum(blocks, 0) - blocks
            self._block = offset[self.index] + torch.div(rank, _BLOCK, rounding_mode="floor")
            self._owner = torch.repeat_interleave(torch.arange(count, device=order.device), blocks)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.index is None:
            return rows.sum().reshape(1)
        partial = rows.new_zeros(len(self._owner)).index_add_(0, self._block, rows)
        return rows.new_zeros(self.count).index_add_(0, self._owner, partial)

    def maximum(self, rows: Tensor) -> Tensor:
        """The largest of non-negative numbers in every segment."""
        if self.index is None:
            return rows.max().reshape(1)
        return rows.new_zeros(self.count).scatter_reduce_(0, self.index, rows, "amax")

    def spread(self, values: Tensor) -> Tensor:
        """One number per segment back to a column over groups: [S] -> [N, 1], or [1, 1] for a single
        segment."""
        return (values if self.index is None else values[self.index]).unsqueeze(1)
