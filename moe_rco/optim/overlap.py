"""Several overlapping linear budgets at once: {a : C_j(a) = B_j for j = 1..q}."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim.groups import AIM, TOLERANCE, checked_costs, checked_mask, softmax

_QUICK, _THOROUGH = 25, 200
_PATH = 1e-3
_REACH = 32.0


class OverlappingBudgetManifold:
    """Logits a [N, K] whose expected costs under q cost tables equal q budgets.

    Args:
        costs: [q, N, K], any real dtype, finite, not negative.
        budgets: [q].
        allowed: bool [N, K]; an option that is not allowed has probability exactly 0.

    Raises BudgetError when a budget alone is out of reach (at construction) or when they exclude each other
    (at the first retraction), UserError on malformed input. Normals are [q, N, K], everything else as in
    `BudgetManifold`.
    """

    def __init__(self, costs: Tensor, budgets: Tensor, allowed: Tensor | None = None):
        self.costs = checked_costs(costs, 3)
        q, groups, options = self.costs.shape
        self.allowed = checked_mask(allowed, (groups, options), self.costs.device)
        self.budgets = torch.as_tensor(budgets, dtype=torch.float64, device=self.costs.device).reshape(-1)
        if self.budgets.shape != (q,):
            raise UserError(f"{q} cost tables need {q} budgets, got {list(self.budgets.shape)}")
        masked = self.costs if self.allowed is None else self.costs.masked_fill(~self.allowed, torch.inf)
        low = masked.amin(dim=2)
        high = masked.masked_fill(torch.isinf(masked), -torch.inf).amax(dim=2)
        self._low = low.sum(dim=1)
        self._check_budgets(self._low, high.sum(dim=1))
        self._excess = self.costs - low.unsqueeze(2)
        if self.allowed is not None:
            self._excess.masked_fill_(~self.allowed, 0.0)
        # Every table in its own unit, then every group divided by its largest range over the tables: one
        # factor per group keeps the Jacobian of the retraction symmetric, so it is the gradient of a convex
        # function.
        self._unit = (high - low).amax(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        scaled = self._excess / self._unit[:, None, None]
        self._scale = scaled.amax(dim=(0, 2)).clamp(min=torch.finfo(torch.float64).tiny)
        self._direction = scaled / self._scale[None, :, None]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the allowed options: [N, K] -> [N, K]."""
        return softmax(logits, self.allowed)

    def expected_cost(self, logits: Tensor) -> Tensor:
        """[N, K] -> [q]."""
        return self._low + (self.probabilities(logits) * self._excess).sum(dim=2).sum(dim=1)

    def normal(self, logits: Tensor) -> Tensor:
        """dC_j/da_ik = p_ik (c_jik - E_i[c_j]): [N, K] -> [q, N, K]."""
        p = self.probabilities(logits)
        mean = (p * self._excess).sum(dim=2, keepdim=True)
        return p * (self._excess - mean)

    def project(self, logits: Tensor, vector: Tensor) -> Tensor:
        """The part of `vector` [N, K] that is orthogonal to all normals; 0 at options that are not
        allowed."""
        normal = self.normal(logits).flatten(1)
        if self.allowed is not None:
            vector = vector.masked_fill(~self.allowed, 0.0)
        size = normal.abs().amax(dim=1, keepdim=True)
        normal = normal / torch.where(size > 0, size, 1.0)
        length = normal.norm(dim=1, keepdim=True)
        normal = normal / torch.where(length > 0, length, 1.0)
        inverse = torch.linalg.pinv(normal @ normal.T, rtol=1e-14, hermitian=True)
        flat = vector.flatten()
        # Twice: the second pass removes what rounding left when the normals are nearly parallel.
        for _ in range(2):
            flat = flat - (inverse @ (normal @ flat)) @ normal
        return flat.reshape(vector.shape)

    def retract(self, logits: Tensor) -> Tensor:
        """The point a + sum_j t_j d_j with every |C_j - B_j| <= 1e-12 B_j.

        Damped Newton in q dimensions on the convex function sum_i s_i logsumexp(a_i + (t d)_i) - t B, whose
        gradient is C - B and whose Hessian is the q x q Gram matrix of the cost directions under p. Nearly
        deterministic groups make that function piecewise linear and Newton fail; then it is solved at a high
        temperature first, which is lowered to 1 along the path of solutions. Points on the manifold come back
        unchanged. Raises BudgetError when no probabilities meet all budgets.
        """
        if logits.shape != self.costs.shape[1:] or logits.dtype != torch.float64:
            raise UserError(f"logits must be float64 {list(self.costs.shape[1:])}, got {list(logits.shape)}")
        t, miss = self._descend(logits, torch.zeros_like(self.budgets), 1.0, AIM, _QUICK)
        if miss > AIM:
            heat = max(2.0, float(logits.abs().max()))
            t = torch.zeros_like(t)
            while heat > 1.0:
                t, _ = self._descend(logits, t, heat, _PATH, _THOROUGH)
                heat /= 2
            t, miss = self._descend(logits, t, 1.0, AIM, _THOROUGH)
        if not miss <= TOLERANCE:
            raise BudgetError(
                f"no probabilities found that meet all {len(self.budgets)} budgets: the closest ones miss one "
                f"by {miss:.3g} of itself; the budgets may exclude each other"
            )
        return self._move(logits, t)

    def transport(self, logits: Tensor, vector: Tensor) -> Tensor:
        """Carry a tangent vector to the point `logits`: projection onto the tangent space there."""
        return self.project(logits, vector)

    def _move(self, logits: Tensor, t: Tensor) -> Tensor:
        return logits + self._shift(t) if bool(t.any()) else logits

    def _descend(
        self, logits: Tensor, t: Tensor, heat: float, aim: float, iterations: int
    ) -> tuple[Tensor, float]:
        """Newton at one temperature, from t; returns the best t seen and its largest relative residual."""
        error, gram, potential = self._state(logits, t, heat)
        best_t, best = t, self._miss(error)
        damping = 0.0
        for _ in range(iterations):
            if best <= aim:
                break
            step = self._newton(gram, error, damping)
            # A step far beyond the reach of the quadratic model is shortened to a sane change of logits.
            step = step * min(1.0, _REACH * heat / max(float(self._shift(step).abs().max()), 1e-300))
            new_error, new_gram, new_potential = self._state(logits, t + step, heat)
            # Close to the root the potential no longer resolves progress, the residual does.
            falls = new_potential <= potential + 1e-4 * float(step @ error)
            if falls or new_error.norm() < 0.9 * error.norm():
                t, error, gram, potential = t + step, new_error, new_gram, new_potential
                damping = 0.0 if damping < 1e-12 else damping / 10
                if self._miss(error) < best:
                    best_t, best = t, self._miss(error)
            else:
                damping = max(1e-8, damping * 10)
        return best_t, best

    def _shift(self, t: Tensor) -> Tensor:
        return torch.tensordot(t, self._direction, dims=1)

    def _state(self, logits: Tensor, t: Tensor, heat: float) -> tuple[Tensor, Tensor, float]:
        """Residual [q] in the tables' units, its Jacobian [q, q] and the potential, at a temperature."""
        moved = (logits + self._shift(t)) / heat if heat != 1.0 else self._move(logits, t)
        p = self.probabilities(moved)
        mean = (p * self._direction).sum(dim=2, keepdim=True)
        centred = self._direction - mean
        weighted = centred * (p * (self._scale / heat)[:, None])
        gram = weighted.flatten(1) @ centred.flatten(1).T
        target = (self.budgets - self._low) / self._unit
        error = (p * self._excess).sum(dim=2).sum(dim=1) / self._unit - target
        inside = moved if self.allowed is None else moved.masked_fill(~self.allowed, -torch.inf)
        potential = heat * float((self._scale * torch.logsumexp(inside, dim=1)).sum()) - float(t @ target)
        return error, gram, potential

    def _miss(self, error: Tensor) -> float:
        """Largest residual relative to its budget."""
        missing = error.abs() * self._unit
        return float(torch.where(missing > 0, missing / self.budgets, 0.0).max())

    def _newton(self, gram: Tensor, error: Tensor, damping: float) -> Tensor:
        diagonal = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        normalised = gram / diagonal[:, None] / diagonal[None, :]
        eye = torch.eye(len(error), dtype=error.dtype, device=error.device)
        inverse = torch.linalg.pinv(normalised + damping * eye, rtol=1e-14, hermitian=True)
        return -(inverse @ (error / diagonal)) / diagonal

    def _check_budgets(self, least: Tensor, most: Tensor) -> None:
        slack = TOLERANCE * self.budgets.abs()
        wrong = ~((self.budgets >= least - slack) & (self.budgets <= most + slack))
        if bool(wrong.any()):
            j = int(wrong.nonzero()[0])
            raise BudgetError(
                f"budget {float(self.budgets[j]):.17g} of cost table {j} is out of reach: assignments cost "
                f"between {float(least[j]):.17g} and {float(most[j]):.17g}"
            )
