"""What a model family must tell us, and the routing arithmetic all families share.

An adapter answers from `config.json` alone (a plain dict), so that it can be asked before a weight is read. Names are those on
disk; transformers 5 fuses the experts of a layer into 3-D parameters on load and splits them again on save.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moe_rco.errors import ModelError, RecipeError
from moe_rco.types import Group, Kind, Weight

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names on disk; every family we know has these."""
MASKED_LOGIT = -1e30
"""Router logit of a pruned expert: large and finite, because -inf minus -inf would be NaN in some kernels."""

Config = Mapping[str, Any]

MOST = 10**8
"""No size in a config.json is larger."""
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "decoder_sparse_step",
)
_LISTS = {"mlp_only_layers": int, "layer_types": str, "architectures": str}


def get_field(config: Config, key: str) -> Any:
    """A required entry of config.json. Raises ModelError naming the key."""
    if config.get(key) is None:
        raise ModelError(
            f"config.json of this {config.get('model_type')} model has no '{key}'; is the file complete?"
        )
    return config[key]


def check_sizes(config: Config) -> None:
    """Raise ModelError for the first entry that is not of the kind and size it must be; those that are missing may be so."""
    for key in _SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= MOST):
            raise ModelError(
                f"config.json: {key} is {_shown(value)}; it must be a whole number from 1 to {MOST:,}"
            )
    for key, kind in _LISTS.items():
        value = config.get(key)
        if value is not None and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            raise ModelError(f"config.json: {key} is {_shown(value)}; it must be a list of {kind.__name__}")
    if not isinstance(config.get("hidden_act", ""), str):
        raise ModelError(f"config.json: hidden_act is {_shown(config['hidden_act'])}; it must be a name")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:40] + "..."


