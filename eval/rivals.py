"""The methods to beat, each as all its variants: the one that is best on held-out text counts.

Choosing a rival's variant on the text it is measured on flatters the rival. RCO and the Fisher seed get no
such choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from eval.prepared import Lines, Subject
from moe_rco.baselines import SCALES, OutputErrors, output_errors, proxy, prune_lowest, uniform
from moe_rco.calib.search import knapsack
from moe_rco.pipeline import choose
from moe_rco.recipe import Recipe
from moe_rco.recipe_sections import SearchMethod
from moe_rco.types import Assignment, Budget, Option

Variants = Mapping[str, Assignment]

UNIFORM = "uniform"
PROXY = "proxy + knapsack"
LINEARITY = "linearity + knapsack"
SEARCHES = ("evolution", "penalty", "lagrangian")
"""They start from the simple methods' best assignment, and take as many passes as RCO. The initial logits and the
gradients of penalty and lagrangian use the Fisher estimate, as RCO's do: what differs is how the budget is kept."""
WEIGHTS = (1.0, 10.0, 100.0)
"""Of the penalty and lagrangian methods, each a full search."""
FISHER = "Fisher seed"
RCO = "RCO"


class Methods:
    """Every method's assignments for one prepared model; measurements shared by budgets are made once."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._table = subject.prepared.model.table
        self._usage = subject.prepared.calibrated.usage

    @cached_property
    def _errors(self) -> OutputErrors:
        return output_errors(self._subject.prepared.model, self._subject.prepared.pools[0], Lines())

    def all(self, budget: Budget, recipe: Recipe) -> Mapping[str, Callable[[], Variants]]:
        """By name, a function that gives a method's assignments by variant; empty where it does not apply."""
        widest = uniform(self._table, budget)
        least = 0 if widest is None else widest.option(0).bits
        # Narrower than the widest option that needs no pruning would be worse for nothing.
        quantized = [o for o in self._table.options if o.is_quantized and o.bits >= least]
        four = [option for option in self._table.options if option.bits == 4]
        full = [option for option in self._table.options if option.bits == 16]
        methods: dict[str, Callable[[], Variants]] = {UNIFORM: lambda: self._uniform(budget)}
        for score in ("frequency", "REAP"):
            for label, options in (("bf16", full), ("int4", four), ("best width", quantized)):
                methods[f"{score} + {label}"] = lambda s=score, o=options: self._pruned(budget, s, o)
        methods[PROXY] = lambda: self._proxy(budget)
        methods[LINEARITY] = lambda: self._chosen(budget, recipe, "linearity")
        methods["evolution"] = lambda: self._chosen(budget, recipe, "evolution")
        for method in ("penalty", "lagrangian"):
            methods[method] = lambda m=method: self._weighted(budget, recipe, m)
        methods[FISHER] = lambda: {"": knapsack(self._subject.prepared.effects, self._table, budget)}
        methods[RCO] = lambda: self._chosen(budget, recipe, "rco")
        return methods

    def _uniform(self, budget: Budget) -> Variants:
        found = uniform(self._table, budget)
        return {} if found is None else {str(found.option(0)): found}

    def _pruned(self, budget: Budget, score: str, options: list[Option]) -> Variants:
        scores = self._usage.counts if score == "frequency" else self._usage.saliency
        found: dict[str, Assignment] = {}
        for option in options:
            for per_layer in (False, True):
                pruned = prune_lowest(self._table, budget, scores, option, per_layer=per_layer)
                if pruned is not None:
                    found[f"{option}, {'equal layers' if per_layer else 'global'}"] = pruned
        return found

    def _proxy(self, budget: Budget) -> Variants:
        return {scale: proxy(self._table, budget, self._errors, scale) for scale in SCALES}

    def _chosen(self, budget: Budget, recipe: Recipe, method: SearchMethod, **settings: float) -> Variants:
        search = recipe.search.model_copy(update={"method": method, **settings})
        recipe = recipe.model_copy(update={"search": search})
        best = choose(self._subject.prepared, budget, recipe, Lines()).best
        return {f"from {best.name}": best.assignment}

    def _weighted(self, budget: Budget, recipe: Recipe, method: SearchMethod) -> Variants:
        found: dict[str, Assignment] = {}
        for weight in WEIGHTS:
            for name, assignment in self._chosen(budget, recipe, method, penalty=weight).items():
                found[f"{name}, weight {weight:g}"] = assignment
        return found
