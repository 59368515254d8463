"""Second moments of the inputs of every expert: the Hessian of a layer's squared output error.

The output error of a linear map with weight error D over inputs x is E |D x|^2 = tr(D H D^T) with H = E[x x^T], so
GPTQ needs H only. An expert sees only the tokens routed to it, hence one Hessian per expert.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_rco.errors import ModelError


class HessianAccumulator:
    """Sums x x^T per expert over calibration tokens.

    `dim` is the input dimension; memory is `num_experts * dim^2` float32 on `device`.
    """

    def __init__(self, num_experts: int, dim: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_experts, dim, dim, device=device)
        self._mass = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def add(self, expert: int, x: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens `x` [T, dim] routed to `expert`. `weight` [T] >= 0 multiplies each token's x x^T.

        An expert's output enters the layer scaled by its routing weight w, so w^2 is the natural `weight`.
        """
        if len(x) == 0:
            return
        x = x.to(self._sums.device, torch.float32)
        if weight is None:
            self._mass[expert] += len(x)
        else:
            weight = weight.to(self._sums.device, torch.float32)
            self._mass[expert] += weight.sum(dtype=torch.float64)
            x = x * weight.sqrt().unsqueeze(-1)
        self._sums[expert].addmm_(x.T, x)
        self._counts[expert] += len(x)

    def add_routed(self, x: Tensor, ids: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens `x` [T, dim] to the experts `ids` [T, k] they were routed to; `weight` [T, k] as in `add`."""
        order = ids.flatten().argsort(stable=True)
        tokens = order // ids.shape[1]
        sizes = torch.bincount(ids.flatten(), minlength=len(self._counts)).tolist()
        for expert, part in enumerate(order.split(sizes)):
            rows = x[tokens[sum(sizes[:expert]) : sum(sizes[: expert + 1])]]
            self.add(expert, rows, None if weight is None else weight.flatten()[part])

    @property
    def counts(self) -> Tensor:
        """int64 [E]: tokens seen by each expert."""
        return self._counts

    def hessians(self) -> Tensor:
        """Mean of x x^T over each expert's tokens, float32 [E, dim, dim]; zero for an expert without tokens.

        Raises ModelError where activations were not finite.
        """
        mass = self._mass.clamp_min(torch.finfo(torch.float64).tiny).to(torch.float32).clamp_min(1e-30)
        result = self._sums / mass.view(-1, 1, 1)
        bad = (~result.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"the inputs of experts {bad[:8]} contain NaN or Inf on the calibration text; "
                "run the model in float32 or check its weights"
            )
        return result


class Shrunk(NamedTuple):
    """`hessian` [E, C, C] ready for GPTQ; `experts`: ids of those that had too few tokens of their own."""

    hessian: Tensor
    experts: list[int]


def shrink(hessian: Tensor, counts: Tensor, min_tokens: int) -> Shrunk:
    """Mix the Hessians of experts with fewer than `min_tokens` tokens with the layer's pooled one.

    With n tokens and a = n / min_tokens < 1:  H' = a H + (1 - a) P,  P = sum_e n_e H_e / sum_e n_e.
    An average of n outer products has rank n at most: directions that few tokens happened not to excite look free, and GPTQ would push all
    its error into them. P is what the expert's inputs would look like if routing carried no information, and has every direction any token of the layer
    excites. The mix is continuous at n = min_tokens, is P for an expert nobody visited, and identity when the layer saw no token.
    """
    counts = counts.to(hessian.device)
    total = int(counts.sum())
    few = (counts < min_tokens).nonzero().flatten().tolist()
    if total == 0:
        return Shrunk(torch.eye(hessian.shape[-1]).to(hessian).expand_as(hessian).clone(), few)
    share = (counts.double() / total).to(hessian.dtype)
    pooled = torch.einsum("e,eij->ij", share, hessian)
    result = hessian.clone()
    for expert in few:
        own = int(counts[expert]) / min_tokens
        result[expert] = own * hessian[expert] + (1 - own) * pooled
    return Shrunk(result, few)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared output error tr(D H D^T) of each expert, float64 [E].

    `difference` [E, R, C] is the weight minus what replaces it, `hessian` [E, C, C] the mean of x x^T.
    """
    errors = [
        math.fsum([float((d.double() @ h.double()).mul_(d.double()).sum())])
        for d, h in zip(difference, hessian, strict=True)
    ]
    return torch.tensor(errors, dtype=torch.float64)
