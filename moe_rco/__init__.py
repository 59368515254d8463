"""Expert pruning and mixed precision for mixture-of-experts language models, within a budget in bytes.

`prune(recipe)` is what `moe-rco prune` does, and gives a report; `prune_all(recipe)` gives one for each of a recipe's budgets,
the largest first. Importing this package also teaches transformers to load what it writes:
`AutoModelForCausalLM.from_pretrained(directory)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_rco._version import __version__
from moe_rco.serve.hf import register

if TYPE_CHECKING:
    from moe_rco.console import RichProgress
    from moe_rco.pipeline import preflight, prune, prune_all
    from moe_rco.recipe import Recipe
    from moe_rco.recipe import load as load_recipe
    from moe_rco.report import Report
    from moe_rco.tracking import Callback, trackers

# Imported on first use: torch and transformers take seconds, and reading a recipe needs neither.
_LAZY = {
    "Callback": ("moe_rco.tracking", "Callback"),
    "Recipe": ("moe_rco.recipe", "Recipe"),
    "Report": ("moe_rco.report", "Report"),
    "RichProgress": ("moe_rco.console", "RichProgress"),
    "load_recipe": ("moe_rco.recipe", "load"),
    "preflight": ("moe_rco.pipeline", "preflight"),
    "prune": ("moe_rco.pipeline", "prune"),
    "prune_all": ("moe_rco.pipeline", "prune_all"),
    "trackers": ("moe_rco.tracking", "trackers"),
}

__all__ = [
    "Callback",
    "Recipe",
    "Report",
    "RichProgress",
    "__version__",
    "load_recipe",
    "preflight",
    "prune",
    "prune_all",
    "trackers",
]

register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moe_rco' has no attribute '{name}'")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
