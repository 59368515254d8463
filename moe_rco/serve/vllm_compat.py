"""Everything of vLLM's insides that we use. What differs between the versions we support is decided here."""

from __future__ import annotations

import re
from importlib.metadata import version

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
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.torch_utils import direct_register_custom_op  # noqa: E402

__all__ = [
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "LinearBase",
    "MoEActivation",
    "ParallelLMHead",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "check_version",
    "current_platform",
    "direct_register_custom_op",
    "get_current_vllm_config",
    "init_logger",
]
