"""Everything of vLLM's insides that we use. What differs between the versions we support is decided here."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from typing import Any

from torch import Tensor

from moe_rco.errors import UserError

SUPPORTED = ((0, 26), (0, 33))
"""First version that works, and the first of which nothing is known."""


def check_version(installed: str) -> None:
    """Raise UserError unless `installed` is a version of vLLM whose interfaces we know."""
    found = re.match(r"(\d+)\.(\d+)", installed)
    first, after = SUPPORTED
    if found is None or not first <= (int(found[1]), int(found[2])) < after:
        raise UserError(
            f"vLLM {installed} cannot serve this model: moe_rco knows vLLM {_text(first)} up to, not including, "
            f"{_text(after)}; install one of these, for example pip install 'vllm~={_text(first)}'"
        )


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


check_version(version("vllm"))

from vllm.config import VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig  # noqa: E402
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase  # noqa: E402
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.torch_utils import direct_register_custom_op  # noqa: E402

_LAYERS = "vllm.model_executor.layers.fused_moe"
_cpu_select_experts: Any = None
if importlib.util.find_spec(f"{_LAYERS}.router.cpu_router") is None:
    # Before 0.30 the routers do not run on a CPU, and its kernels route for themselves: 0.26 and 0.27 with the
    # first of these, 0.28 and 0.29 with the second.
    _first = importlib.util.find_spec(f"{_LAYERS}.cpu_fused_moe") is not None
    _module = importlib.import_module(f"{_LAYERS}.{'cpu_fused_moe' if _first else 'experts.cpu_moe'}")
    _cpu_select_experts = _module.select_experts


def select_experts(
    layer: Any, router: Any, x: Tensor, logits: Tensor, input_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and ids [T, k] as vLLM itself would choose them from `logits` [T, E]."""
    if _cpu_select_experts is not None and current_platform.is_cpu():
        return _cpu_select_experts(
            hidden_states=x,
            router_logits=logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            scoring_func=layer.scoring_func,
        )
    return router.select_experts(hidden_states=x, router_logits=logits, input_ids=input_ids)


__all__ = [
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "LinearBase",
    "MoEActivation",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "check_version",
    "current_platform",
    "direct_register_custom_op",
    "get_current_vllm_config",
    "init_logger",
    "select_experts",
]
