"""The Fisher seed: what each option of each group alone adds to the KL, in the Gauss-Newton approximation.

With y drawn from the model's own distribution and g_t the gradient of log p(y) at a MoE block's output,
KL(original || moved) is about 1/2 E_t (g_t . dy_t)^2. One backward pass serves all groups and options.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.calib.objective import AssignedModel, HeadLoss
from moe_rco.types import Progress

BATCH = 8


def log_likelihood_of_samples(generator: torch.Generator) -> HeadLoss:
    """Sum of log p(y) over a sequence's positions, y ~ p drawn with `generator`."""

    def loss(row: int, logits: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits, -1)
        # By inversion of the distribution function: several times faster than torch.multinomial.
        cumulative = log_p.detach().exp().cumsum(-1)
        mass = cumulative[:, -1:] * torch.rand(len(cumulative), 1, generator=generator, device=logits.device)
        drawn = torch.searchsorted(cumulative, mass, right=True).clamp_max(logits.shape[-1] - 1)
        return log_p.gather(-1, drawn).sum()

    return loss


def fisher_effects(model: AssignedModel, pool: TokenPool, seed: int, progress: Progress) -> np.ndarray:
    """q float64 [N, K]: predicted KL per token, in nats, of moving each group alone to each option."""
    generator = torch.Generator(device=model.runner.device).manual_seed(seed)
    loss = log_likelihood_of_samples(generator)
    total, tokens = np.zeros((len(model.table.groups), len(model.table.options))), 0
    with progress.stage("measure every option", len(pool)) as advance:
        for _, ids in pool.batches(BATCH):
            _, effects = model.effects(None, ids, loss)
            total += effects.squared * ids.numel()
            tokens += ids.numel()
            advance(len(ids))
    return 0.5 * total / tokens
