"""Sorting tokens by the expert they are routed to."""

from __future__ import annotations

import torch


def by_expert(ids: torch.Tensor, num_experts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each expert the tokens routed to it and the column of `ids` [T, k] it stands in (both int64 [n])."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    k = ids.shape[1]
    return [(part // k, part % k) for part in order.split(counts)]
