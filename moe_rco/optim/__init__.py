"""Minimise a differentiable loss over discrete choices under linear budgets; nothing here knows of language
models."""

from moe_rco.optim.adam import RiemannianAdam
from moe_rco.optim.equal_layers import EqualLayers
from moe_rco.optim.evolution import evolve
from moe_rco.optim.feasible import FeasibleSet
from moe_rco.optim.manifold import BudgetManifold
from moe_rco.optim.mckp import Knapsack, MCKPSolution, solve_mckp
from moe_rco.optim.overlap import OverlappingBudgetManifold
from moe_rco.optim.races import refine
from moe_rco.optim.solve import Method, evolution_steps, solve
from moe_rco.optim.solver import SolveResult, minimize
from moe_rco.optim.trace import StepRecord

__all__ = [
    "BudgetManifold",
    "EqualLayers",
    "FeasibleSet",
    "Knapsack",
    "MCKPSolution",
    "Method",
    "OverlappingBudgetManifold",
    "RiemannianAdam",
    "SolveResult",
    "StepRecord",
    "evolution_steps",
    "evolve",
    "minimize",
    "refine",
    "solve",
    "solve_mckp",
]
