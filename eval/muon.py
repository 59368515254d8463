"""Muon for the matrices, AdamW for the rest (embeddings, norms, routers).

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by its
nearest orthogonal matrix. Stacked experts are orthogonalised one by one, gate and up projections separately.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps on a batch [n, rows, columns], in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """``paired`` are the parameters that hold two matrices one above the other: stacked gate and up projections."""

    def __init__(
        self,
        params: list[nn.Parameter],
        paired: set[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.paired = paired

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(buffer, group["momentum"])
                rows = parameter.shape[-2] // (2 if parameter in self.paired else 1)
                update = orthogonalize(update.reshape(-1, rows, parameter.shape[-1])).view_as(parameter)
                scale = max(1.0, rows / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices, embeddings, others = [], [], []
    paired = {parameter for name, parameter in model.named_parameters() if name.endswith("gate_up_proj")}
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            embeddings.append(parameter)
        elif parameter.ndim < 2 or "gate.weight" in name:
            others.append(parameter)
        else:
            matrices.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=adam_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [Muon(matrices, paired, muon_lr), adam]
