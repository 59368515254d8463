"""Model families. A new one is a file here with its `Adapter`; docs/new-family.md goes through it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from moe_rco.adapters.base import Adapter, Config, check_sizes, route
from moe_rco.errors import ModelError


def _families() -> dict[str, Adapter]:
    """An adapter of every class in the files beside this one, by `model_type`."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {family.model_type: family() for family in Adapter.__subclasses__()}


FAMILIES = _families()
MOST_EXPERTS = 10**6
"""In all layers: more than any model has, and few enough to be listed."""


def get_adapter(config: Config) -> Adapter:
    """The adapter of a model's config.json. Raises ModelError naming the nearest supported families."""
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, 1, cutoff=0.4)
        hint = f"; the nearest is '{near[0]}'" if near else ""
        raise ModelError(
            f"model_type '{model_type}' in config.json is not supported{hint} (supported: {', '.join(sorted(FAMILIES))})"
        )
    adapter = FAMILIES[model_type]
    check_sizes(config)
    named = config.get("architectures") or [adapter.architecture]
    if adapter.architecture not in named:
        raise ModelError(
            f"architecture {named[0]} in config.json is not supported; expected {adapter.architecture}"
        )
    top_k, experts = adapter.top_k(config), adapter.num_experts(config)
    if not 1 <= top_k <= experts:
        raise ModelError(
            f"config.json routes each token to {top_k} of {experts} experts; num_experts_per_tok is wrong"
        )
    if experts * len(adapter.moe_layers(config)) > MOST_EXPERTS:
        raise ModelError(
            f"config.json describes {experts:,} experts in each of {len(adapter.moe_layers(config)):,} layers; is it damaged?"
        )
    if not adapter.moe_layers(config):
        raise ModelError("config.json describes no MoE layer (see mlp_only_layers and decoder_sparse_step)")
    return adapter


__all__ = ["FAMILIES", "Adapter", "get_adapter", "route"]
