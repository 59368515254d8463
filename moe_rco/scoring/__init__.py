"""Scores a model with lm-eval beside the original it was made from. `evaluate` is what `moe-rco eval` does."""

from moe_rco.scoring.evaluation import Outcome, evaluate, is_demo
from moe_rco.scoring.settings import Settings, make_settings, needs_installed

__all__ = ["Outcome", "Settings", "evaluate", "is_demo", "make_settings", "needs_installed"]
