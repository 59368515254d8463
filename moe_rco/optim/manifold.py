"""The budget manifold {a : C(a) = B}: softmax logits with a prescribed expected cost (arXiv 2605.00649)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rco.errors import BudgetError, MoeRcoError, UserError
from moe_rco.optim.groups import AIM, TOLERANCE, SegmentSum, checked_costs, checked_mask, softmax
from moe_rco.optim.root import solve_increasing


class BudgetManifold:
    """Logits a [N, K] whose expected cost C(a) = sum_ik softmax(a_i)_k c_ik equals a budget in every segment.

    Args:
        costs: [N, K], any real dtype, finite, not negative (bytes, say).
        budgets: one number, or [S] when `segments` is given.
        segments: int64 [N] in 0..S-1, the budget that each group counts against; None for one over all.
        allowed: bool [N, K]; an option that is not allowed has probability exactly 0 whatever its logit.

    Raises:
        BudgetError: a budget is below the cheapest or above the dearest choice of its segment.
        UserError: shapes, dtypes or values are not as stated.

    Logits, vectors and results are float64 on the device of `costs`. Every operation works on all groups at
    once.
    """

    def __init__(
        self,
        costs: Tensor,
        budgets: Tensor | float | int,
        segments: Tensor | None = None,
        allowed: Tensor | None = None,
    ):
        self.costs = checked_costs(costs, 2)
        device = self.costs.device
        self.allowed = checked_mask(allowed, (self.costs.shape[0], self.costs.shape[1]), device)
        self.budgets = torch.as_tensor(budgets, dtype=torch.float64, device=device).reshape(-1)
        self._segments = self._checked_segments(segments)
        masked = self.costs if self.allowed is None else self.costs.masked_fill(~self.allowed, torch.inf)
        low = masked.amin(dim=1)
        high = masked.masked_fill(torch.isinf(masked), -torch.inf).amax(dim=1)
        # Costs above the group's cheapest option: the constant part of C never enters the sums, so that
        # budgets close to the minimum keep all their digits.
        self._excess = self.costs - low.unsqueeze(1)
        if self.allowed is not None:
            self._excess.masked_fill_(~self.allowed, 0.0)
        span = high - low
        self._scale = torch.where(span > 0, span, 1.0)
        self._direction = self._excess / self._scale.unsqueeze(1)
        self._low, self._full = self._segments(low), self._segments(span)
        self._check_budgets()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the allowed options: [N, K] -> [N, K]."""
        return softmax(logits, self.allowed)

    def expected_cost(self, logits: Tensor) -> Tensor:
        """C(a) per segment: [N, K] -> [S]."""
        return self._low + self._segments((self.probabilities(logits) * self._excess).sum(dim=1))

    def normal(self, logits: Tensor) -> Tensor:
        """dC/da_ik = p_ik (c_ik - E_i[c]), each group's rows for its own segment: [N, K] -> [N, K]."""
        p = self.probabilities(logits)
        mean = (p * self._excess).sum(dim=1, keepdim=True)
        return p.mul_(self._excess - mean)

    def project(self, logits: Tensor, vector: Tensor) -> Tensor:
        """The part of `vector` [N, K] that is tangent at `logits`; 0 at options that are not allowed."""
        normal = self.normal(logits)
        if self.allowed is not None:
            vector = vector.masked_fill(~self.allowed, 0.0)
        # Divided by its largest entry first: a nearly deterministic segment's normal would underflow when
        # squared.
        size = self._segments.maximum(normal.abs().amax(dim=1))
        normal /= self._segments.spread(torch.where(size > 0, size, 1.0))
        along = self._segments((normal * vector).sum(dim=1))
        norm = self._segments((normal * normal).sum(dim=1))
        factor = torch.where(norm > 0, along / norm, 0.0)
        return torch.addcmul(vector, normal, self._segments.spread(-factor))

    def retract(self, logits: Tensor) -> Tensor:
        """The point a + t d on the manifold, d_ik = c_ik / s_i with s_i the range of the group's costs.

        C grows with t (dC/dt = sum_i s_i Var_i(d)), so the root is unique; |C - B| <= 1e-12 B afterwards.
        Logits that are on the manifold come back unchanged. Raises MoeRcoError when float64 logits cannot
        express the budget (magnitudes far beyond 1,000).

        d is used up to a constant per group, which changes no probability: t > 0 lowers all but the dearest
        option, t < 0 all but the cheapest. So the options that count keep small logits however far t has to
        go.
        """
        self._check_logits(logits)
        moved = logits

        def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal moved
            moved = self._move(logits, t)
            p = self.probabilities(moved)
            mean = (p * self._excess).sum(dim=1, keepdim=True)
            variance = p.mul_((self._excess - mean).square_()).sum(dim=1)
            return self._segments(mean.squeeze(1)), self._segments(variance / self._scale)

        target = (self.budgets - self._low).clamp(min=0.0)
        root = solve_increasing(evaluate, target, self._full, AIM * self.budgets)
        if bool((root.residual > TOLERANCE * self.budgets).any()):
            worst = int((root.residual / self.budgets).argmax())
            raise MoeRcoError(
                f"retraction of segment {worst} stopped {float(root.residual[worst]):.3g} away from its "
                f"budget {float(self.budgets[worst]):.17g}; logits reach {float(logits.abs().max()):.3g}, "
                "keep them below 500"
            )
        return moved if root.is_last else self._move(logits, root.t)

    def transport(self, logits: Tensor, vector: Tensor) -> Tensor:
        """Carry a tangent vector to the point `logits`: projection onto the tangent plane there."""
        return self.project(logits, vector)

    def _move(self, logits: Tensor, t: Tensor) -> Tensor:
        if not bool(t.any()):
            return logits
        column = self._segments.spread(t)
        return torch.addcmul(logits, self._direction - (column > 0).to(torch.float64), column)

    def _checked_segments(self, segments: Tensor | None) -> SegmentSum:
        count, device = len(self.budgets), self.costs.device
        if segments is None:
            if count != 1:
                raise UserError(f"{count} budgets need segments, the budget that each group counts against")
            return SegmentSum(None, 1)
        index = torch.as_tensor(segments, device=device)
        if index.dtype != torch.int64 or index.shape != self.costs.shape[:1]:
            raise UserError(
                f"segments must be int64 [{self.costs.shape[0]}], got {index.dtype} {list(index.shape)}"
            )
        if int(index.min()) < 0 or int(index.max()) >= count or len(torch.unique(index)) != count:
            raise UserError(
                f"segments must name every one of the {count} budgets, 0 to {count - 1}, and no other"
            )
        return SegmentSum(index, count)

    def _check_budgets(self) -> None:
        least, most, slack = self._low, self._low + self._full, TOLERANCE * self.budgets.abs()
        wrong = ~((self.budgets >= least - slack) & (self.budgets <= most + slack))
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise BudgetError(
                f"budget {float(self.budgets[i]):.17g} of segment {i} is out of reach: its groups cost "
                f"between {float(least[i]):.17g} and {float(most[i]):.17g}"
            )

    def _check_logits(self, logits: Tensor) -> None:
        if logits.shape != self.costs.shape or logits.dtype != torch.float64:
            raise UserError(
                f"logits must be float64 {list(self.costs.shape)}, got {logits.dtype} {list(logits.shape)}"
            )
        finite = torch.isfinite(logits)
        if self.allowed is not None:
            finite |= ~self.allowed
        if not bool(finite.all()):
            raise UserError("logits must be finite")
