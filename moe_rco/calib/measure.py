"""Loss and divergence on held-out text, over the whole vocabulary, per domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.types import Progress, Score

LOGITS = 1 << 23
"""Made at once, of each of the two models."""


class Model(Protocol):
    """What is measured: hidden states [B, S, H] of ids [B, S], and while `head` is open their logits [..., V]."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor: ...

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]: ...


@dataclass(frozen=True)
class Scores:
    """Scores of every domain, and of all text together."""

    domains: tuple[Score, ...]
    all: Score


@torch.no_grad()
def measure(
    before: Model, after: Model, pool: TokenPool, vocab_size: int, progress: Progress, batch: int = 8
) -> Scores:
    """Compare two models on every sequence of a pool, `batch` sequences at a time, and parts of them at the head."""
    length = pool.ids.shape[1]
    step = max(1, LOGITS // vocab_size)
    rows: list[np.ndarray] = []
    weights = torch.ones(pool.ids.shape) if pool.weights is None else pool.weights
    with progress.stage("measure on held-out text", len(pool)) as advance:
        for group, ids in pool.batches(batch):
            states = [model.hidden(ids) for model in (before, after)]
            with before.head() as first, after.head() as second:
                for row, (sequence, weight) in enumerate(zip(ids, weights[group].double(), strict=True)):
                    sums = np.zeros(3)
                    for start in range(0, length, step):
                        part = slice(start, start + step)
                        before_, after_ = first(states[0][row, part]), second(states[1][row, part])
                        sums += _sums(before_, after_, sequence[start + 1 : start + 1 + step], weight[part])
                    followed, every = float(weight[:-1].sum()), float(weight.sum())
                    rows.append(sums / (followed, followed, every))
                    advance(1)
    table = np.array(rows)
    domains = np.array(pool.domains)
    scores = (_score(name, table[domains == name], length) for name in sorted(set(pool.domains)))
    return Scores(tuple(scores), _score("all", table, length))


def _sums(
    before: torch.Tensor, after: torch.Tensor, following: torch.Tensor, weight: torch.Tensor
) -> np.ndarray:
    """Over positions [n] with logits [n, V]: next-token losses before and after, where a token follows, and KL, weighted."""
    log_p, log_q = (torch.log_softmax(logits.float(), -1) for logits in (before, after))
    target, weight = following[:, None].to(log_p.device), weight.to(log_p.device)
    losses = [-log[: len(target)].gather(-1, target)[:, 0].double() for log in (log_p, log_q)]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    return np.array([*(float(weight[: len(loss)] @ loss) for loss in losses), float(weight @ kl)])


def _score(name: str, rows: np.ndarray, length: int) -> Score:
    before, after, kl = (float(mean) for mean in rows.mean(0))
    spread = float(rows[:, 2].std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return Score(name, len(rows) * length, before, after, kl, spread)
