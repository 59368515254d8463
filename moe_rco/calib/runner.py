"""Runs a decoder layer by layer, with the routed experts supplied from outside.

Attention, norms, routers and shared experts are the modules of transformers; what a routed expert is (original, pruned,
quantised) is decided by the `Experts` callable given to `run`. Layers are taken from `layers()` one after the other and never
looked at through hooks on the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from moe_rco.adapters import Adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class Experts(Protocol):
    """The routed experts of every layer under some assignment."""

    def __call__(self, layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x [T, H] and router logits [T, E] to the routed experts' output [T, H]."""
        ...


@dataclass(frozen=True)
class Context:
    """What every layer needs beside its input: positions, and a mask for each kind of attention."""

    position_ids: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    masks: dict[str, Any]


class Runner:
    """The dense part of a causal MoE model: everything except the routed experts.

    Weights are read from the checkpoint on construction, in `dtype`, to `device`. Raises ModelError when one is missing.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.adapter, self.device, self.dtype = adapter, device, dtype
        self.config: Any = AutoConfig.from_pretrained(checkpoint.directory)
        # Families that mix kinds of attention list them; the others are all sliding or all full.
        kind = (
            "full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"
        )
        self._attention = getattr(self.config, "layer_types", None) or [kind] * self.config.num_hidden_layers
        self.moe_layers = frozenset(adapter.moe_layers(checkpoint.config))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation="sdpa"
            )
        decoder = model.model
        for layer in self.moe_layers:
            decoder.layers[layer].mlp.experts = nn.Identity()
        self._fill(model, checkpoint)
        decoder.rotary_emb = type(decoder.rotary_emb)(self.config).to(device)
        model.requires_grad_(False).eval()
        self._decoder, self._head = decoder, model.lm_head

    def _fill(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        weights: dict[str, torch.Tensor] = {}
        for name, _ in model.named_parameters(remove_duplicate=False):
            source = self.adapter.disk_name(name)
            if source not in checkpoint.tensors:
                if name == "lm_head.weight" and self.config.tie_word_embeddings:
                    source = "model.embed_tokens.weight"
                else:
                    raise ModelError(f"{checkpoint.directory}: tensor '{source}' is missing")
            weights[name] = checkpoint.read(source).to(self.device, self.dtype)
        model.load_state_dict(weights, strict=True, assign=True)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, Context]:
        """ids [B, S] to hidden states [B, S, H] and the context of the batch."""
        h = self._decoder.embed_tokens(ids)
        position_ids = torch.arange(ids.shape[1], device=self.device)[None]
        masks = {
            kind: MASKS[kind](
                config=self.config,
                inputs_embeds=h,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
            )
            for kind in set(self._attention)
        }
        return h, Context(position_ids, self._decoder.rotary_emb(h, position_ids), masks)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        yield from enumerate(self._decoder.layers)

    def step(
        self, index: int, layer: Any, h: torch.Tensor, context: Context, experts: Experts
    ) -> torch.Tensor:
        """One decoder layer: [B, S, H] to [B, S, H]."""
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h),
            attention_mask=context.masks[self._attention[index]],
            position_ids=context.position_ids,
            position_embeddings=context.rotary,
        )
        h = h + attended
        x = layer.post_attention_layernorm(h)
        if index not in self.moe_layers:
            return h + layer.mlp(x)
        flat = x.reshape(-1, x.shape[-1])
        y = experts(index, flat, F.linear(flat, layer.mlp.gate.weight))
        shared = self.adapter.always_on(layer.mlp, flat)
        if shared is not None:
            y = y + shared
        return h + y.reshape(h.shape)

    def run(self, ids: torch.Tensor, experts: Experts) -> torch.Tensor:
        """ids [B, S] to the last hidden states [B, S, H], before the final norm."""
        h, context = self.embed(ids)
        for index, layer in self.layers():
            h = self.step(index, layer, h, context, experts)
        return h

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., H] to float32 logits [..., V]."""
        return self._head(self._decoder.norm(h)).float()
