"""The uncompressed model's next-token distribution, kept as its largest probabilities and one term for the rest.

A whole vocabulary of log-probabilities would take 40 GB for Qwen3 at 64 x 2048 tokens; the largest 64 take 33 MB and leave a tail
that is treated as one more outcome, so the divergence measured is a lower bound that is tight where the tail is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOP = 64


@dataclass(frozen=True)
class Reference:
    """ids int32 [N, S, k], log-probabilities float32 [N, S, k] of the k largest, and of all others together [N, S].

    `weights` float32 [N, S] say how much every position counts.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def empty(
        cls, sequences: int, length: int, vocab_size: int, weights: torch.Tensor | None = None
    ) -> Reference:
        shape = (sequences, length, min(TOP, vocab_size - 1))
        weights = torch.ones(shape[:2]) if weights is None else weights
        return cls(torch.empty(shape, dtype=torch.int32), torch.empty(shape), torch.empty(shape[:2]), weights)

    def fill(self, row: int, positions: slice, logits: torch.Tensor) -> None:
        """Take in the logits [n, V] at some positions of a sequence."""
        log_p, ids = torch.topk(torch.log_softmax(logits, -1), self.ids.shape[-1], dim=-1)
        self.ids[row, positions], self.log_p[row, positions] = ids.int().cpu(), log_p.cpu()
        self.log_rest[row, positions] = log_remainder(log_p).cpu()

    def of(self, rows: slice | torch.Tensor, device: torch.device) -> Reference:
        """Some sequences' part, on a device."""
        return Reference(*(part[rows].to(device) for part in self._parts()))

    def at(self, row: int, positions: slice) -> Reference:
        """Some positions of one sequence."""
        return Reference(*(part[row, positions] for part in self._parts()))

    def _parts(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.log_p, self.log_rest, self.weights


def log_remainder(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - sum exp(log_p)) over the last dimension, finite and differentiable."""
    return torch.log((1 - log_p.exp().sum(-1)).clamp_min(1e-9))


def divergence(reference: Reference, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) in nats per position [...] times its weight, from the model's logits [..., V]."""
    log_q = torch.log_softmax(logits, -1).gather(-1, reference.ids.long())
    inside = (reference.log_p.exp() * (reference.log_p - log_q)).sum(-1)
    outside = reference.log_rest.exp() * (reference.log_rest - log_remainder(log_q))
    return reference.weights * (inside + outside)
