"""Loss and divergence on held-out text, over the whole vocabulary, per domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.types import Progress

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""ids [B, S] to logits [B, S, V]."""


@dataclass(frozen=True)
class Score:
    """Means over tokens, in nats: next-token loss before and after, KL(before || after) and its standard error.

    The standard error is over sequences, whose tokens are not independent.
    """

    name: str
    tokens: int
    loss_before: float
    loss_after: float
    kl: float
    kl_stderr: float


@dataclass(frozen=True)
class Scores:
    """Scores of every domain, and of all text together."""

    domains: tuple[Score, ...]
    all: Score


@torch.no_grad()
def measure(before: LogitsOf, after: LogitsOf, pool: TokenPool, progress: Progress, batch: int = 4) -> Scores:
    """Compare two models on every sequence of a pool, `batch` at a time (whole-vocabulary logits of both are held)."""
    rows: list[list[float]] = []
    with progress.stage("measure on held-out text", len(pool)) as advance:
        for _, ids in pool.batches(batch):
            log_p, log_q = (torch.log_softmax(logits(ids).float(), -1) for logits in (before, after))
            target = ids[:, 1:, None].to(log_p.device)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().mean(-1)
            losses = (-log[:, :-1].gather(-1, target)[..., 0].double().mean(-1) for log in (log_p, log_q))
            rows.extend(torch.stack([*losses, kl], dim=1).tolist())
            advance(len(ids))
    table = np.array(rows)
    length = pool.ids.shape[1]
    domains = np.array(pool.domains)
    scores = (_score(name, table[domains == name], length) for name in sorted(set(pool.domains)))
    return Scores(tuple(scores), _score("all", table, length))


def _score(name: str, rows: np.ndarray, length: int) -> Score:
    before, after, kl = (float(mean) for mean in rows.mean(0))
    spread = float(rows[:, 2].std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Score(name, len(rows) * length, before, after, kl, spread)