class Adapter:
    """Facts about one model family. Subclasses set the class attributes and override what differs.

    The defaults are those of the Qwen families: experts under `mlp.experts`, dense layers given by `mlp_only_layers` and
    `decoder_sparse_step`.
    """

    model_type: str
    architecture: str
    block = "mlp"
    """Name of the MoE block inside a decoder layer, on disk."""
    projections = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down inside an expert, on disk."""
    intermediate_key = "moe_intermediate_size"
    quantised_embeddings = True
    """Whether vLLM reads this family's embeddings at other options than bf16."""

    def num_experts(self, config: Config) -> int:
        # transformers 5 writes `num_local_experts` for every family; older Qwen files say `num_experts`.
        key = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
        return int(get_field(config, key))

    def top_k(self, config: Config) -> int:
        return int(get_field(config, "num_experts_per_tok"))

    def renormalise(self, config: Config) -> bool:
        """Whether the chosen experts' weights are divided by their sum."""
        return bool(config.get("norm_topk_prob", False))

    def moe_layers(self, config: Config) -> list[int]:
        """Indices of the decoder layers that route (the others are dense)."""
        dense = set(config.get("mlp_only_layers") or ())
        step = int(config.get("decoder_sparse_step") or 1)
        layers = int(get_field(config, "num_hidden_layers"))
        return [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]

    def expert_shape(self, config: Config) -> tuple[int, int]:
        """(hidden size, intermediate size) of one routed expert."""
        return int(get_field(config, "hidden_size")), int(get_field(config, self.intermediate_key))

    def expert(self, config: Config, layer: int, index: int) -> Group:
        """The group of one expert; its weights are gate [I, H], up [I, H] and down [H, I], in this order."""
        hidden, intermediate = self.expert_shape(config)
        name = f"model.layers.{layer}.{self.block}.experts.{index}"
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        weights = tuple(
            Weight(f"{name}.{projection}.weight", shape)
            for projection, shape in zip(self.projections, shapes, strict=True)
        )
        return Group(name, layer, index, weights)

    def groups(self, config: Config, kinds: Collection[Kind] = ()) -> tuple[Group, ...]:
        """Every routed expert, layer by layer, and then the dense groups of some kinds."""
        experts = (
            self.expert(config, layer, index)
            for layer in self.moe_layers(config)
            for index in range(self.num_experts(config))
        )
        return (*experts, *self.dense(config, kinds))

    def tied(self, config: Config) -> bool:
        """Whether the embeddings are the head as well."""
        return bool(config.get("tie_word_embeddings", False))

    def shared_expert(self, config: Config, layer: int) -> Group | None:
        """The shared expert of a layer: gate [I, H], up [I, H] and down [H, I], in this order; None where there is none."""
        return None

    def attention(self, config: Config, layer: int) -> tuple[Group, Group]:
        """Queries, keys and values, which vLLM fuses and so need one option; and the output projection."""
        hidden, heads = (int(get_field(config, key)) for key in ("hidden_size", "num_attention_heads"))
        size = int(config.get("head_dim") or hidden // heads)
        keys = int(config.get("num_key_value_heads") or heads) * size
        name = f"model.layers.{layer}.self_attn"
        rows = {"q_proj": heads * size, "k_proj": keys, "v_proj": keys}
        inputs = tuple(Weight(f"{name}.{part}.weight", (size, hidden)) for part, size in rows.items())
        output = Weight(f"{name}.o_proj.weight", (hidden, heads * size))
        return (
            Group(f"{name}.qkv_proj", layer, 0, inputs, "attention"),
            Group(f"{name}.o_proj", layer, 0, (output,), "attention"),
        )

    def dense(self, config: Config, kinds: Collection[Kind]) -> Iterator[Group]:
        """The groups of some kinds other than routed experts, first to last. Raises RecipeError where the model has none."""
        layers = int(get_field(config, "num_hidden_layers"))
        shape = (int(config.get("vocab_size") or 0), int(get_field(config, "hidden_size")))
        routed = self.moe_layers(config) if "shared_experts" in kinds else []
        shared = {layer: self.shared_expert(config, layer) for layer in routed}
        ends = {"embeddings", "head"} & set(kinds)
        if routed and not any(shared.values()):
            raise RecipeError(
                f"groups: {self.model_type} models have no shared experts; leave out shared_experts"
            )
        if ends and shape[0] < 1:
            raise RecipeError(
                f"groups: config.json has no vocab_size; leave out {' and '.join(sorted(ends))}"
            )
        if not self.quantised_embeddings and ("embeddings" in ends or (ends and self.tied(config))):
            raise RecipeError(
                f"groups: vLLM reads the embeddings of {self.model_type} models as they are; leave out "
                + " and ".join(sorted(ends))
            )
        if "embeddings" in ends or (ends and self.tied(config)):
            name = EMBEDDING.removesuffix(".weight")
            yield Group(name, -1, 0, (Weight(EMBEDDING, shape),), "embeddings")
        for layer in range(layers):
            if "attention" in kinds:
                yield from self.attention(config, layer)
            if (group := shared.get(layer)) is not None:
                yield group
        if "head" in ends and not self.tied(config):
            yield Group(HEAD.removesuffix(".weight"), layers, 0, (Weight(HEAD, shape),), "head")

    def every_dense(self, config: Config) -> tuple[Group, ...]:
        """All dense groups that may be chosen for in this model."""
        kinds: set[Kind] = {"attention", "head", "embeddings"}
        if not self.quantised_embeddings:
            kinds -= {"embeddings"} | ({"head"} if self.tied(config) else set())
        if any(self.shared_expert(config, layer) for layer in self.moe_layers(config)):
            kinds.add("shared_experts")
        return tuple(self.dense(config, kinds))

    def router_name(self, layer: int) -> str:
        """Name on disk of a router's weight [E, H]."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def disk_name(self, parameter: str) -> str:
        """Name on disk of a transformers parameter that is not a routed expert's."""
        return parameter

    def always_on(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """What a MoE block adds for every token beside its routed experts: x [T, H] -> [T, H], or None."""
        return None


def route(
    logits: torch.Tensor, top_k: int, renormalise: bool, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts as a deployed model does: pruned experts are masked *before* the softmax.

    Args:
        logits: [T, E] router outputs.
        kept: bool [E], False for pruned experts; None keeps all.

    Returns:
        weights float32 [T, top_k] and ids int64 [T, top_k], largest first.
    """
    scores = logits.float()
    if kept is not None:
        scores = scores.masked_fill(~kept, MASKED_LOGIT)
    weights, ids = torch.topk(torch.softmax(scores, dim=-1), top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
