"""Every expert at the same width: what most quantisers do."""

from __future__ import annotations

from moe_rco.types import Assignment, Budget, CostTable


def uniform(table: CostTable, budget: Budget) -> Assignment | None:
    """All experts at the widest option that fits, the dearer of two equally wide; None where none fits."""
    kept = [option for option in table.options if not option.is_prune]
    fitting = [a for a in (Assignment.uniform(table, option) for option in kept) if a.cost <= budget.bytes]
    return max(fitting, key=lambda assignment: (assignment.option(0).bits, assignment.cost), default=None)
